"""A small fake head on a real mailbox, and the application in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import pytest
from PIL import Image

from tests.contract import Contract
from triptych.actors import AddressBook, Incarnation, load_topology
from triptych.actors.runtime.runtime import Runtime
from triptych.api.app import ROUTES, make_app
from triptych.api.body_limiter import BodyLimiter
from triptych.api.cluster_observer import ClusterObserver
from triptych.api.head_client import HeadClient
from triptych.api.openapi import document
from triptych.api.server import build
from triptych.api.services import Services
from triptych.api.uploads import UploadService
from triptych.api.video_variants import VideoVariants
from triptych.bus import Delivery, Mailbox, Outbox
from triptych.engines.parameters.schema import Parameter, ParameterKind, Task
from triptych.engines.parameters.serving_config import ParameterError
from triptych.roles.head.admission import seeds_of
from triptych.roles.media.artifacts import ArtifactStore
from triptych.roles.media.files import LocalFiles
from triptych.roles.media.formats import FORMATS
from triptych.roles.media.uploads import UPLOADS, UploadStore
from triptych.roles.messages import requests as wire

BOUND_S = 10.0
CONTRACT = Contract(document(ROUTES, keyed=True))
MESSAGES = (
    wire.SubmitRequest,
    wire.WaitRequest,
    wire.QueryRequest,
    wire.CancelRequest,
    wire.DeleteRequest,
    wire.ListRequests,
    wire.DescribeModel,
    wire.ListModels,
    wire.ClusterQuery,
)


@pytest.fixture
def anyio_backend():
    return "asyncio", {"use_uvloop": True}


def stored_format(submit: wire.SubmitRequest) -> str:
    """The fake head knows images and videos alone."""
    return submit.output.format if submit.output.format in ("png", "jpeg", "webp", "mp4") else "png"


def stored_file(submit: wire.SubmitRequest, colour: int) -> bytes:
    if stored_format(submit) == "mp4":
        from tests.video_files import film  # imports FFmpeg

        return film()
    image = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(image, stored_format(submit))
    return image.getvalue()


@dataclass
class StoredRequest:
    """What the fake head keeps of a request."""

    submit: wire.SubmitRequest
    state: str = "DENOISING_RUNNING"
    causes: tuple[str, ...] = ()
    at_fault: bool = False
    reason: str = ""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    created_at: float = field(default_factory=time.time)


class FakeHead:
    """Speaks the client conversation; the test decides when and how a request ends."""

    def __init__(self, address: str, store: ArtifactStore) -> None:
        self.address = address
        self.store = store
        self.generation = 0
        self.journal: dict[str, StoredRequest] = {}
        self.previews: tuple[int, ...] = ()
        """Steps of the partial images of every job."""
        self.seen: list[object] = []
        self.rejection: wire.RequestRejected | None = None
        self.hold = False
        self.description = DESCRIPTION
        self.steps = (2, 4)
        self.unresponsive = False
        self.failures: dict[type, list[str]] = {}
        """Codes with which the next messages of a type are refused."""
        self.ready = True
        self.reasons: tuple[str, ...] = ()
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._mailbox: Mailbox | None = None

    async def start(self) -> None:
        self.generation += 1
        mailbox = Mailbox("head", self.address, MESSAGES, generation=self.generation)
        await mailbox.start()
        self._mailbox = mailbox
        self._run(self._serve(mailbox))

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None

    async def received(self, kind: type, count: int = 1) -> list[object]:
        """Wait until that many messages of this kind have come."""

        def found() -> list[object]:
            return [message for message in self.seen if isinstance(message, kind)]

        async with asyncio.timeout(BOUND_S), self._news:
            await self._news.wait_for(lambda: len(found()) >= count)
        return found()

    def finish(
        self, request_id: str, state: str = "DONE", causes: tuple[str, ...] = (), *, at_fault: bool = False
    ) -> None:
        accepted = self.journal[request_id]
        accepted.state, accepted.causes, accepted.at_fault = state, causes, at_fault
        if state == "DONE":
            for index in range(accepted.submit.n):
                colour = seeds_of(accepted.submit.seed, accepted.submit.n)[index] % 256
                data = stored_file(accepted.submit, colour)
                self.store.save(f"{request_id}/{index}", stored_format(accepted.submit), data)
        accepted.ended.set()

    def _run(self, coroutine) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, mailbox: Mailbox) -> None:
        while True:
            delivery = await mailbox.receive()
            self.seen.append(delivery.message)
            async with self._news:
                self._news.notify_all()
            if not self.unresponsive:
                self._run(self._answer(delivery))

    async def _answer(self, delivery: Delivery) -> None:
        if codes := self.failures.get(type(delivery.message)):
            delivery.fail(codes.pop(0), "the test says so")
            return
        match delivery.message:
            case wire.SubmitRequest() as message:
                answer = self._submit(message)
                if message.wants_view and isinstance(answer, wire.RequestAccepted):
                    answer = msgspec.structs.replace(answer, view=self.view(answer.request_id))
                delivery.reply(answer)
            case wire.DescribeModel(model) if model not in ("", self.description.name):
                delivery.fail("model_not_found", f"the model {model!r} is not served here")
            case wire.DescribeModel():
                delivery.reply(self.description)
            case wire.ListModels():
                delivery.reply(wire.ModelDescriptions((self.description,)))
            case wire.ClusterQuery():
                delivery.reply(self._cluster())
            case wire.ListRequests() as message:
                self._list(delivery, message)
            case wire.DeleteRequest() as message:
                self._delete(delivery, message)
            case message:
                await self._tell(delivery, message)

    async def _tell(self, delivery: Delivery, message) -> None:
        match message:
            case message if not self._finds(message):
                delivery.fail("not_found", f"no such request: {message.request_id}")
            case wire.WaitRequest(request_id, timeout_s):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.journal[request_id].ended.wait(), timeout_s)
                view = self.view(request_id)
                brief = bool(message.revision) and not view.terminal
                delivery.reply(msgspec.structs.replace(view, inputs={}) if brief else view)
            case wire.QueryRequest(request_id):
                delivery.reply(self.view(request_id))
            case wire.CancelRequest(request_id):
                if not self.journal[request_id].ended.is_set():
                    self.finish(request_id, "CANCELLED")
                delivery.reply(self.view(request_id))

    def _delete(self, delivery: Delivery, message: wire.DeleteRequest) -> None:
        existed = self._finds(message)
        if existed:
            for index in range(self.journal[message.request_id].submit.n):
                self.store.discard(f"{message.request_id}/{index}")
            del self.journal[message.request_id]
        delivery.reply(wire.RequestDeleted(existed))

    def _list(self, delivery: Delivery, message: wire.ListRequests) -> None:
        ids = [
            id_
            for id_, accepted in self.journal.items()
            if message.owner in ("", accepted.submit.owner)
            and message.active is not accepted.ended.is_set()
            and message.output_format in ("", accepted.submit.output.format)
        ]
        ids = ids[::-1] if message.newest_first else ids
        if message.after and message.after not in ids:
            delivery.fail("not_found", f"there is no request {message.after}")
            return
        rest = ids[ids.index(message.after) + 1 :] if message.after else ids
        delivery.reply(wire.RequestList(tuple(rest[: message.limit]), len(rest) > message.limit))

    def _finds(self, message) -> bool:
        accepted = self.journal.get(message.request_id)
        return accepted is not None and message.owner in ("", accepted.submit.owner)

    def _submit(self, message: wire.SubmitRequest) -> wire.RequestAccepted | wire.RequestRejected:
        if self.rejection is not None:
            return self.rejection
        if message.model not in ("", self.description.name):
            return wire.RequestRejected(
                "model_not_found", f"the model {message.model!r} is not served here", param="model"
            )
        try:
            seeds_of(message.seed, message.n)
        except ParameterError as error:
            return wire.RequestRejected("invalid", error.message, error.param)
        for request_id, accepted in self.journal.items():
            known = accepted.submit
            if (known.owner, known.idempotency_key) == (message.owner, message.idempotency_key):
                if (known.inputs, known.seed, known.n) != (message.inputs, message.seed, message.n):
                    return wire.RequestRejected("conflict", "another body came under this key")
                return wire.RequestAccepted(request_id, self.description.version)
        self.journal[message.request_id] = StoredRequest(message)
        if not self.hold:
            self.finish(message.request_id)
        return wire.RequestAccepted(message.request_id, self.description.version)

    def _cluster(self) -> wire.ClusterView:
        instance = wire.InstanceView("denoiser-0", "denoiser", 7, 1, 2, ("req_1/0",))
        return wire.ClusterView(self.ready, self.reasons, (instance,), {"DENOISING_RUNNING": 1}, 3, 0.5)

    def view(self, request_id: str) -> wire.RequestView:
        accepted = self.journal[request_id]
        submit, terminal = accepted.submit, accepted.ended.is_set()
        units = tuple(self._job(accepted, index) for index in range(submit.n))
        return wire.RequestView(
            request_id=request_id,
            state=accepted.state,
            terminal=terminal,
            created_at=accepted.created_at,
            finished_at=time.time() if terminal else 0.0,
            inputs=submit.inputs,
            output=submit.output,
            units=units[::-1],
            model=self.description.name,
            revision="-".join(f"{len(job.history)}.{job.step}.{len(job.previews)}" for job in units[::-1]),
            remixed_from=submit.remixed_from,
        )

    def _job(self, accepted: StoredRequest, index: int) -> wire.JobView:
        submit = accepted.submit
        name = f"{submit.request_id}_{index}.{stored_format(submit)}"
        done = accepted.state == "DONE"
        return wire.JobView(
            index=index,
            seed=seeds_of(submit.seed, submit.n)[index],
            state=accepted.state,
            attempts=1 + len(accepted.causes),
            step=self.steps[0],
            total_steps=self.steps[1],
            history=(
                wire.Transition("PENDING", accepted.created_at),
                wire.Transition(accepted.state, time.time(), accepted.reason),
            ),
            instances={"denoiser": "denoiser-0"},
            stage_seconds={"denoiser": 0.25},
            causes=accepted.causes,
            artifact=wire.Artifact(name, FORMATS[stored_format(submit)].content_type, 1) if done else None,
            at_fault=accepted.at_fault,
            previews=tuple(
                wire.PreviewView(step, wire.Artifact(f"{submit.request_id}_{index}.{step}.png", "image/png", 1))
                for step in self.previews
            ),
        )


DESCRIPTION = wire.ModelDescription(
    name="tiny/shapes",
    family="stable-diffusion-xl",
    task="any",
    tasks=(
        Task("text2image", ("prompt",), ("prompt",)),
        Task("video2image", ("prompt", "video"), ("prompt", "video")),
    ),
    dtype="float32",
    created_at=1_700_000_000.5,
    defaults={"height": 64, "num_inference_steps": 4},
    ranges={"height": (64.0, 128.0, 8.0), "true_cfg_scale": (0.0, 100.0)},
    parameters=(
        Parameter("height", ParameterKind.INTEGER, 64, description="In pixels."),
        Parameter("prompt", ParameterKind.TEXT, required=True),
        Parameter("sigmas", ParameterKind.NUMBERS, (1.0, 0.5)),
        Parameter("true_cfg_scale", ParameterKind.NUMBER, alias_of="guidance_scale"),
        Parameter("video", ParameterKind.IMAGE_LIST),
    ),
    medium="image",
    fps=0.0,
)


@pytest.fixture
def topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # a socket's path has at most 107 bytes, tmp_path may be longer
    monkeypatch.setenv("XDG_RUNTIME_DIR", run)
    monkeypatch.setenv("TRIPTYCH_STATE_DIR", str(tmp_path / "state"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = tmp_path / "small.toml"
    file.write_text(
        f'[model]\npath = "model"\n[api]\nport = {port}\n[supervision]\nshutdown_s = 2.0\n'
        + "".join(f'[[roles]]\nkind = "{kind}"\n' for kind in ("encoder", "denoiser", "decoder"))
    )
    yield load_topology(file)
    shutil.rmtree(run)


@pytest.fixture
def store(topology) -> ArtifactStore:
    return ArtifactStore(LocalFiles(topology.state_dir / "artifacts"))


@pytest.fixture
def uploads(topology) -> UploadStore:
    return UploadStore(LocalFiles(topology.state_dir / UPLOADS))


@pytest.fixture
async def fake_head(topology, store):
    head = FakeHead(AddressBook(topology).address("head"), store)
    await head.start()
    yield head
    await head.stop()


@pytest.fixture
async def outbox():
    outbox = Outbox("api", 1)
    yield outbox
    outbox.close()


@pytest.fixture
async def services(topology, outbox, store, uploads) -> Services:
    address_book = AddressBook(topology)

    def reference(name: str):
        return outbox.reference(name, address_book.address(name))

    head = HeadClient(reference("head"), patience_s=BOUND_S)
    cluster = ClusterObserver(topology, address_book, reference)
    variants = VideoVariants(store)
    return Services(topology, head, cluster, store, UploadService(uploads), variants, BodyLimiter(), asyncio.Event())


@pytest.fixture
async def impatient(services):
    """For tests of a head that does not answer: others wait for it as long as it takes on a busy machine."""
    services.head.patience_s = 0.3


@pytest.fixture
async def app(services):
    return make_app(services)


@pytest.fixture
async def client(app):
    """In this process, without a socket; a crash is an answer here, as it is to a client.

    Every answer is held against the OpenAPI document.
    """
    transport, hooks = httpx.ASGITransport(app, raise_app_exceptions=False), {"response": [CONTRACT.check]}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1", timeout=BOUND_S, event_hooks=hooks
    ) as client:
        yield client


@pytest.fixture
async def runtime(topology):
    """The api's process but for the process: enter it to start."""
    component = topology.component("api")
    shutdown_s = topology.supervision.shutdown_s
    return Runtime(build(component, topology), Incarnation(AddressBook(topology), 1, kind="api"), shutdown_s=shutdown_s)


@pytest.fixture
async def remote(topology):
    """A client over a socket."""
    async with httpx.AsyncClient(base_url=topology.url, timeout=BOUND_S) as client:
        yield client
