"""The prompt cache: what encoders made lies on in its blocks, for the next request that they would make the same of.

Pure: it knows keys and blocks; who else needs a block is known to `roles.staging`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Final

import msgspec

from triptych.engines.memory.buddy import block_bytes
from triptych.engines.parameters.schema import Signature, names
from triptych.roles.messages.common import Images, Input, LeaseRef, StoredPayload, Tensors
from triptych.roles.messages.requests import PromptCacheView

MAX_UNSHARED_KEYS: Final = 1024
"""Keys that are remembered because what they stand for was not kept for every seed."""


class PromptCache:
    """Encoder outputs by what they were made of, the least recently used first to go.

    Args:
        capacity: most bytes that the blocks may take; 0 keeps nothing.
        name: what is served, and in which dtype.
    """

    def __init__(self, capacity: int = 0, name: str = "") -> None:
        self.capacity = capacity
        self.model = ""
        """Version of the weights that encoders have; whoever changes it empties the cache."""
        self.nbytes = 0
        """What the blocks take in their pool, rounding included."""
        self.hits = 0
        self.misses = 0
        self._name = name
        self._signature = Signature()
        self._free: frozenset[str] = frozenset()
        self._entries: dict[bytes, StoredPayload] = {}
        self._keys: dict[LeaseRef, bytes] = {}
        self._unshared: dict[bytes, None] = {}

    def __contains__(self, lease: LeaseRef) -> bool:
        return lease in self._keys

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def leases(self) -> tuple[LeaseRef, ...]:
        """Of the blocks that it keeps, the least recently used first."""
        return tuple(stored.lease for stored in self._entries.values())

    def view(self) -> PromptCacheView:
        """What `/v1/cluster` shows."""
        return PromptCacheView(len(self), self.nbytes, self.capacity, self.hits, self.misses)

    # -- keys

    def update_signature(self, signature: Signature) -> bool:
        """Take note of which inputs an encoder reads; returns whether keys made before stand for something else."""
        if signature == self._signature:
            return False
        self._signature = signature
        self._free = names(signature.parameters) - set(signature.encodes)
        self._unshared.clear()
        return True

    def key(self, inputs: Mapping[str, Input]) -> bytes:
        """Of all that an encoder reads of a request, but for the seed.

        Images and tensors are part of it wherever they are read, because only an encoder can load them. An input that
        the signature does not know may be read as well.
        """
        read = [
            (name, value)
            for name, value in sorted(inputs.items())
            if name not in self._free or isinstance(value, Images | Tensors)
        ]
        return blake2b(msgspec.msgpack.encode((self._name, self.model, read)), digest_size=32).digest()

    def can_share(self, key: bytes, inputs: Mapping[str, Input]) -> bool:
        """Whether what is being made for one request will do for another of the same key, as far as is known.

        What is made of images is drawn from a seed in many families.
        """
        return key not in self._unshared and not any(isinstance(value, Images) for value in inputs.values())

    # -- entries

    def find(self, key: bytes, seed: int) -> StoredPayload | None:
        """What was kept for every seed, or for this one."""
        for candidate in (key, _seeded(key, seed)) if key in self._unshared else (key,):
            if stored := self._entries.pop(candidate, None):
                self._entries[candidate] = stored
                return stored
        return None

    def offer(self, key: bytes, seed: int, stored: StoredPayload, *, seed_independent: bool) -> tuple[LeaseRef, ...]:
        """Keep what an encoder has made, if it fits; returns what had to go for it."""
        fits = block_bytes(stored.nbytes) <= self.capacity
        if not (seed_independent and fits):
            self._unshare(key)
        key = key if seed_independent else _seeded(key, seed)
        if not fits or key in self._entries:
            return ()
        self._entries[key] = stored
        self._keys[stored.lease] = key
        self.nbytes += block_bytes(stored.nbytes)
        gone: list[LeaseRef] = []
        for lease in self.leases:
            if self.nbytes <= self.capacity:
                break
            gone.append(lease)
            self.drop((lease,))
        return tuple(gone)

    def drop(self, leases: Iterable[LeaseRef]) -> None:
        """Forget what lies in these blocks; nothing where it keeps none of them."""
        for lease in leases:
            if key := self._keys.pop(lease, None):
                self.nbytes -= block_bytes(self._entries.pop(key).nbytes)

    def _unshare(self, key: bytes) -> None:
        self._unshared[key] = None
        if len(self._unshared) > MAX_UNSHARED_KEYS:
            del self._unshared[next(iter(self._unshared))]


def _seeded(key: bytes, seed: int) -> bytes:
    return blake2b(msgspec.msgpack.encode((key, str(seed))), digest_size=32).digest()
