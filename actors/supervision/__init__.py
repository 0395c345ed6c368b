"""Supervision in the terms of Erlang/OTP: a supervisor starts components as child processes and restarts them.

| module | what |
| --- | --- |
| `_supervisor_process` | what `triptych up` runs: a supervisor, or one for each component of `--only` |
| `_host_reporter` | on one of several hosts, answers for its supervisor over TCP |
| `_supervisor`, `_child` | the supervisor actor, and its record of each child |
| `_restart` | what to do when a child ends: one pure decision |
| `_component_specs` | which code builds each kind of component |
| `_launcher`, `zygote`, `_zygote_client` | how a process starts: as a fresh interpreter, or forked from the zygote |
| `component_process` | what a child process runs |
| `_child_process` | a running child process, watched through its pidfd |
| `_process_tree` | death signals, child subreapers, orphans |
| `_ownership`, `_generation_counter` | who may use a state folder, and the number of each start |
"""

from triptych.actors.supervision._child_process import module_command
from triptych.actors.supervision._component_specs import COMPONENT_SPECS, PRELOAD, ComponentSpec, load_function
from triptych.actors.supervision._launcher import NO_CUDA, QUIET, quiet_libraries
from triptych.actors.supervision._ownership import running_systems
from triptych.actors.supervision._process_tree import die_with_parent
from triptych.actors.supervision._restart import (
    ChildExit,
    ChildSpec,
    ExitKind,
    RestartPolicy,
    Retire,
    Strategy,
    SupervisorSpec,
    Wait,
    decide_restart,
)
from triptych.actors.supervision._supervisor_process import SupervisorProcess

__all__ = [
    "COMPONENT_SPECS",
    "NO_CUDA",
    "PRELOAD",
    "QUIET",
    "ChildExit",
    "ChildSpec",
    "ComponentSpec",
    "ExitKind",
    "RestartPolicy",
    "Retire",
    "Strategy",
    "SupervisorProcess",
    "SupervisorSpec",
    "Wait",
    "decide_restart",
    "die_with_parent",
    "load_function",
    "module_command",
    "quiet_libraries",
    "running_systems",
]
