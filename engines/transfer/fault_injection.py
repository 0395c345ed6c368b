"""A backend that injects faults into pulls, to test that the system survives them. Off by default."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import msgspec
import numpy as np

from triptych.engines.codec.checksum import Bytes
from triptych.engines.memory.arena import Arena
from triptych.engines.memory.leases import ByteRange
from triptych.engines.transfer.backend import TransferBackend, TransferError, TransferSetupError

LATE_TIMEOUT_S = 5.0
"""Seconds after which the pull behind an injected delay fails."""


class FaultRates(msgspec.Struct, frozen=True):
    """The probabilities, from 0 to 1, of independent faults in a pull."""

    flip: float = 0.0  # one bit of one byte is changed
    short: float = 0.0  # the end of the bytes does not arrive
    delay: float = 0.0  # it takes `delay_s` longer; after its timeout it fails, but the bytes still arrive
    delay_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> FaultRates:
        """Parse a setting such as "flip:0.1,short:0.05,delay:0.05:2.0"; "" is no faults.

        Raises:
            TransferSetupError: The setting cannot be parsed.
        """
        values: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            kind, *numbers = part.split(":")
            names = {"flip": ["flip"], "short": ["short"], "delay": ["delay", "delay_s"]}.get(kind, [])
            if not names or len(numbers) != len(names) or kind in values:
                raise TransferSetupError(f'{part!r} is not a fault: write "flip:P", "short:P" or "delay:P:SECONDS"')
            values.update(zip(names, map(_number, numbers), strict=True))
        if any(not 0 <= value <= 1 for name, value in values.items() if name != "delay_s"):
            raise TransferSetupError(f"the probabilities in {text!r} must lie between 0 and 1")
        return cls(**values)

    def damage(self, memory: Bytes, rng: random.Random) -> list[str]:
        """Damage the bytes of one pull in place. Also used where bytes are mapped instead of pulled.

        Args:
            memory: The bytes: uint8, shape [nbytes].
            rng: The source of chance.

        Returns:
            The faults that were injected: "flip", "short", both or none.
        """
        done = []
        if len(memory) and rng.random() < self.flip:
            memory[rng.randrange(len(memory))] ^= 1 << rng.randrange(8)
            done.append("flip")
        if len(memory) and rng.random() < self.short:
            missing = memory[rng.randrange(len(memory)) :]
            # Invert the bytes: those that were there before may be equal to those that are missing.
            np.invert(missing, out=missing)
            done.append("short")
        return done


class FaultyBackend:
    """Wraps a backend and injects faults into its pulls; the same seed and order of pulls give the same faults."""

    def __init__(self, backend: TransferBackend, arena: Arena, faults: FaultRates, seed: int = 0) -> None:
        self._backend = backend
        self._arena = arena
        self._faults = faults
        self._rng = random.Random(seed)  # noqa: S311 - chance for tests, not a secret
        self._lock = threading.Lock()
        self._late: dict[threading.Thread, ByteRange] = {}
        self._closed = threading.Event()
        self.injected: dict[str, int] = {"flip": 0, "short": 0, "delay": 0}

    @property
    def session(self) -> str:
        """The session of the wrapped backend."""
        return self._backend.session

    @property
    def base(self) -> int:
        """The base of the wrapped backend."""
        return self._backend.base

    def describe(self) -> str:
        """Describe the transport and the injected faults."""
        return f"{self._backend.describe()}, WITH INJECTED FAULTS {self._faults}"

    def exposed(self) -> str:
        """Describe what others can access in this process."""
        return self._backend.exposed()

    def pull(self, session: str, address: int, offset: int, nbytes: int, timeout_s: float) -> None:
        """Pull with the wrapped backend and inject faults; see `TransferBackend.pull`."""
        pull = partial(self._backend.pull, session, address, offset, nbytes)
        if self._draws_delay():
            self._delay(pull, (offset, nbytes), timeout_s)
            timeout_s -= self._faults.delay_s
        pull(timeout_s)
        with self._lock:
            for kind in self._faults.damage(self._arena.array(offset, nbytes), self._rng):
                self.injected[kind] += 1

    def late(self) -> tuple[ByteRange, ...]:
        """Return the local ranges that delayed and failed pulls may still write to."""
        with self._lock:
            return (*self._backend.late(), *self._late.values())

    def close(self) -> None:
        """Drop delayed pulls and close the wrapped backend."""
        self._closed.set()
        self._backend.close()

    def _draws_delay(self) -> bool:
        with self._lock:
            delayed = self._rng.random() < self._faults.delay
            self.injected["delay"] += delayed
            return delayed

    def _delay(self, pull: Callable[[float], None], local: ByteRange, timeout_s: float) -> None:
        self._closed.wait(min(self._faults.delay_s, timeout_s))
        rest = self._faults.delay_s - timeout_s
        if rest >= 0:
            thread = threading.Thread(target=self._pull_late, args=(pull, local, rest), daemon=True)
            with self._lock:
                self._late[thread] = local
            thread.start()
            raise TransferError("an injected delay outlasted the timeout", retryable=True, quarantine=True)

    def _pull_late(self, pull: Callable[[float], None], local: ByteRange, pause_s: float) -> None:
        try:
            if not self._closed.wait(pause_s):
                # The caller already knows that this pull failed; if it really fails, nothing arrives late.
                with suppress(TransferError):
                    pull(LATE_TIMEOUT_S)
        finally:
            with self._lock:
                del self._late[threading.current_thread()]


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise TransferSetupError(f"{text!r} is not a number") from error
    if not 0 <= number < float("inf"):
        raise TransferSetupError(f"{text!r} must be a number of at least 0")
    return number
