"""What the instance that writes a file is told of what the file is made from."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.roles.factories import after, make_scheduler, registration, request, stored
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Provenance
from triptych.roles.messages.stages import StageAssign, TransferPush


@pytest.mark.parametrize("metadata", [True, False, None])
def test_the_decoder_alone_is_told_unless_there_is_to_be_no_metadata(metadata: bool | None) -> None:
    scheduler = make_scheduler()
    for name in ("encoder-0", "denoiser-0", "decoder-0"):
        scheduler.register(registration(name), 0.0)
    asked = request(seed=7, height=64)
    asked.output = replace(asked.output, metadata=metadata)
    scheduler.accept(asked, 0.0)
    (job,) = scheduler.jobs.values()
    told: dict[str, Provenance | None] = {}
    for lease, kind in enumerate(("encoder", "denoiser", "decoder")):
        after(scheduler)
        attempt, name = job.current_attempt, f"{kind}-0"
        message = scheduler.message_for(attempt, scheduler.source_of(attempt, name), None, "shapes")
        if isinstance(message, StageAssign):
            assert message.model == "shapes", "a monolithic instance has the rest"
        else:
            assert isinstance(message, TransferPush)
            told[kind] = message.provenance
            scheduler.started(attempt, name, Stage(kind), 1.0)
        if kind != "decoder":
            scheduler.stored(name, stored(attempt, kind, lease), 2.0)
    made = Provenance("shapes", {"prompt": "x", "height": 64}, 7)
    assert told == {"denoiser": None, "decoder": made if metadata else None}
