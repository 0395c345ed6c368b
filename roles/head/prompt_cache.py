"""The prompt cache: keeps the blocks of encoder outputs, for later requests with the same encoder inputs.

Pure: it has keys and blocks; `roles.head.stored_outputs` knows which jobs need a block too.
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

MAX_ENTRIES: Final = 16_384
"""Most outputs that are kept, however small: the head has a manifest and some keys for each."""
MAX_UNSHARED_KEYS: Final = 1024
"""Most keys that are remembered because their outputs depend on the seed or were not kept."""


class PromptCache:
    """A cache of encoder outputs by their inputs; evicts the least recently used.

    Args:
        capacity: Most bytes that the blocks may take, of which there are at most `MAX_ENTRIES`; 0 turns the cache off.
        name: Name and dtype of the model, a part of the keys.
    """

    def __init__(self, capacity: int = 0, name: str = "") -> None:
        self.capacity = capacity
        self.model = ""
        """Version of the encoders' weights; clear the cache when changing it."""
        self.nbytes = 0
        """Bytes that the blocks take in their pool, with rounding."""
        self.hits = 0
        self.misses = 0
        self._name = name
        self._signature = Signature()
        self._free: frozenset[str] = frozenset()
        self._entries: dict[bytes, StoredPayload] = {}
        self._keys: dict[LeaseRef, bytes] = {}
        self._unshared: dict[bytes, None] = {}
        self._prompts: dict[bytes, bytes] = {}
        """The key without a seed of each entry."""
        self._changed: set[bytes] = set()

    def __contains__(self, lease: LeaseRef) -> bool:
        return lease in self._keys

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def leases(self) -> tuple[LeaseRef, ...]:
        """Return the leases of the cached blocks, the least recently used first."""
        return tuple(stored.lease for stored in self._entries.values())

    def view(self) -> PromptCacheView:
        """Return what `/v1/cluster` shows."""
        return PromptCacheView(len(self), self.nbytes, self.capacity, self.hits, self.misses)

    # -- keys

    def update_signature(self, signature: Signature) -> bool:
        """Record which inputs an encoder reads; return whether earlier keys are invalid now."""
        if signature == self._signature:
            return False
        self._signature = signature
        self._free = names(signature.parameters) - set(signature.encodes)
        self._unshared.clear()
        return True

    def key(self, inputs: Mapping[str, Input]) -> bytes:
        """Return the key for the inputs that an encoder reads, without the seed.

        Images and tensors always belong to the key, because only an encoder can load them. So do inputs that are not in
        the signature, because an encoder may read them.
        """
        read = [
            (name, value)
            for name, value in sorted(inputs.items())
            if name not in self._free or isinstance(value, Images | Tensors)
        ]
        return blake2b(msgspec.msgpack.encode((self._name, self.model, read)), digest_size=32).digest()

    def can_share(self, key: bytes, inputs: Mapping[str, Input]) -> bool:
        """Return whether requests of this key can probably share encoder outputs.

        In many families, encoder outputs for images depend on the seed.
        """
        return key not in self._unshared and not any(isinstance(value, Images) for value in inputs.values())

    # -- entries

    def _candidates(self, key: bytes, seed: int) -> tuple[bytes, ...]:
        return (key, _seeded(key, seed)) if key in self._unshared else (key,)

    def has(self, key: bytes, seed: int) -> bool:
        """Return whether there are outputs for every seed, or for this one; this is no use of them."""
        return any(candidate in self._entries for candidate in self._candidates(key, seed))

    def take_changed(self) -> set[bytes]:
        """Return the keys of which `has` or `can_share` may return something else than at the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def find(self, key: bytes, seed: int) -> StoredPayload | None:
        """Return the cached outputs for every seed, else for this one, else None."""
        for candidate in self._candidates(key, seed):
            if stored := self._entries.pop(candidate, None):
                self._entries[candidate] = stored
                return stored
        return None

    def offer(self, key: bytes, seed: int, stored: StoredPayload, *, seed_independent: bool) -> tuple[LeaseRef, ...]:
        """Cache the outputs of an encoder if they fit; return the leases that were evicted for them."""
        fits = block_bytes(stored.nbytes) <= self.capacity
        if not (seed_independent and fits):
            self._unshare(key)
        prompt, key = key, key if seed_independent else _seeded(key, seed)
        if not fits or key in self._entries:
            return ()
        self._prompts[key] = prompt
        self._changed.add(prompt)
        self._entries[key] = stored
        self._keys[stored.lease] = key
        self.nbytes += block_bytes(stored.nbytes)
        gone: list[LeaseRef] = []
        while self.nbytes > self.capacity or len(self) > MAX_ENTRIES:
            gone.append(next(iter(self._entries.values())).lease)
            self.drop(gone[-1:])
        return tuple(gone)

    def drop(self, leases: Iterable[LeaseRef]) -> None:
        """Remove the entries of these blocks; no-op for blocks that are not cached."""
        for lease in leases:
            if key := self._keys.pop(lease, None):
                self.nbytes -= block_bytes(self._entries.pop(key).nbytes)
                self._changed.add(self._prompts.pop(key))

    def _unshare(self, key: bytes) -> None:
        self._unshared[key] = None
        self._changed.add(key)
        if len(self._unshared) > MAX_UNSHARED_KEYS:
            oldest = next(iter(self._unshared))
            del self._unshared[oldest]
            self._changed.add(oldest)


def _seeded(key: bytes, seed: int) -> bytes:
    return blake2b(msgspec.msgpack.encode((key, str(seed))), digest_size=32).digest()
