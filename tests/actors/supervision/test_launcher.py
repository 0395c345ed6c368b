"""Fresh interpreters, forks, and a zygote that cannot fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.actors.conftest import THREE_ROLES
from tests.actors.supervision.supervised import ROOT
from triptych.actors.supervision import NO_CUDA, PRELOAD, SupervisorProcess, module_command
from triptych.actors.supervision._launcher import gpu_environment, thread_environment, usable_cores
from triptych.actors.topology import load_topology

Write = Callable[..., Path]


def folder_of_strange_code(parent: Path) -> Path:
    """A folder whose modules have the names of ours and of our libraries, and leave a file when one is imported."""
    folder = parent / "strange"
    folder.mkdir()
    program = f"open({str(folder / 'RAN')!r}, 'w')\n"
    for name in ("actors", "api", "bus", "engines", "roles"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(program)
    for name in ("msgspec", "structlog", "torch", "xxhash", "json"):
        (folder / f"{name}.py").write_text(program)
    return folder


def launch(file: Path, way: str) -> tuple[dict[str, Any], str]:
    strange = folder_of_strange_code(file.parent)
    command = [*module_command("tests.actors.supervision.launch_twice"), str(file), way]
    done = subprocess.run(command, cwd=strange, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert not (strange / "RAN").exists()
    return json.loads(done.stdout), done.stderr


def test_a_fresh_interpreter(write: Write) -> None:
    result, _ = launch(write(), "fresh")
    assert result["zygote"] == 0
    for start in result["seen"]:
        assert start["answer"]["pid"] == start["pid"]
        assert start["ending"] == "exit code 0"


def test_a_fork_is_a_child_of_the_supervisor(write: Write) -> None:
    result, log = launch(write(), "forked")
    assert "starting a fresh interpreter" not in log
    parents = {start["answer"]["parent"] for start in result["seen"]}
    assert len(parents) == 1
    assert result["zygote"] not in parents
    assert [start["ending"] for start in result["seen"]] == ["exit code 0"] * 2


def test_a_zygote_with_a_second_thread_refuses_and_a_fresh_interpreter_does_it(write: Write) -> None:
    result, log = launch(write(), "threaded")
    assert "the zygote has 2 threads (MainThread, left running and native ones)" in log
    assert [start["ending"] for start in result["seen"]] == ["exit code 0"] * 2


def test_a_module_that_the_zygote_cannot_import_is_logged_and_it_still_forks(write: Write) -> None:
    result, log = launch(write(), "missing")
    assert "no_such_module cannot be imported" in log
    assert "starting a fresh interpreter" not in log
    assert [start["ending"] for start in result["seen"]] == ["exit code 0"] * 2


def test_a_fork_of_the_zygote_of_roles_computes_with_several_threads_and_quantizes(write: Write) -> None:
    result, log = launch(write(), "roles")
    assert "starting a fresh interpreter" not in log
    assert "torchao" not in log
    first, second = (start["answer"] for start in result["seen"])
    assert first["trace"] == second["trace"] == 512.0 * 512.0
    assert first["threads"] == 2
    assert first["seed"] != second["seed"]
    assert first["quantized_bytes"] < 64 * 64 * 2


# A build of torch with CUDA on a machine with a GPU, as far as importing libraries ask about it. What opens the
# driver, or needs it open, is noted: after any of it CUDA is of no use in a fork.
IMPORTS = """
import importlib, sys, torch
touched = []
def note(name, answer=None):
    def ask(*arguments, **options):
        touched.append(name)
        return answer
    return ask
def as_with_cuda(function):
    def ask():
        touched.append("asked")
        torch._C._cuda_getDeviceCount = note("cuInit", 0)  # that it is there makes the build one with CUDA
        try:
            return function()
        finally:
            del torch._C._cuda_getDeviceCount
    return ask
torch.cuda.is_available = as_with_cuda(torch.cuda.is_available)
torch.accelerator.current_accelerator = lambda *a, **k: torch.device("cuda")
for name in ("_lazy_init", "init", "get_device_properties", "current_device", "synchronize"):
    setattr(torch.cuda, name, note(name))
torch.cuda.get_device_capability = note("get_device_capability", (9, 0))
for module in sys.argv[1:]:
    importlib.import_module(module)
print(*touched, *{"av"} & sys.modules.keys())
"""


def test_what_the_zygote_imports_neither_opens_the_gpu_driver_nor_loads_ffmpeg() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *PRELOAD],
        cwd=ROOT, env={**os.environ, **NO_CUDA}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # They do ask, and without these variables they would have an answer of the driver.
    assert set(done.stdout.split()) == {"asked"}


@pytest.mark.parametrize(("encoder", "zygote"), [("cpu", True), ("cuda", False)])
def test_without_a_role_on_the_cpu_there_is_no_zygote(
    write: Write, encoder: str, zygote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    roles = THREE_ROLES.replace('"\n', '"\ndevice = "cuda"\n').replace('device = "cuda"', f'device = "{encoder}"', 1)
    launcher = SupervisorProcess(load_topology(write(roles=roles)))._launcher(cores=8)
    assert bool(launcher._preload) == zygote
    assert launcher._on_gpu["OMP_NUM_THREADS"] == "8"


def test_a_role_on_a_gpu_is_a_fresh_interpreter_that_sees_it_and_no_other_role_does(write: Write) -> None:
    result, log = launch(write(), "cuda")
    assert "starting a fresh interpreter" not in log
    on_gpu, forked = (start["answer"] for start in result["seen"])
    assert (on_gpu["program"], on_gpu["gpus"]) == ("triptych.actors.supervision.component_process", "all")
    assert (forked["program"], forked["gpus"]) == ("triptych.actors.supervision.zygote", "")


@pytest.mark.parametrize(
    ("environment", "cores", "added"),
    [
        ({}, 16, {"OMP_NUM_THREADS": "16", "MKL_NUM_THREADS": "16", "OPENBLAS_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "7"}, 16, {"OPENBLAS_NUM_THREADS": "1"}),
        ({"MKL_NUM_THREADS": "7", "OPENBLAS_NUM_THREADS": "2"}, 8, {"OMP_NUM_THREADS": "8"}),
    ],
)
def test_each_process_may_use_all_cores_unless_the_user_says_otherwise(
    environment: dict[str, str], cores: int, added: dict[str, str]
) -> None:
    always = {
        "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "THP_MEM_ALLOC_ENABLE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    assert thread_environment(environment, cores) == added | always


def test_a_process_on_a_gpu_has_its_own_settings_unless_the_user_has_chosen_some() -> None:
    assert gpu_environment({}) == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }  # fmt: skip
    assert gpu_environment({"CUBLAS_WORKSPACE_CONFIG": "", "PYTORCH_ALLOC_CONF": ""}) == {}
    assert "PYTORCH_ALLOC_CONF" not in gpu_environment({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"})


def test_cores_are_counted_that_this_process_may_use(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroups / "pod" / "box").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:cpu:/old\n0::/pod/box\n")
    bound = len(os.sched_getaffinity(0))
    assert usable_cores(proc, cgroups) == bound
    (cgroups / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    assert usable_cores(proc, cgroups) == bound
    (cgroups / "pod" / "cpu.max").write_text("150000 100000\n")
    assert usable_cores(proc, cgroups) == 1
    (cgroups / "pod" / "box" / "cpu.max").write_text("20000 100000\n")
    assert usable_cores(proc, cgroups) == 1


def host(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "triptych.actors.supervision.component_process",
        f"--topology={file}",
        "--name=encoder-0",
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_start_that_can_never_succeed_is_one_line_and_exit_code_78(write: Write) -> None:
    done = host(write(), "--build=roles.nowhere:build")
    assert done.returncode == 78
    assert "roles.nowhere:build cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr
    done = host(write("[api]\nport = 0\n"))
    assert done.returncode == 78
    assert "[api] port = 0 does not fit" in done.stderr


def test_a_builder_of_other_actors_than_the_component_is_a_crash(write: Write) -> None:
    done = host(write(), "--build=tests.actors.supervision.test_launcher:build_other")
    assert done.returncode == 70
    assert "encoder-0 is built of ['another']" in done.stderr


def build_other(component: object, topology: object) -> list[object]:
    from triptych.actors import Actor

    return [Actor("another")]


def test_a_process_whose_supervisor_is_gone_does_not_begin(write: Write) -> None:
    assert os.getpid() != 1
    assert host(write(), "--build=tests.actors.supervision.probe:build", "--parent=1").returncode == 70
