"""The hosts that other tests run on: are they hosts, do the faults do what they say, is anything left behind?"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from triptych.tools.hosts import DISK, Hosts, NetworkFault, resume, why_unsupported

PYTHON = (sys.executable, "-I", "-S", "-u", "-c")
LISTEN = """
import socket
port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
port.bind(("", 4000))
print("up")
while True:
    print(port.recv(100).decode())
"""
SEND = """
import socket, sys
port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for line in sys.stdin:
    address, text = line.split()
    try:
        port.sendto(text.encode(), (address, 4000))
    except OSError:
        pass
    print("sent")
"""


@pytest.fixture(scope="module", params=[False, True], ids=["", "in a user namespace"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    with Hosts(user_namespace=request.param) as made:
        yield made


class Senders:
    """A process on each host that sends datagrams, and one that prints those that arrive."""

    def __init__(self, hosts: Hosts, stack: ExitStack) -> None:
        self.hosts = hosts
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.senders = {name: hosts.popen(name, *PYTHON, SEND, **pipes) for name in hosts.names}
        self.listeners = {name: hosts.popen(name, *PYTHON, LISTEN, stdout=subprocess.PIPE) for name in hosts.names}
        for process in (*self.senders.values(), *self.listeners.values()):
            stack.enter_context(process)
            stack.callback(process.kill)
        assert [self.arrived(name) for name in hosts.names] == ["up"] * 3

    def send(self, sender: str, receiver: str, text: str) -> None:
        process = self.senders[sender]
        process.stdin.write(f"{self.hosts.address(receiver)} {text}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "sent\n"

    def arrived(self, host: str) -> str:
        return self.listeners[host].stdout.readline().strip()


@pytest.fixture
def senders(hosts: Hosts) -> Iterator[Senders]:
    with ExitStack() as stack:
        yield Senders(hosts, stack)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come; the limit of a test ends the waiting."""
    while not condition():
        time.sleep(0.01)


def test_a_host_shares_no_folder_no_process_and_no_route_with_others(hosts: Hosts) -> None:
    folders = ("/run", "/tmp", "/var/tmp", "/dev/shm", DISK)
    for name in hosts.names:
        files = " ".join(f"{folder}/of-host-{name}" for folder in folders)
        hosts.run(name, "sh", "-c", f'touch {files} "$XDG_RUNTIME_DIR/x" "$TMPDIR/x"; mkdir -p "$XDG_STATE_HOME/x"')
    for name in hosts.names:
        assert hosts.run(name, "hostname").strip() == name
        seen = hosts.run(name, "ls", *folders)
        assert [seen.count(f"of-host-{other}") for other in hosts.names] == [
            len(folders) * (other == name) for other in hosts.names
        ]
        assert sorted(path.name for path in hosts.disk(name).iterdir()) == [f"of-host-{name}", "state"]
        assert not any(Path(folder, f"of-host-{name}").exists() for folder in folders)
        assert hosts.run(name, "ip", "route").splitlines() == [
            f"10.77.0.0/24 dev eth0 proto kernel scope link src {hosts.address(name)} "
        ]
        until(lambda name=name: set(hosts.outer_pids(name)) == {1})  # nothing else runs there


def test_what_is_shared_is_seen_under_its_path_and_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with Hosts(("a",), shared=[tmp_path]) as hosts:
        assert hosts.run("a", "cat", str(tmp_path / "file")) == "here"
        with pytest.raises(subprocess.CalledProcessError) as refused:
            hosts.run("a", "touch", str(tmp_path / "other"))
        assert "Read-only" in refused.value.stderr


def test_an_orphan_that_has_ended_is_no_zombie(hosts: Hosts) -> None:
    with hosts.popen("a", "sh", "-c", "sleep 1000 & echo $!; exec sleep 1000", stdout=-1) as parent:
        inner = int(parent.stdout.readline())
        orphan = hosts.outer_pids("a")[inner]
        parent.kill()
    os.kill(orphan, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{orphan}").exists())


@pytest.mark.parametrize(
    "fault",
    [
        lambda hosts: hosts.partition("a", "c"),
        lambda hosts: hosts.isolate("a"),
        lambda hosts: hosts.isolate("c"),
        lambda hosts: hosts.one_way("a", "c"),
    ],
    ids=["partition", "isolated sender", "isolated receiver", "one way"],
)
def test_what_is_sent_during_a_fault_is_lost(
    hosts: Hosts, senders: Senders, fault: Callable[[Hosts], NetworkFault]
) -> None:
    senders.send("a", "c", "before")
    assert senders.arrived("c") == "before"
    with fault(hosts):
        senders.send("a", "c", "during")
    texts = send_until_one_arrives(senders, "a", "c")
    assert "during" not in texts


def test_a_host_sees_that_its_cable_is_pulled(hosts: Hosts, senders: Senders) -> None:
    with hosts.link_down("a"):
        until(lambda: "NO-CARRIER" in hosts.run("a", "ip", "link", "show", "eth0"))
    send_until_one_arrives(senders, "a", "c")


def send_until_one_arrives(senders: Senders, sender: str, receiver: str) -> list[str]:
    """Send again and again: a link takes up to a second to be up again. Returns what has arrived."""
    stdout = senders.listeners[receiver].stdout
    while not select.select([stdout], [], [], 0.1)[0]:
        senders.send(sender, receiver, "after")
    return [senders.arrived(receiver)]


def test_one_way_lets_the_other_way_and_other_hosts_be(hosts: Hosts, senders: Senders) -> None:
    with hosts.one_way("a", "c"), hosts.partition("a", "b"):
        senders.send("a", "c", "lost")
        senders.send("c", "a", "back")
        assert senders.arrived("a") == "back"
        senders.send("b", "c", "beside")
        assert senders.arrived("c") == "beside"
    assert send_until_one_arrives(senders, "a", "c") == ["after"]


def test_faults_overlap_and_heal_ends_all(hosts: Hosts, senders: Senders) -> None:
    hosts.one_way("a", "c")
    with hosts.one_way("a", "c"):
        pass
    senders.send("a", "c", "lost")
    hosts.heal()
    assert send_until_one_arrives(senders, "a", "c") == ["after"]


def test_some_are_lost_and_some_arrive(hosts: Hosts, senders: Senders) -> None:
    with hosts.lose(50):
        for number in range(100):
            senders.send("a", "c", str(number))
    senders.send("a", "c", "end")
    arrived = list(iter(lambda: senders.arrived("c"), "end"))
    assert 0 < len(arrived) < 100


def test_a_slow_link_is_overtaken_by_a_quick_one_and_keeps_its_order(hosts: Hosts, senders: Senders) -> None:
    with hosts.delay("a", 0.3, 0.1):
        for text in ("one", "two", "three"):
            senders.send("a", "c", text)
        senders.send("b", "c", "quick")
        assert [senders.arrived("c") for _ in range(4)] == ["quick", "one", "two", "three"]
    assert send_until_one_arrives(senders, "a", "c") == ["after"]


def test_a_link_that_flaps_is_up_in_the_end(hosts: Hosts, senders: Senders) -> None:
    with hosts.limit_rate("a", 100):
        hosts.flap("a", times=2, down_s=0.05, up_s=0.05)
    assert send_until_one_arrives(senders, "a", "c") == ["after"]


def test_signals_reach_the_process_on_the_host(hosts: Hosts) -> None:
    process = hosts.popen("a", "cat", stdin=-1, stdout=-1)
    process.send_signal(signal.SIGSTOP)
    process.stdin.write("hello\n")
    process.stdin.flush()
    process.send_signal(signal.SIGCONT)
    assert process.stdout.readline() == "hello\n"
    hosts.signal("a", signal.SIGSTOP)
    hosts.signal("a", signal.SIGCONT)
    with process:
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    until(lambda: set(hosts.outer_pids("a")) == {1})


def test_a_process_that_was_stopped_from_outside_goes_on_and_its_end_is_seen(hosts: Hosts) -> None:
    process = hosts.popen("a", "cat", stdin=-1, stdout=-1)
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.readline() == "hello\n"
    inner = next(pid for pid in map(int, _children(process.pid)))
    os.kill(inner, signal.SIGSTOP)
    until(lambda: _state(process.pid) == "T")  # nsenter stops itself with its child
    resume(inner)
    process.stdin.close()
    assert process.wait(timeout=30) == 0


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_killed_host_is_started_again_with_its_disk_and_address(hosts: Hosts) -> None:
    with ExitStack() as stack:
        senders = Senders(hosts, stack)
        hosts.run("b", "sh", "-c", f"echo kept > {DISK}/file; echo lost > /run/file")
        hosts.kill("b")
        assert [senders.senders["b"].returncode, senders.listeners["b"].returncode] == [-signal.SIGKILL] * 2
        hosts.start("b")
        assert hosts.run("b", "cat", f"{DISK}/file") == "kept\n"
        assert hosts.run("b", "ls", "/run") == ""
        again = hosts.popen("b", *PYTHON, LISTEN, stdout=-1)
        stack.enter_context(again)
        stack.callback(again.kill)
        assert again.stdout.readline() == "up\n"
        senders.listeners["b"] = again
        assert send_until_one_arrives(senders, "a", "b") == ["after"]


def test_nothing_is_left_when_who_made_the_hosts_is_killed(tmp_path: Path) -> None:
    program = """
from triptych.tools.hosts import Hosts
hosts = Hosts(("a", "b")).__enter__()
hosts.popen("a", "sleep", "1000")
hosts.switch.delay("b", 0.01)
input(" ".join(str(pid) for host in hosts.names for pid in hosts.outer_pids(host).values()) + "\\n")
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as maker:
        pids = [int(pid) for pid in maker.stdout.readline().split()]
        descriptors = [os.pidfd_open(pid) for pid in pids]
        maker.kill()
    assert len(pids) >= 2
    for descriptor in descriptors:
        with suppress(InterruptedError):
            assert select.select([descriptor], [], [])[0]
        os.close(descriptor)


def test_what_is_missing_is_said_with_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("triptych.tools.hosts.namespaces.search_path", lambda: str(tmp_path))
    sentence = why_unsupported.__wrapped__()
    assert "nft" in sentence
    assert "apt-get install iproute2 nftables util-linux" in sentence
