from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.engines.transfer.peer_process import ROOT, peer
from triptych.engines.memory import arena as arena_module
from triptych.engines.memory.arena import Arena, ArenaAddress, ArenaError, available_memory

NBYTES = 1 << 20


@pytest.fixture
def arena():
    arena = Arena.create(NBYTES)
    yield arena
    arena.close()


def changed(address: ArenaAddress, **values: int) -> ArenaAddress:
    return msgspec.structs.replace(address, **values)


def test_a_new_arena_is_zeroed_and_seen_whole_by_who_attaches_it(arena):
    mapped = Arena.attach(arena.address)
    assert not any(mapped.view(0, NBYTES))
    arena.view(NBYTES - 3, 3)[:] = b"abc"
    assert bytes(mapped.view(NBYTES - 3, 3)) == b"abc"
    mapped.tensor(7, 4)[:] = 9
    assert bytes(arena.view(6, 6)) == b"\0\t\t\t\t\0"
    assert (mapped.owner, mapped.stale, arena.stale) == (False, False, False)
    mapped.close()


def test_the_arena_of_another_process_is_mapped_and_its_death_is_seen():
    with peer(NBYTES, engine="shm") as other:
        expected = other.ask("fill", offset=100, nbytes=1000, byte=3)
        mapped = Arena.attach(ArenaAddress.parse(other.session))
        assert not mapped.stale
        mapped.view(100, 1)[0] ^= 1
        assert other.ask("checksum", offset=100, nbytes=1000) != expected
        other.kill()
        assert mapped.stale
        assert mapped.view(101, 1)[0] == 4, "the memory outlives the process that made it"
        with pytest.raises(ArenaError, match="cannot open"):
            Arena.attach(mapped.address)
        mapped.close()


def test_a_zombie_is_dead():
    with peer(NBYTES, engine="shm") as other:
        mapped = Arena.attach(ArenaAddress.parse(other.session))
        other.process.kill()
        # Waits for the end of the process and leaves it unreaped.
        os.waitid(os.P_PID, other.process.pid, os.WEXITED | os.WNOWAIT)
        assert mapped.stale
        mapped.close()


def test_only_the_arena_that_was_announced_is_attached(arena):
    second = Arena.create(NBYTES)
    address = arena.address
    wrong = [
        changed(address, fd=second.address.fd),
        changed(address, nbytes=NBYTES // 2),
        changed(address, start_time=address.start_time + 1),
        changed(address, inode=address.inode + 10_000),
        changed(address, fd=1_000_000),
        changed(address, pid=2**22 + 1),
    ]
    for other in wrong:
        with pytest.raises(ArenaError):
            Arena.attach(other)
    second.close()


def test_memory_that_could_be_shrunk_is_not_attached(arena):
    fd = os.memfd_create("other")
    os.truncate(fd, NBYTES)
    with pytest.raises(ArenaError, match="is not sealed"):
        Arena.attach(changed(arena.address, fd=fd, inode=os.fstat(fd).st_ino))
    os.close(fd)


def test_nobody_can_resize_or_unseal_an_arena(arena):
    for nbytes in (0, NBYTES - 1, NBYTES + 1):
        with pytest.raises(PermissionError):
            os.truncate(arena.address.fd, nbytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.address.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_no_name_is_left_in_the_file_system(arena):
    link = str(Path(f"/proc/self/fd/{arena.address.fd}").readlink())
    assert link.startswith("/memfd:")
    assert not Path(link.removesuffix(" (deleted)")).exists()
    assert not list(Path("/dev/shm").glob("*triptych-arena*"))


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (NBYTES, 1), (1, NBYTES)])
def test_views_stay_inside(arena, offset, nbytes):
    for look in (arena.view, arena.array, arena.tensor):
        with pytest.raises(ArenaError, match="outside"):
            look(offset, nbytes)


def test_an_empty_view_is_possible_everywhere(arena):
    assert len(arena.view(NBYTES, 0)) == 0
    assert arena.tensor(0, 0).shape == (0,)


def test_closing_ends_the_descriptor_and_new_views_but_no_old_one():
    arena = Arena.create(NBYTES)
    fd, tensor = arena.address.fd, arena.tensor(0, 4)
    arena.close()
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    tensor[:] = 5
    assert tensor.tolist() == [5, 5, 5, 5]
    with pytest.raises(ArenaError, match="closed"):
        arena.view(0, 1)


def test_pinning_is_told_truthfully_where_there_is_no_cuda(arena):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this host has CUDA; tests/gpu/test_streams.py pins")
    assert arena.pin() is False
    assert (arena.pinned, arena.pin_failure) == (False, "no CUDA device")
    assert not arena.tensor(0, 1).is_pinned()


def test_a_refused_pin_is_told_and_its_error_does_not_meet_the_next_launch(arena, monkeypatch):
    import torch

    last_error = []

    class Cudart:
        @staticmethod
        def cudaHostRegister(_base, _nbytes, _flags):
            last_error.append("operation not supported")
            return 801

    def launch(_cycles):
        raise torch.AcceleratorError(f"CUDA error: {last_error.pop()}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_sleep", launch)
    monkeypatch.setattr(arena_module, "_cudart", Cudart)
    assert arena.pin() is False
    assert (arena.pinned, arena.pin_failure) == (False, "cudaHostRegister: 801")
    assert last_error == []


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_arena_of_nothing_is_refused(nbytes):
    with pytest.raises(ArenaError, match="size"):
        Arena.create(nbytes)


def test_more_memory_than_there_is_is_refused_in_words():
    with pytest.raises(ArenaError, match="available"):
        Arena.create(1 << 50)


def test_the_limit_of_a_container_counts(tmp_path):
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroups / "pod").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   8 kB\n")
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/pod\n")
    assert available_memory(proc, cgroups) == 8192
    inside = cgroups / "pod" / "box"
    inside.mkdir()
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/pod/box\n")

    def set_to(folder, limit: str, used: int, cached: int) -> None:
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\nactive_file 9\n")

    set_to(inside, "max", 5000, 0)
    assert available_memory(proc, cgroups) == 8192
    set_to(inside, "7000", 1000, 0)
    assert available_memory(proc, cgroups) == 6000
    set_to(inside.parent, "7000", 6000, 4500)
    assert available_memory(proc, cgroups) == 5500
    set_to(inside, "7000", 7100, 0)
    assert available_memory(proc, cgroups) == 0


@pytest.mark.parametrize(
    "text", ["", "memfd", "memfd:1:2:3:4", "memfd:1:2:3:4:-5", "memfd:1:2:3:4:5:6", "shm:1:2:3:4:5"]
)
def test_garbage_is_no_address(text):
    with pytest.raises(ArenaError, match="not the address"):
        ArenaAddress.parse(text)


def test_an_address_survives_text_and_the_wire(arena):
    assert ArenaAddress.parse(str(arena.address)) == arena.address
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(arena.address), type=ArenaAddress) == arena.address


def test_a_pool_needs_no_torch_and_no_mooncake():
    code = (
        "import sys; from triptych.engines.memory.arena import Arena;"
        "import triptych.engines.memory.leases, triptych.engines.transfer;"
        "triptych.engines.transfer.open_backend('shm', arena=Arena.create(4096));"
        "print(sorted({'torch', 'mooncake'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
