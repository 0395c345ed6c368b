from __future__ import annotations

import random

import numpy as np
import pytest

from tests.engines.transfer.peer_process import until
from triptych.engines.codec.checksum import ChecksumMismatchError, checksum, verify
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer import FaultRates, TransferError, TransferSetupError, open_backend

NBYTES = 1 << 16


@pytest.fixture
def arenas():
    arenas = Arena.create(NBYTES), Arena.create(NBYTES)
    arenas[0].tensor(0, NBYTES).fill_(0x5A)
    yield arenas
    for arena in arenas:
        arena.close()


def backends(arenas, faults: str, seed: int = 0):
    source, target = arenas
    return open_backend("shm", arena=source), open_backend("shm", arena=target, faults=faults, seed=seed)


def test_settings_are_read():
    assert FaultRates.parse("") == FaultRates()
    assert FaultRates.parse("flip:0.1,short:0.05,delay:0.05:2.0") == FaultRates(
        flip=0.1, short=0.05, delay=0.05, delay_s=2.0
    )
    assert FaultRates.parse("delay:1:0.5") == FaultRates(delay=1.0, delay_s=0.5)


@pytest.mark.parametrize(
    "text",
    ["flip", "flip:2", "flip:-0.1", "flip:x", "flip:nan", "delay:0.1", "flip:0:1", "melt:0.1", "flip:0.1,flip:0.2"],
)
def test_other_settings_are_refused(text):
    with pytest.raises(TransferSetupError):
        FaultRates.parse(text)


def test_without_faults_there_is_no_wrapper(arenas):
    _, backend = backends(arenas, "")
    assert "FAULTS" not in backend.describe()
    _, damaged = backends(arenas, "flip:0.5")
    assert "FAULTS" in damaged.describe()


@pytest.mark.parametrize("faults", ["flip:1", "short:1", "flip:1,short:1"])
@pytest.mark.parametrize("seed", range(8))
def test_each_damaged_pull_is_caught_by_its_checksum(arenas, faults, seed):
    source, backend = backends(arenas, faults, seed)
    expected = checksum(arenas[0].view(100, 5000))
    backend.pull(source.session, 100, 0, 5000, 10)
    with pytest.raises(ChecksumMismatchError):
        verify(arenas[1].array(0, 5000), expected)
    assert not any(arenas[1].view(5000, NBYTES - 5000)), "damage beside the block"
    verify(arenas[0].array(100, 5000), expected)


def test_faults_come_as_often_as_asked_and_the_same_for_a_seed(arenas):
    def outcomes(seed: int) -> list[int]:
        source, backend = backends(arenas, "flip:0.3", seed)
        values = []
        for _ in range(200):
            backend.pull(source.session, 0, 0, 512, 10)
            values.append(checksum(arenas[1].view(0, 512)))
        return values

    first = outcomes(1)
    damaged = sum(value != checksum(arenas[0].view(0, 512)) for value in first)
    assert 30 < damaged < 90
    assert outcomes(1) == first
    assert outcomes(2) != first


def test_a_delay_within_the_timeout_only_takes_longer(arenas):
    source, backend = backends(arenas, "delay:1:0.01")
    backend.pull(source.session, 0, 0, 512, 10)
    assert set(arenas[1].view(0, 512)) == {0x5A}
    assert backend.late() == ()


def test_a_delay_past_the_timeout_fails_and_lands_late(arenas):
    source, backend = backends(arenas, "delay:1:0.3")
    with pytest.raises(TransferError) as caught:
        backend.pull(source.session, 0, 0, 512, 0.01)
    assert (caught.value.retryable, caught.value.quarantine) == (True, True)
    assert backend.late() == ((0, 512),)
    until(lambda: backend.late() == ())
    assert set(arenas[1].view(0, 512)) == {0x5A}


def test_nothing_lands_after_close(arenas):
    source, backend = backends(arenas, "delay:1:20")
    with pytest.raises(TransferError):
        backend.pull(source.session, 0, 0, 512, 0.01)
    backend.close()
    until(lambda: backend.late() == ())
    assert not any(arenas[1].view(0, 512))


def test_damage_needs_bytes():
    assert FaultRates(flip=1, short=1).damage(np.empty(0, dtype=np.uint8), random.Random(0)) == []
