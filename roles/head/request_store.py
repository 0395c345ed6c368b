"""The accepted requests of the head: write, find, await, list, delete and prune them.

The schedulers decide about their jobs. The store writes the decisions to the journal, and answers clients once they are
on the disk, so that a restarted head answers the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final, TypeAlias

from triptych.actors import Actor, Topology
from triptych.actors.topology import parse_size
from triptych.bus import RefusedError
from triptych.engines.parameters.lora import check_lora
from triptych.engines.parameters.serving_config import ParameterError
from triptych.roles.head.admission import digest, idempotency_key, limits_of, make_request, request_id_error
from triptych.roles.head.job import Request
from triptych.roles.head.journal import Journal, JournalError, prune
from triptych.roles.head.served_models import ServedModel, ServedModels
from triptych.roles.head.webhooks import WebhookQueue
from triptych.roles.media.artifacts import ARTIFACTS, ArtifactError, ArtifactStore
from triptych.roles.media.location import store_files
from triptych.roles.media.retention import StoreBounds
from triptych.roles.media.uploads import UPLOADS, UploadStore
from triptych.roles.messages import requests
from triptych.roles.messages.common import Attempt, Upload, uploads_of
from triptych.roles.messages.webhooks import TakeWebhooks, WebhookRecorded, WebhooksDue, WebhookTried
from triptych.roles.previews import denoise_of, preview_id

ByRequestId: TypeAlias = requests.QueryRequest | requests.WaitRequest | requests.CancelRequest | requests.DeleteRequest
"""Messages about an accepted request."""
SubmitAnswer: TypeAlias = requests.RequestAccepted | requests.RequestRejected

OTHER_MODEL: Final = "it was accepted for another model than the one that is served now: send it again"
RETRY_WRITE_S: Final = 5.0
"""Seconds after which a client may retry when the journal cannot be written."""
MAX_REMOVALS: Final = 2
"""Threads that remove files at a time: a bucket that does not answer must not keep the journal from being written."""
RESTARTED_S: Final = 60.0
"""Seconds after which a client may retry when an operator has to restart the server."""


class RequestStore:
    """All requests of the head, active and ended.

    Args:
        actor: Runs the background tasks.
        topology: Has the paths, limits and retention times.
        models: The served models.
    """

    def __init__(self, actor: Actor, topology: Topology, models: ServedModels) -> None:
        self.journal_problem = ""
        """Why the journal cannot be written, a sentence; "" while it can."""
        self._actor = actor
        self._topology = topology
        self._models = models
        self._limits = limits_of(topology)
        self._journal_path = topology.state_dir / "journal.sqlite"
        self._journal: Journal | None = None
        self._webhooks: WebhookQueue | None = None
        self._artifacts = ArtifactStore(store_files(topology, ARTIFACTS))
        self._uploads = UploadStore(store_files(topology, UPLOADS))
        self._ended: dict[str, asyncio.Event] = {}
        """Events for the waiters of requests, by request id."""
        self._changed: dict[str, asyncio.Event] = {}
        """Events for those who wait for the next change of a request, by request id."""
        self._unnotified: list[str] = []
        """Ids of ended requests whose waiters were not notified yet."""
        self._accepted: dict[str, tuple[Request, ServedModel]] = {}
        """Requests that are not in the journal yet, by id; their clients were not answered."""
        self._writes = self._synced_writes = 0
        """Number of transactions of the journal, and of those that are on the disk."""
        self._syncing: asyncio.Task[None] | None = None
        """The `sync` that runs now."""
        self._removing = asyncio.Semaphore(MAX_REMOVALS)

    # -- start and end

    async def open(self) -> None:
        """Open the journal and resume the active requests of an earlier head.

        Raises:
            JournalError: It is corrupt, of a newer version, or locked, or the disk is full.
        """
        # In a thread, so that heartbeats go on while a large journal is opened.
        self._journal = await asyncio.to_thread(Journal, self._journal_path, self._log_damage)
        self._webhooks = WebhookQueue(self._topology.webhooks, self._journal)
        now = time.time()
        for request in await asyncio.to_thread(self._journal.active):
            self._resume(request, now)

    def _resume(self, request: Request, now: float) -> None:
        """Resume a request of an earlier head, without the pools and instances that the topology has no longer."""
        components = self._topology.components
        pools = {component.name for component in components if component.kind == "pool"}
        served, same = self._models.model_for_resumed(request)
        instances = {c.name for c in components if c.slots and c.model == served.key}
        request.model, scheduler = served.key, served.scheduler
        scheduler.resume(request, pools, instances, now)
        if not same:
            scheduler.fail(request.id, OTHER_MODEL, now)
        try:
            check_lora(request.inputs, served.lora_names, served.name)
        except ParameterError as error:
            scheduler.fail(request.id, f"since the topology has changed, {error.param} {error.message}", now)

    async def close(self) -> None:
        """Sync and close the journal."""
        if self._journal:
            try:
                await self.synced()
            except JournalError as error:  # no client was told of what is missing
                self._journal_failed(error)
            self._journal.close()

    @property
    def damaged(self) -> int:
        """Return the number of requests in the journal that could not be read."""
        return self._journal.damaged if self._journal else 0

    # -- accepting

    def accept(self, message: requests.SubmitRequest) -> SubmitAnswer:
        """Check a request, which `write_accepted` writes and starts; answer the client only after `synced`."""
        served = self._models.find(message.model)
        if served is None:
            return requests.RequestRejected("model_not_found", self._models.unknown(message.model), param="model")
        version = served.description_version
        try:
            request_id = self._accept(message, served)
        except ParameterError as error:
            return requests.RequestRejected("invalid", error.message, param=error.param, description_version=version)
        except RefusedSubmissionError as error:
            return requests.RequestRejected(
                error.code, str(error), retry_after_s=error.retry_after_s, description_version=version
            )
        except JournalError as error:
            return self.not_accepted(error)
        return requests.RequestAccepted(request_id, description_version=version)

    def _accept(self, message: requests.SubmitRequest, served: ServedModel) -> str:
        """Return the id of the request: that of an earlier one under the same idempotency key, or its own.

        Raises:
            ParameterError: An input is at fault.
            RefusedSubmissionError: The request cannot be accepted now.
            JournalError: The journal cannot be read.
        """
        if known := self._find_by_key(idempotency_key(message)):
            if known.digest == digest(message):
                return known.id
            raise RefusedSubmissionError("conflict", "this Idempotency-Key came with another body before")
        if served.unavailable_reason:
            sentence = f"{served.unavailable_reason}: the server has to be restarted"
            raise RefusedSubmissionError("unavailable", sentence, RESTARTED_S)
        id_ = message.request_id
        if id_ in self._accepted or self._models.scheduler_of_request(id_) or self._open_journal.find(id_):
            raise request_id_error()
        now = time.time()
        request = make_request(message, served, self._limits, now)
        for job in request.jobs:  # so that the journal need not be told again when they wait
            job.begin(now)
        pending, most = self._models.jobs_count, self._limits.max_pending
        pending += sum(len(accepted.jobs) for accepted, _ in self._accepted.values())
        if pending + message.n > most:
            raise RefusedSubmissionError(
                "full",
                f"{pending} of at most {most} images are under way, and {message.n} more do not fit: retry later",
                max(1.0, served.scheduler.tally.average_latency_s),
            )
        self._accepted[request.id] = (request, served)
        return request.id

    @property
    def has_accepted(self) -> bool:
        """Return whether there are requests for `write_accepted`."""
        return bool(self._accepted)

    def write_accepted(self) -> None:
        """Write the requests that were accepted since the last call to the journal, and start them.

        Raises:
            JournalError: None of them was written, and none is started.
        """
        accepted, self._accepted = self._accepted, {}
        self._open_journal.accept(*(request for request, _ in accepted.values()))
        self._writes += 1
        for request, served in accepted.values():
            served.scheduler.accept(request, time.time())

    def not_accepted(self, error: JournalError) -> requests.RequestRejected:
        """Return the answer to a request that could not be written to the journal."""
        self._journal_failed(error)
        return requests.RequestRejected("unavailable", str(error), retry_after_s=RETRY_WRITE_S)

    # -- finding

    def find(self, message: ByRequestId) -> Request:
        """Return the request that a message is about.

        Raises:
            RefusedError: `not_found` where there is none, or it is another owner's; `unavailable` where the journal
                cannot be read.
        """
        if request := self.find_owned(message):
            return request
        lost = self._journal is not None and self._journal.is_quarantined(message.request_id)
        why = "what the journal had of it was damaged, and has been set aside" if lost else "it may have been forgotten"
        raise RefusedError("not_found", f"there is no request {message.request_id}: {why}")

    def page(self, message: requests.ListRequests) -> requests.RequestList:
        """Return a page of the ids of an owner's requests.

        Raises:
            RefusedError: `not_found` where the page is to begin after a request that is none of the owner's;
                `unavailable` where the journal cannot be read.
        """
        try:
            after = self._find_by_id(message.after) if message.after else None
            if message.after and (after is None or message.owner not in ("", after.owner)):
                raise RefusedError("not_found", f"there is no request {message.after}")
            ids = self._open_journal.ids(
                message.owner,
                after=after,
                limit=message.limit + 1,
                newest_first=message.newest_first,
                active=message.active,
                output_format=message.output_format,
            )
        except JournalError as error:
            raise RefusedError("unavailable", str(error)) from error
        return requests.RequestList(tuple(ids[: message.limit]), len(ids) > message.limit)

    def find_owned(self, message: ByRequestId) -> Request | None:
        """As `find`, but return None if there is none, or it is another owner's."""
        try:
            request = self._find_by_id(message.request_id)
        except JournalError as error:
            raise RefusedError("unavailable", str(error)) from error
        return request if request and message.owner in ("", request.owner) else None

    def _find_by_id(self, request_id: str) -> Request | None:
        """Return a request of a scheduler, else of the journal, else None. Raises JournalError."""
        return self._models.request(request_id) or self._open_journal.find(request_id)

    def _find_by_key(self, key: str) -> Request | None:
        if not key:
            return None
        new = (request for request, _ in self._accepted.values() if request.idempotency_key == key)
        return next(new, None) or self._models.request_of_key(key) or self._open_journal.find_key(key)

    # -- telling

    async def view(self, request: Request, *, brief: bool = False) -> requests.RequestView:
        """Return the view of a request; that of an ended request only once its end is on the disk.

        With `brief`, that of an active one has no inputs and no runs.

        Raises:
            RefusedError: `unavailable` while its end cannot be written to the journal.
        """
        if request.terminal and (scheduler := self._models.scheduler_of_request(request.id)):
            not_yet = f"{request.id} has ended, but that is not on the disk yet"
            unwritten = any(job.id in scheduler.dirty for job in request.jobs)
            if unwritten and (self.journal_problem or not self.save()):
                raise RefusedError("unavailable", f"{not_yet}: {self.journal_problem}")
            try:
                await self.synced()
            except JournalError as error:
                raise RefusedError("unavailable", f"{not_yet}: {error}") from error
        served = self._models.by_key(request.model)
        return request.view(served.name if served else request.model, brief=brief)

    async def wait(self, request: Request, timeout_s: float, revision: str = "") -> requests.RequestView:
        """Return the view of a request once it has ended, or has another `revision`, or after `timeout_s`.

        With a `revision` it is brief, since one follows another. Raises as `view`.
        """
        if self._models.scheduler_of_request(request.id):
            try:
                async with asyncio.timeout(timeout_s):
                    while revision and revision == request.revision:
                        await self._changed.setdefault(request.id, asyncio.Event()).wait()
                    if request.terminal or not revision:
                        await self._ended.setdefault(request.id, asyncio.Event()).wait()
            except TimeoutError:  # the view shows that it is still active
                pass
        return await self.view(request, brief=bool(revision))

    def notify_watchers(self, changed: Iterable[str]) -> None:
        """Notify those who wait for a change of these requests."""
        for request_id in changed:
            if event := self._changed.pop(request_id, None):
                event.set()

    def notify_waiters(self, ended: Iterable[str]) -> None:
        """Notify the waiters of ended requests, as soon as their end is on the disk."""
        self._unnotified += ended
        if self._unnotified and not any(scheduler.dirty for scheduler in self._models.schedulers):
            ids, self._unnotified = self._unnotified, []
            self._actor.spawn(self._notify_waiters(ids), name="notify waiters")

    async def _notify_waiters(self, ended: list[str]) -> None:
        try:
            await self.synced()
        except JournalError as error:
            self._journal_failed(error)
            self._unnotified += ended
            return
        called = any(request.webhook_url for id_ in ended if (request := self._models.request(id_)))
        for scheduler in self._models.schedulers:  # from here on the journal has them
            scheduler.forget(ended)
        for request_id in ended:
            if event := self._ended.pop(request_id, None):
                event.set()
        if called and self._webhooks:
            self._webhooks.notify()

    # -- webhooks

    async def take_webhooks(self, message: TakeWebhooks) -> WebhooksDue:
        """Return the webhooks that are due, as soon as there are some, or after `timeout_s`.

        Raises:
            RefusedError: `unavailable` where the journal cannot be read.
        """
        try:
            return await self._webhook_queue.take(message)
        except JournalError as error:
            raise RefusedError("unavailable", str(error)) from error

    def webhook_tried(self, message: WebhookTried) -> WebhookRecorded:
        """Record an attempt to send a webhook; raises as `take_webhooks`."""
        try:
            return self._webhook_queue.tried(message)
        except JournalError as error:
            raise RefusedError("unavailable", str(error)) from error

    @property
    def _webhook_queue(self) -> WebhookQueue:
        if self._webhooks is None:
            raise JournalError("the journal is not open yet")
        return self._webhooks

    # -- ending

    def cancel(self, request_id: str, reason: str) -> None:
        """Cancel the active jobs of a request; no-op if there is no such request."""
        if scheduler := self._models.scheduler_of_request(request_id):
            scheduler.cancel(request_id, reason, time.time())

    async def delete(self, request: Request | None) -> requests.RequestDeleted:
        """Delete an ended request: its rows, its artifacts, and the uploads that no other request needs.

        Raises:
            RefusedError: `unavailable` if the disk fails.
        """
        if request is None:
            return requests.RequestDeleted(existed=False)
        used = self._uploads_in_use()
        try:
            # The files first: after a crash, a request that is still in the journal can be deleted again.
            async with self._removing:
                await asyncio.to_thread(self._discard_files, request, used)
            self._open_journal.delete(request.id)
            self._writes += 1
            await self.synced()
        except (JournalError, OSError) as error:
            raise RefusedError("unavailable", f"{request.id} cannot be deleted: {error}") from error
        for scheduler in self._models.schedulers:
            scheduler.forget([request.id])
        self._actor.log.info("request deleted", request_id=request.id)
        return requests.RequestDeleted(existed=True)

    def _uploads_in_use(self) -> set[Upload]:
        return {
            upload
            for request in self._models.requests.values()
            if not request.terminal
            for upload in uploads_of(request.inputs)
        }

    def _discard_files(self, request: Request, needed: set[Upload]) -> None:
        for job in request.jobs:
            self._artifacts.discard(job.id)
            for preview in job.previews:
                self._artifacts.discard(preview_id(job.id, preview.step))
        for upload in uploads_of(request.inputs) - needed:
            self._uploads.discard(upload, saved_before=request.created_at)

    def discard_late(self, attempt: Attempt) -> None:
        """Remove an artifact that no request has: it was deleted meanwhile, or the artifact is of a dropped preview."""
        denoise, step = denoise_of(attempt)
        try:
            request = self._find_by_id(denoise.job_id.rpartition("/")[0])
            jobs = [job for job in request.jobs if job.id == denoise.job_id] if request else []
            if not jobs or (step and all(view.step != step for job in jobs for view in job.previews)):
                self._actor.spawn(self._discard(attempt), name="discard")
        except JournalError as error:  # pruning removes it later
            self._actor.log.warning("artifact not removed", attempt=str(attempt), error=str(error))

    async def _discard(self, attempt: Attempt) -> None:
        try:
            async with self._removing:
                await asyncio.to_thread(self._artifacts.discard, attempt.job_id)
        except (ArtifactError, OSError) as error:  # pruning removes it later
            self._actor.log.warning("artifact not removed", attempt=str(attempt), error=str(error))

    async def prune(self) -> None:
        """Remove requests and artifacts that are too old or too many."""
        active = frozenset(self._models.requests)
        try:
            gone = await asyncio.to_thread(self._prune, active, time.time())
        except (JournalError, OSError) as error:  # the next call removes what is left
            self._actor.log.warning("not pruned", error=str(error))
        else:
            if any(gone.values()):
                self._actor.log.info("pruned", **gone)

    def _prune(self, active: frozenset[str], now: float) -> dict[str, int]:
        """Remove requests, then artifacts, except those that clients may still wait for."""
        state = self._topology.state
        bounds = StoreBounds(state.keep_requests_s, state.max_requests, parse_size(state.max_requests_size))
        ended, awaited = prune(self._journal_path, bounds, now=now)
        bounds = StoreBounds(state.keep_artifacts_s, state.max_artifacts, parse_size(state.max_artifacts_size))
        artifacts = self._artifacts.prune(bounds, now=now, needed=awaited | active)
        return {"requests": ended, "artifacts": artifacts}

    # -- the journal

    def save(self) -> bool:
        """Write the changes since the last call, and return whether that was possible; else the next call does it."""
        changed = [scheduler for scheduler in self._models.schedulers if scheduler.dirty]
        if self._journal is None or not changed:
            return not changed
        touched, jobs = [], []
        for scheduler in changed:
            ids = {job_id.rpartition("/")[0] for job_id in scheduler.dirty}
            self.notify_watchers(ids)
            found = [scheduler.requests[id_] for id_ in ids if id_ in scheduler.requests]
            touched += found
            jobs += [job for request in found for job in request.jobs if job.id in scheduler.dirty]
        try:
            self._journal.save(touched, jobs)
        except JournalError as error:
            self._journal_failed(error)
            return False
        self._writes += 1
        self._journal_recovered()
        for scheduler in changed:
            scheduler.dirty.clear()
        return True

    def save_all(self) -> None:
        """Write every active job, even unchanged ones, to record the time that it has left."""
        self.save_part(0, 1)

    def save_part(self, part: int, parts: int) -> None:
        """Write the active jobs of one of so many parts, counted from 0; a job is always of the same part."""
        for scheduler in self._models.schedulers:
            scheduler.dirty.update(job_id for job_id in scheduler.jobs if hash(job_id) % parts == part)
        self.save()

    async def synced(self) -> None:
        """Return when all writes so far are on the disk; callers share one `sync`.

        Raises:
            JournalError: The disk fails.
        """
        wanted = self._writes
        while self._synced_writes < wanted:
            if self._syncing is None:
                self._syncing = asyncio.create_task(self._sync())
            await asyncio.shield(self._syncing)  # others wait for it, too

    async def _sync(self) -> None:
        written = self._writes
        try:
            await asyncio.to_thread(self._open_journal.sync)
        finally:
            self._syncing = None
        self._synced_writes = written

    def check_synced(self) -> None:
        """Raise JournalError if the journal is to be opened anew, because a `sync` has failed."""
        if self._open_journal.unsynced:
            raise JournalError(self._open_journal.unsynced)

    def probe(self) -> None:
        """Check whether a failed journal can be written again."""
        try:
            self._open_journal.probe()
        except JournalError as error:
            self._journal_failed(error)
        else:
            self._journal_recovered()

    @property
    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise JournalError("the journal is not open yet")
        return self._journal

    def _log_damage(self, damage: str) -> None:
        self._actor.log.error("a request was lost from the journal", damage=damage)

    def _journal_failed(self, error: JournalError) -> None:
        if not self.journal_problem:
            self._actor.log.warning("the journal cannot be written", error=str(error))
        self.journal_problem = str(error)

    def _journal_recovered(self) -> None:
        if self.journal_problem:
            self._actor.log.info("the journal can be written again")
        self.journal_problem = ""


class RefusedSubmissionError(Exception):
    """A request is refused although none of its inputs is at fault."""

    def __init__(self, code: str, sentence: str, retry_after_s: float = 0.0) -> None:
        super().__init__(sentence)
        self.code = code
        self.retry_after_s = retry_after_s
