"""Choose which instance restarts next while the system changes to other weights. Pure.

New jobs use the new weights as soon as an encoder has them. Jobs that were started with the old weights are finished
with them, so each stage keeps an old instance for as long as a job needs it. One instance restarts at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from triptych.engines.stages import Stage
from triptych.roles.head.job import Job
from triptych.roles.head.registry import InstanceRecord

_ORDER = [stage.value for stage in Stage]


def next_to_restart(instances: Collection[InstanceRecord], jobs: Iterable[Job], model: str) -> InstanceRecord | None:
    """Return an idle instance with other weights than `model` that no job needs; None while there is none.

    Args:
        instances: All instances.
        jobs: The active jobs.
        model: Version of the new weights.
    """
    jobs = tuple(jobs)
    busy = {job.instance for job in jobs}
    needed = [
        (job.model, _ORDER.index(job.stage.value)) for job in jobs if job.stage and job.made_with_older_weights(model)
    ]
    for instance in sorted(instances, key=_stage_index):
        if instance.model == model or instance.name in busy:
            continue
        peers = [i for i in instances if (i.kind, i.model) == (instance.kind, instance.model) and i is not instance]
        if peers or not any(model == instance.model and at <= _stage_index(instance) for model, at in needed):
            return instance
    return None


def _stage_index(instance: InstanceRecord) -> int:
    return _ORDER.index(instance.kind) if instance.kind in _ORDER else 0
