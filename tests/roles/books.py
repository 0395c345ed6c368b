"""Small requests, instances and reports for tests of the ledger."""

from __future__ import annotations

from pathlib import Path

from triptych.actors import Model
from triptych.actors.sections import ModelSection, RoleSection
from triptych.engines.panels import Panel
from triptych.engines.parameters import Kind, Parameter, Signature
from triptych.roles.dispatch import POLICIES
from triptych.roles.effects import Effect
from triptych.roles.ledger import Ledger
from triptych.roles.messages.stages import InstanceHello, StageFailed, StageFinished, TransferStaged
from triptych.roles.messages.work import Artifact, Input, LeaseRef, Output, Staged, Work
from triptych.roles.models import Models, Served
from triptych.roles.prompt_cache import PromptCache
from triptych.roles.request import Request, Unit
from triptych.roles.staging import Staging

KINDS = ("encoder", "denoiser", "decoder")


SIGNATURE = Signature(
    (Parameter("num_inference_steps", Kind.INTEGER), Parameter("prompt", Kind.TEXT)), encodes=("prompt",)
)


def ledger(*, cache: int = 0, **options: float) -> Ledger:
    return Ledger(POLICIES["round_robin"], staging=Staging(PromptCache(cache, "tiny")), **options)  # type: ignore[arg-type]


def one_model(books: Ledger) -> Models:
    """A system with the one model that these books are of."""
    section = ModelSection(path="m", roles=tuple(RoleSection(kind=kind) for kind in KINDS))  # type: ignore[arg-type]
    served = Served(Model(section=section, folder=Path("/")), books)
    return Models((served,), {f"{kind}-{k}": served for kind in KINDS for k in range(9)})


def request(
    id_: str = "r", n: int = 1, *, deadline: float = 1e9, at: float = 0.0, seed: int = 0, **inputs: Input
) -> Request:
    units = [Unit(f"{id_}/{k}", id_, k, seed + k, deadline) for k in range(n)]
    return Request(id_, {"prompt": "x", **inputs}, Output("png"), at, deadline, units)


def hello(name: str, *, generation: int = 1, slots: int = 1, running: tuple[Work, ...] = ()) -> InstanceHello:
    kind = name.partition("-")[0]
    return InstanceHello(
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
    )


def a_slot(lease_id: int, pool_generation: int = 1) -> Staged:
    return Staged(LeaseRef("pool", pool_generation, lease_id, 0, 64), b"", 0, 64)


def staged(work: Work, panel: str, lease_id: int, issued: int = 99, *, seedless: bool = False) -> TransferStaged:
    return TransferStaged(work, f"{panel}-0", Panel(panel), a_slot(lease_id), 0.5, issued, seedless)


def finished(work: Work, name: str = "decoder-0") -> StageFinished:
    return StageFinished(work, name, Panel.DECODER, Artifact("r-0.png", "image/png", 10), 0.1, 99)


def failed(work: Work, error: str, *, retryable: bool) -> StageFailed:
    return StageFailed(work, "denoiser-0", Panel.DENOISER, error, retryable, 99, not retryable)


def after(books: Ledger, now: float = 1.0) -> list[Effect]:
    books.dispatch(now)
    return books.take_effects()
