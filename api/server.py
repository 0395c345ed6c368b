"""The API as an actor: uvicorn in the actor's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import cast

import uvicorn

from triptych.actors import Actor, Component, DeferredReply, StartDelayedError, StartError, Topology
from triptych.actors.child_state import ChildState
from triptych.api.app import make_app
from triptych.api.body_limiter import BodyLimiter
from triptych.api.cluster_observer import ClusterObserver
from triptych.api.connections import ConnectionLimits, LimitedProtocol, connection_limit, raise_file_limit
from triptych.api.head_client import ASK_AGAIN_S, HeadClient
from triptych.api.keys import ApiKeys, ApiKeysError, load_api_keys
from triptych.api.services import Services
from triptych.api.store import StoreService
from triptych.api.uploads import UploadService
from triptych.api.video_variants import VideoVariants
from triptych.api.webhook_keys import WebhookKeys, load_webhook_keys
from triptych.api.webhooks import WebhookSender
from triptych.bus import BusError
from triptych.roles.media.artifacts import ARTIFACTS, ArtifactStore
from triptych.roles.media.files import Files
from triptych.roles.media.location import store_files, upload_bounds
from triptych.roles.media.uploads import UPLOADS, UploadStore
from triptych.roles.messages.requests import ClusterQuery, ClusterView
from triptych.roles.messages.store import ArtifactPartStored, GetUploadPart, PutArtifactPart, UploadPart
from triptych.roles.trace_exporter import TraceExporter, exporter_of

HEAD_PING_TIMEOUT_S = 2.0
"""Of one ping to a head that may not be there yet."""
PRUNE_EVERY_S = 600.0
DRAIN_SHARE = 0.7
ABORT_SHARE = 0.2
"""Shares of `shutdown_s`: for requests to finish, and for telling the others that they did not."""


class ApiServer(Actor):
    """Serves HTTP from the moment that the head answers until it is told to stop."""

    mailbox_capacity = 64
    """Messages may be as large as the bus allows: they have parts of files."""

    def __init__(self, name: str, topology: Topology, exporter: TraceExporter | None = None) -> None:
        super().__init__(name)
        self._exporter = exporter
        self.topology = topology
        self._store = StoreService(topology.state_dir / ARTIFACTS, topology.state_dir / UPLOADS)
        self._stopping = asyncio.Event()
        self._server: Server | None = None
        self._limits = ConnectionLimits(topology.api.max_connections)
        self._serving: asyncio.Task[None] | None = None

    async def started(self) -> None:
        """Wait for the head, then listen.

        Raises StartDelayedError when the port is taken, StartError when the keys cannot be read.
        """
        keys, webhook_keys = read_api_keys(self.topology), read_webhook_keys(self.topology)
        head = HeadClient(self.reference("head"))
        await self._wait_for(head)
        self._limits.limit = self._connection_limit()
        listener = listen(self.topology.api.host, self.topology.api.port)
        artifact_files, upload_files = await self._open_stores()
        bounds, needed_s = upload_bounds(self.topology)
        uploads = UploadStore(upload_files, bounds, needed_s=needed_s)
        artifacts = ArtifactStore(artifact_files)
        services = Services(
            self.topology,
            head,
            ClusterObserver(self.topology, self.address_book, self.reference),
            artifacts,
            UploadService(uploads),
            VideoVariants(artifacts),
            BodyLimiter(),
            self._stopping,
            webhook_keys,
            exporter=self._exporter,
        )
        self._server = Server(
            uvicorn.Config(
                make_app(services, keys),
                http=cast(type[asyncio.Protocol], partial(LimitedProtocol, limits=self._limits)),
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
            )
        )
        self._serving = self.spawn(self._server.serve(sockets=[listener]), name="http")
        self.spawn(self._prune(uploads), name="prune")
        if self.topology.webhooks.hosts:
            self.spawn(WebhookSender(self.topology, head, webhook_keys).run(), name="webhooks")
        self.log.info("listening", url=self.topology.url)

    async def stopping(self) -> None:
        """Close the port and finish what runs; what cannot finish in time is answered 503 before the end."""
        if self._server is None or self._serving is None:
            return
        self._server.should_exit = True
        shutdown_s = self.topology.supervision.shutdown_s
        _, unfinished = await asyncio.wait({self._serving}, timeout=shutdown_s * DRAIN_SHARE)
        self._stopping.set()
        if unfinished:
            _, unfinished = await asyncio.wait({self._serving}, timeout=shutdown_s * ABORT_SHARE)
        self._server.force_exit = bool(unfinished)  # a client does not read its answer

    async def put_artifact_part(self, message: PutArtifactPart) -> DeferredReply[ArtifactPartStored]:
        """Keep a part of an artifact that a decoder on another host has made."""
        return DeferredReply(self._store.put(message))

    async def get_upload_part(self, message: GetUploadPart) -> DeferredReply[UploadPart]:
        """Read a part of an upload that an encoder on another host lacks."""
        return DeferredReply(self._store.get(message))

    def stats(self) -> dict[str, int | float | str | bool]:
        """Return where it listens, and how many HTTP requests and connections are open."""
        state = self._server.server_state if self._server else None
        return {
            "url": self.topology.url,
            "requests": len(state.tasks) if state else 0,
            "connections": len(state.connections) if state else 0,
            "refused_connections": self._limits.refused,
            "received_bytes": self._store.received_bytes,
            "sent_bytes": self._store.sent_bytes,
        }

    def _connection_limit(self) -> int:
        files, wanted = raise_file_limit(), self.topology.api.max_connections
        most = connection_limit(wanted, files)
        if most < wanted:
            self.log.warning("fewer connections than max_connections", most=most, open_files=files)
        return most

    async def _open_stores(self) -> tuple[Files, Files]:
        """Return what keeps artifacts and uploads, which is there and writable; raises StartDelayedError."""
        artifacts, uploads = store_files(self.topology, ARTIFACTS), store_files(self.topology, UPLOADS)
        try:
            for files in (artifacts, uploads):
                await asyncio.to_thread(files.prepare)
        except OSError as error:
            raise StartDelayedError(f"files cannot be kept in {files.location}: {error}") from error
        return artifacts, uploads

    async def _prune(self, uploads: UploadStore) -> None:
        """Remove uploads that no request can need any more, again and again."""
        while True:
            try:
                gone = await asyncio.to_thread(uploads.prune, now=time.time())
            except OSError as error:  # what is left is tried again the next time
                self.log.warning("uploads not pruned", error=str(error))
            else:
                if gone:
                    self.log.info("uploads pruned", count=gone)
            await asyncio.sleep(PRUNE_EVERY_S)

    async def _wait_for(self, head: HeadClient) -> None:
        self.set_state(ChildState.LOADING, "waiting for the head")
        while True:
            try:
                await head.reference.ask(ClusterQuery(), ClusterView, timeout_s=HEAD_PING_TIMEOUT_S)
            except BusError as error:
                self.log.info("waiting for the head", reason=str(error))
                await asyncio.sleep(ASK_AGAIN_S)
            else:
                return


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process handles SIGTERM, and calls `stopping`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; raises StartDelayedError for a port that is taken, StartError for a wrong address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartDelayedError(
                f"port {port} on {host} is in use: stop what listens there (`ss -ltnp 'sport = :{port}'`) "
                "or set another [api] port"
            ) from None
        raise StartError(
            f"cannot listen on {host} port {port} ({error.strerror}): set [api] host and port to an "
            "address of this machine and a port that this user may open"
        ) from error


def read_api_keys(topology: Topology) -> ApiKeys | None:
    """Read the keys of clients, None where there are to be none; raises StartError."""
    if topology.keys_path is None:
        return None
    try:
        return load_api_keys(topology.keys_path)
    except ApiKeysError as error:
        raise StartError(f"[api] keys_file {topology.keys_path} {error}") from error


def read_webhook_keys(topology: Topology) -> WebhookKeys:
    """Read the secrets that sign webhooks; raises StartError."""
    if topology.webhook_keys_path is None:
        return WebhookKeys({})
    try:
        return load_webhook_keys(topology.webhook_keys_path)
    except ApiKeysError as error:
        raise StartError(f"[webhooks] keys_file {topology.webhook_keys_path} {error}") from error


def build(component: Component, topology: Topology) -> list[Actor]:
    """Make the actors of the api process."""
    exporter = exporter_of(component, topology)
    return [ApiServer(component.name, topology, exporter), *([exporter] if exporter else [])]
