"""Decide whether requests can be served: what is missing now, and what will not be restarted. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from triptych.actors import Component
from triptych.actors.child_state import GIVEN_UP_STATES
from triptych.actors.runtime.system_messages import ChildReport
from triptych.roles.head.served_models import ServedModels
from triptych.roles.messages.stages import Hello


def unavailable_reason(components: Iterable[Component], children: Iterable[ChildReport]) -> str:
    """Return why no request can be completed until an operator acts; "" while one may be.

    Args:
        components: Components of the topology.
        children: The supervisors' reports; a component that is in none of them may still be started.
    """
    components = tuple(components)
    gone = {child.name: child.reason or child.state for child in children if child.state in GIVEN_UP_STATES}
    for kind in dict.fromkeys(component.kind for component in components if component.slots):
        of_kind = [component for component in components if component.kind == kind]
        if all(component.name in gone or component.pool in gone for component in of_kind):
            first = of_kind[0]
            if first.pool in gone:
                return f"{first.pool} is not started any more ({gone[first.pool]})"
            return f"no {kind} is started any more ({first.name}: {gone[first.name]})"
    return ""


def not_ready_reasons(
    models: ServedModels, pools_missing: Iterable[str], journal_problem: str, mismatches: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return why requests cannot be served at present, a sentence each; empty if they can.

    Args:
        models: All served models.
        pools_missing: Names of the pools that have not answered.
        journal_problem: Why the journal cannot be written, "" while it can.
        mismatches: Of instances that were refused, of `release_mismatch`.
    """
    reasons = []
    pools_missing = tuple(pools_missing)
    needs_pools = False
    for served in models.all:
        of = f" of {served.name}" if len(models.all) > 1 else ""
        registry, refused = served.scheduler.registry, served.scheduler.refused
        missing = registry.missing_stages()
        reasons += [f"no {stage}{of} is ready" for stage in missing]
        if not (missing or served.has_been_loaded):
            reasons.append(f"the weights{of} have not been loaded yet")
        reasons += [f"{i.name}: {i.problem}" for i in registry.instances.values() if i.problem]
        reasons += [weights_mismatch(name) for name in refused]
        needs_pools |= bool(registry.missing_stages(without=pools_missing))
    # Where other hosts can do all stages, the pool of one may be away.
    reasons += [f"{pool} is not ready" for pool in pools_missing if needs_pools]
    return (*reasons, *mismatches, *([journal_problem] if journal_problem else []))


def weights_mismatch(instance: str) -> str:
    """Return why an instance was refused, and the command that changes to its weights."""
    return (
        f"{instance} has other weights than the rest, because the model's files have changed: `triptych reload` takes "
        "them"
    )


def release_mismatch(instance: str, hello: Hello, *, host: str, version: str, topology: str) -> str:
    """Return why an instance cannot work with the head, "" if it can.

    Args:
        instance: Its name.
        hello: What it runs.
        host: The head's host, "" without `[[hosts]]`.
        version: The head's.
        topology: The digest of what the head has read of it.
    """
    there, here = (f" on host {name}" if name else "" for name in (hello.host, host))
    if hello.version != version:
        return (
            f"{instance}{there} runs Triptych {hello.version}, and the head{here} {version}: install the same version "
            "on all hosts"
        )
    if hello.topology != topology:
        return (
            f"{instance}{there} has read another topology ({hello.topology}) than the head{here} ({topology}): give "
            "both the same file and start them again"
        )
    return ""
