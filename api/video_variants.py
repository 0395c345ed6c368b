"""Thumbnails and sheets of finished videos: made when somebody first asks, and kept beside the video."""

from __future__ import annotations

import asyncio
from typing import Final
from weakref import WeakValueDictionary

from triptych.api.uploads import storing
from triptych.roles.media.artifacts import VARIANTS, ArtifactMissingError, ArtifactStore, artifact_name, variant_id

MAX_CONCURRENT: Final = 2
"""Videos that are read at a time; each takes a thread and a core while it is decoded."""


class VideoVariants:
    """Makes the variants of videos, on threads.

    Args:
        store: Has the videos, and keeps what is made of them.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._decoding = asyncio.Semaphore(MAX_CONCURRENT)
        self._making: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def find_or_make(self, video: str, job_id: str, variant: str) -> tuple[str, bool]:
        """Return the name of a variant's file, and whether this call has made it.

        Args:
            video: Name of the MP4.
            job_id: Of the video.
            variant: A name in `VARIANTS`.

        Raises:
            ArtifactMissingError: The video is not kept any more.
            ApiError: 503, the store has no room.
            OSError: As `roles.media.files.Files`.
        """
        name = artifact_name(variant_id(job_id, variant), VARIANTS[variant])
        # Those who ask for the same one at a time wait for the first.
        lock = self._making.setdefault(name, asyncio.Lock())
        async with lock:
            try:
                await asyncio.to_thread(self._store.stat, name)
            except ArtifactMissingError:
                async with self._decoding:
                    await asyncio.to_thread(self._make, video, job_id, variant)
                return name, True
            return name, False

    def _make(self, video: str, job_id: str, variant: str) -> None:
        from triptych.roles.media.variants import MAKERS  # imports FFmpeg

        with self._store.open(video) as file:
            data = MAKERS[variant](file)
        with storing("variant"):
            self._store.save(variant_id(job_id, variant), VARIANTS[variant], data)

    async def discard(self, job_id: str, variant: str) -> None:
        """Remove a variant."""
        await asyncio.to_thread(self._store.discard, variant_id(job_id, variant))
