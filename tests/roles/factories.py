"""Small requests, instances and reports for tests of the scheduler."""

from __future__ import annotations

from pathlib import Path

from triptych.actors import Model
from triptych.actors.topology import ModelSection, RoleSection
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.engines.stages import Stage
from triptych.roles.head.dispatch import POLICIES, DispatchPolicy
from triptych.roles.head.effects import Effect
from triptych.roles.head.job import Job, Request
from triptych.roles.head.prompt_cache import PromptCache
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.head.served_models import ServedModel, ServedModels
from triptych.roles.messages.common import Artifact, Attempt, Input, LeaseRef, Output, StoredPayload
from triptych.roles.messages.stages import RegisterInstance, StageFailed, StageFinished, StageOutputsStored

KINDS = ("encoder", "denoiser", "decoder")


SIGNATURE = Signature(
    (Parameter("num_inference_steps", ParameterKind.INTEGER), Parameter("prompt", ParameterKind.TEXT)),
    encodes=("prompt",),
)


def make_scheduler(
    *, cache: int = 0, dispatch_policy: DispatchPolicy = POLICIES["round_robin"], **options: float | str
) -> JobScheduler:
    scheduler = JobScheduler(dispatch_policy, **options)  # type: ignore[arg-type]
    scheduler.stored_outputs.cache = PromptCache(cache, "tiny")
    return scheduler


def single_model(scheduler: JobScheduler) -> ServedModels:
    """A system with the one model that this scheduler is of."""
    section = ModelSection(path="m", roles=tuple(RoleSection(kind=kind) for kind in KINDS))  # type: ignore[arg-type]
    served = ServedModel(Model(section=section, folder=Path("/")), scheduler)
    return ServedModels((served,), {f"{kind}-{k}": served for kind in KINDS for k in range(9)})


def request(
    id_: str = "r", n: int = 1, *, timeout_s: float = 1e9, at: float = 0.0, seed: int = 0, **inputs: Input
) -> Request:
    jobs = [Job(f"{id_}/{k}", id_, k, seed + k, timeout_s) for k in range(n)]
    return Request(id_, {"prompt": "x", **inputs}, Output("png"), at, at + timeout_s, jobs)


def scheduled(
    id_: str, *, priority: int = 0, deadline_s: float = 0.0, steps: int = 0, owner: str = "", n: int = 1
) -> Request:
    """A request with what a scheduling policy goes by."""
    made = request(id_, n, timeout_s=600.0)
    made.priority, made.deadline_s, made.steps, made.owner = priority, deadline_s, steps, owner
    return made


def registration(
    name: str, *, generation: int = 1, slots: int = 1, running: tuple[Attempt, ...] = (), max_batch: int = 1
) -> RegisterInstance:
    kind = name.partition("-")[0]
    return RegisterInstance(
        name,
        kind,
        generation,
        1,
        slots,
        issued=slots,
        taken=len(running),
        pool="pool",
        signature=SIGNATURE,
        running=running,
        max_batch=max_batch,
        stores_checkpoints=kind == "denoiser",
    )


def a_block(lease_id: int, pool_generation: int = 1) -> StoredPayload:
    return StoredPayload(LeaseRef("pool", pool_generation, lease_id, 0, 64), b"", 0, 64)


def stored(
    attempt: Attempt, stage: str, lease_id: int, issued: int = 99, *, seed_independent: bool = False
) -> StageOutputsStored:
    return StageOutputsStored(attempt, Stage(stage), a_block(lease_id), 0.5, issued, seed_independent)


def finished(attempt: Attempt) -> StageFinished:
    return StageFinished(attempt, Stage.DECODER, Artifact("r-0.png", "image/png", 10), 0.1, 99)


def failed(attempt: Attempt, error: str, *, retryable: bool) -> StageFailed:
    return StageFailed(attempt, Stage.DENOISER, error, retryable, 99, not retryable)


def after(scheduler: JobScheduler, now: float = 1.0) -> list[Effect]:
    scheduler.dispatch(now)
    return scheduler.take_effects()
