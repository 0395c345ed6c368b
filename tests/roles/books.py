"""Small requests, instances and reports for tests of the ledger."""

from __future__ import annotations

from engines.parameters import Signature
from roles.dispatch import POLICIES
from roles.effects import Effect
from roles.ledger import Ledger, Request
from roles.messages.stages import InstanceHello, StageFailed, StageFinished, TransferStaged
from roles.messages.work import Artifact, LeaseRef, Output, Staged, Work
from roles.request import Unit

KINDS = ("encoder", "denoiser", "decoder")


def ledger(**options: float) -> Ledger:
    return Ledger(POLICIES["round_robin"], **options)  # type: ignore[arg-type]


def request(id_: str = "r", n: int = 1, *, deadline: float = 1e9, at: float = 0.0) -> Request:
    units = [Unit(f"{id_}/{k}", id_, k, k, deadline) for k in range(n)]
    return Request(id_, {"prompt": "x"}, Output("png"), at, deadline, units)


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
        signature=Signature(),
        running=running,
    )


def a_slot(lease_id: int, pool_generation: int = 1) -> Staged:
    return Staged(LeaseRef("pool", pool_generation, lease_id, 0, 64), b"", 0, 64)


def staged(work: Work, panel: str, lease_id: int, issued: int = 99) -> TransferStaged:
    return TransferStaged(work, f"{panel}-0", panel, a_slot(lease_id), 0.5, issued)


def finished(work: Work, name: str = "decoder-0") -> StageFinished:
    return StageFinished(work, name, "decoder", Artifact("r-0.png", "image/png", 10), 0.1, 99)


def failed(work: Work, error: str, *, retryable: bool) -> StageFailed:
    return StageFailed(work, "denoiser-0", "denoiser", error, retryable, 99)


def after(books: Ledger, now: float = 1.0) -> list[Effect]:
    books.dispatch(now)
    return books.take_effects()
