"""The transfer actor writes what a request has made to a file."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.roles.transfer_harness import FAR, W
from triptych.engines.parameters.schema import Signature
from triptych.roles.messages.common import Attempt, Output
from triptych.roles.messages.stages import (
    StageFailed,
    StageFinished,
)
from triptych.roles.messages.worker import (
    CancelAttempt,
    SaveArtifact,
)
from triptych.roles.worker import transfer as transfer_module


def test_an_image_becomes_an_artifact(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        decoder = await open_transfer("decoder-0")
        image = Image.new("RGB", (8, 8), (200, 10, 10))
        decoder.begin(W, images=[image])
        decoder.fake_instance.tell(SaveArtifact(W, Output("png"), FAR))
        artifact = (await decoder.fake_instance.inbox.next(StageFinished)).artifact
        assert (artifact.name, artifact.content_type) == ("r_0.png", "image/png")
        path = h.topology.state_dir / "artifacts" / "r_0.png"
        assert path.stat().st_size == artifact.nbytes
        assert Image.open(path).tobytes() == image.tobytes()
        decoder.begin(W, latents=torch.zeros(1))
        assert not (await decoder.fails(SaveArtifact(W, Output("png"), FAR))).retryable
        decoder.begin(W, images=[image])
        assert "bmp" in (await decoder.fails(SaveArtifact(W, Output("bmp"), FAR))).error
        decoder.begin(W, images=[image])
        failed = await decoder.fails(SaveArtifact(W, Output("mp4"), FAR))
        assert "one image" in failed.error
        assert not failed.retryable

    run_transfers(body)


def test_a_video_plays_as_fast_as_the_request_or_else_the_pipeline_says(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        decoder = await open_transfer("decoder-0")
        decoder.context.signature = Signature(medium="video", fps=12.0)
        frames = np.zeros((1, 3, 16, 16, 3), np.float32)
        for output, name, fps in ((Output(), "r_0.mp4", 12), (Output("mp4", 30.0), "r_0.mp4", 30)):
            decoder.begin(W, videos=frames)
            decoder.fake_instance.tell(SaveArtifact(W, output, FAR))
            artifact = (await decoder.fake_instance.inbox.next(StageFinished)).artifact
            assert (artifact.name, artifact.content_type) == (name, "video/mp4")
            with av.open(decoder.transfer.stores.artifacts.path(name)) as container:
                assert container.streams.video[0].average_rate == fps

    run_transfers(body)


def test_a_long_video_is_not_written_to_its_end_when_nobody_wants_it(
    run_transfers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def encode(*arguments: Any, **options: Any) -> bytes:
        writing.set()
        assert go_on.wait(10)
        return real(*arguments)

    real = transfer_module.encode
    monkeypatch.setattr(transfer_module, "encode", encode)

    async def body(h: Any, open_transfer: Any) -> None:
        decoder = await open_transfer("decoder-0")
        decoder.begin(W, videos=np.zeros((1, 3, 16, 16, 3), np.uint8))
        decoder.fake_instance.tell(SaveArtifact(W, Output("mp4"), FAR))
        await asyncio.to_thread(writing.wait, 10)
        stop = decoder.transfer._stops[W]
        decoder.fake_instance.tell(CancelAttempt(W))
        await asyncio.wait_for(stop.wait(), 10)
        go_on.set()
        assert (await decoder.fake_instance.inbox.next(StageFailed)).error == "cancelled"
        assert not decoder.transfer.stores.artifacts.files.folder.exists()

    run_transfers(body)


def test_a_full_disk_is_waited_for_and_said_and_another_trouble_is_not(
    run_transfers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        trouble, fsync = [errno.ENOSPC], os.fsync

        def unable(descriptor: int) -> None:
            if trouble:
                raise OSError(trouble[0], os.strerror(trouble[0]))
            fsync(descriptor)

        decoder = await open_transfer("decoder-0")
        monkeypatch.setattr(os, "fsync", unable)
        context, others = decoder.context, [Attempt("r/1", 1), Attempt("r/2", 1)]
        for attempt in (W, *others):
            decoder.begin(attempt, images=[Image.new("RGB", (8, 8))])
            decoder.fake_instance.tell(
                SaveArtifact(attempt, Output("png"), time.monotonic() if attempt is others[1] else FAR)
            )
        assert "No space left" in (await decoder.fake_instance.inbox.next(StageFailed)).error, "its time is over"
        while decoder.transfer.stats()["waiting_for_store"] != 2:  # noqa: ASYNC110  facts are looked at, not sent
            await asyncio.sleep(0)
        assert "waiting for" in context.trouble
        decoder.fake_instance.tell(CancelAttempt(others[0]))
        assert (await decoder.fake_instance.inbox.next(StageFailed)).error == "cancelled"
        assert context.trouble
        trouble.clear()
        assert (await decoder.fake_instance.inbox.next(StageFinished)).artifact.name == "r_0.png"
        assert not context.trouble
        assert [path.name for path in decoder.transfer.stores.artifacts.files.folder.iterdir()] == ["r_0.png"]
        trouble.append(errno.EIO)
        failed = await decoder.fails(SaveArtifact(W, Output("png"), FAR))
        assert "Input/output error" in failed.error
        assert failed.retryable

    run_transfers(body)
