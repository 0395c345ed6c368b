"""The supervisor with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import stat
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.actors.conftest import THREE_ROLES
from tests.actors.supervision.probe import Crash, CrashInTask, Hang, LeaveOrphan, OrphanLeft, Pong
from tests.actors.supervision.supervised import PATIENCE_S, Supervised, gone, supervised
from tests.ports import free_ports
from triptych.actors import load_topology
from triptych.actors.command import app
from triptych.actors.runtime.system_messages import (
    Inspect,
    Inspection,
    LogPart,
    LogQuery,
    Shutdown,
    ShuttingDown,
    SupervisorReport,
    SupervisorWait,
)
from triptych.bus import BusError, UnreachableError
from triptych.tools.hosts import why_unsupported

Write = Callable[..., Path]
ROLES = ("encoder-0", "denoiser-0", "decoder-0")
ALL = ("pool", *ROLES, "head", "api")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario

    asyncio.run(bounded())


def supervision(**keys: object) -> str:
    lines = [f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in keys.items()]
    return "\n".join(["[supervision]", *lines, ""])


async def crash(seen: Supervised, name: str) -> None:
    with pytest.raises(BusError):
        await seen.ask(name, Crash("out of paper"), Pong)


def test_all_components_start_run_and_drain_in_reverse_order(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write()) as seen:
            before = await seen.all_ready()
            assert list(await seen.report()) == [c.name for c in seen.topology.components]
            for name, report in before.items():
                pong = await seen.ping(name)
                assert (pong.pid, pong.generation, pong.restarts) == (report.pid, report.generation, 0)
                assert pong.parent == seen.process.pid
            assert await seen.stop(signal.SIGINT) == 0
            order = [report.name for report in seen.reports if report.state == "stopped"]
            assert order == [c.name for c in reversed(seen.topology.components)]
            for name, report in before.items():
                assert (seen.topology.state_dir / f"{name}.drained").read_text() == str(report.generation)
            assert not seen.topology.run_dir.exists()

    run(scenario())


def test_the_part_of_one_host_answers_over_tcp_and_ends_with_its_stdin(write: Write) -> None:
    hosts = "".join(f'[[hosts]]\nname = "{name}"\naddress = "127.0.0.{n}"\n' for n, name in enumerate("ab", start=2))
    roles = THREE_ROLES.replace("kind", 'host = "a"\nkind').replace('"a"\nkind = "denoiser"', '"b"\nkind = "denoiser"')
    head = f'[head]\nhost = "a"\nport = {free_ports(9)}\n'

    async def scenario() -> None:
        file = write(f"{hosts}{head}[transfer]\ntrusted_network = true\n", roles)
        async with supervised(file, host="b") as seen:
            names = ("pool-b", "denoiser-0")
            before = await seen.all_ready(*names)
            assert list(await seen.report("supervisor-b")) == list(names)
            assert (seen.topology.run_dir / "supervisor-b").is_socket(), "its children report to it within the host"
            part = await seen.ask("supervisor-b", LogQuery("supervisor-b", ""), LogPart)
            assert "child has started" in part.lines
            assert (await seen.ask("supervisor-b", LogQuery("supervisor-b", part.position), LogPart)).lines == ""
            for other in ("encoder-0", "../bus.key"):
                assert await seen.ask("supervisor-b", LogQuery(other, "x"), LogPart) == LogPart("", "")
            command = ("logs", "denoiser", "--topology", str(file), "--host", "b")
            shown = await asyncio.to_thread(CliRunner().invoke, app, command)
            assert (shown.exit_code, "host a does not answer" in shown.stderr) == (0, True)
            assert "child=denoiser-0" in shown.stdout
            assert seen.process.stdin is not None
            seen.process.stdin.close()
            assert await seen.ended() == 0
            for name, report in before.items():
                assert (seen.topology.state_dir / f"{name}.drained").read_text() == str(report.generation)

    run(scenario())


def test_a_killed_child_comes_back_with_a_higher_generation(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(), *ROLES) as seen:
            before = await seen.all_ready(*ROLES)
            os.kill(before["denoiser-0"].pid, signal.SIGKILL)
            told = SupervisorReport((before["denoiser-0"],), -1)
            while told.children[0].state == "ready":  # it tells that it has started, too
                wait = SupervisorWait(told.revision, PATIENCE_S)
                told = await seen.ask("supervisor-denoiser-0", wait, SupervisorReport)
            assert (told.children[0].name, told.children[0].reason) == ("denoiser-0", "killed by SIGKILL")
            after = await seen.until("denoiser-0", "ready", after=before["denoiser-0"].generation)
            assert (after.restarts, after.reason) == (1, "killed by SIGKILL")
            file = str(seen.topology.path)
            command = ("logs", "denoiser-0", "--topology", file, "--json")
            shown = await asyncio.to_thread(CliRunner().invoke, app, command)
            lines = [json.loads(line) for line in shown.stdout.splitlines()]
            assert "killed by SIGKILL" in [line.get("reason") for line in lines]
            assert not [line for line in lines if line["process"] == "encoder-0"]
            assert (await seen.ping("denoiser-0")).pid == after.pid
            same = await seen.ask("supervisor-encoder-0", SupervisorWait(-1, 0.0), SupervisorReport)
            quiet = await seen.ask("supervisor-encoder-0", SupervisorWait(same.revision, 0.0), SupervisorReport)
            assert quiet.revision == same.revision, "nothing has changed"
            for sibling in ("encoder-0", "decoder-0"):
                assert (await seen.ping(sibling)).generation == before[sibling].generation

    run(scenario())


def test_a_crash_is_reported_with_what_was_raised(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(), "encoder-0") as seen:
            first = await seen.until("encoder-0", "ready")
            await crash(seen, "encoder-0")
            second = await seen.until("encoder-0", "ready", after=first.generation)
            assert second.reason == "exit code 70: ValueError: out of paper"
            command = ("logs", "encoder-0", "--level", "error", "--topology", str(seen.topology.path))
            shown = await asyncio.to_thread(CliRunner().invoke, app, command)
            assert "ValueError: out of paper" in shown.stdout, "what it logged is there though it has died"
            assert f"generation={first.generation}" in shown.stdout
            assert "[info" not in shown.stdout
            seen.tell("encoder-0", CrashInTask("out of ink"))
            third = await seen.until("encoder-0", "ready", after=second.generation)
            assert third.reason == "exit code 70: ValueError: out of ink"
            assert third.restarts == 2

    run(scenario())


def test_a_stopped_process_is_killed_for_its_silence_and_restarted(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(supervision(heartbeat_timeout_s=1.5)), "encoder-0") as seen:
            first = await seen.until("encoder-0", "ready")
            os.kill(first.pid, signal.SIGSTOP)
            second = await seen.until("encoder-0", "ready", after=first.generation)
            assert second.reason == "killed by SIGKILL: hung: no heartbeat for 1.5 s"

    run(scenario())


def test_silence_while_it_starts_is_no_hang_and_the_time_is_told(write: Write) -> None:
    async def scenario() -> None:
        file = write(supervision(heartbeat_timeout_s=1))
        state = load_topology(file).state_dir
        state.mkdir(parents=True)
        (state / "encoder-0.slow").touch()
        async with supervised(file, "encoder-0") as seen:
            assert (await seen.until("encoder-0", "ready")).restarts == 0
            told = await seen.logged("child has started", child="encoder-0")
            assert told["weights_s"] == 2.5
            assert told["start_s"] >= 2.5
            assert told["import_s"] > 0

    run(scenario())


def test_a_start_that_is_silent_for_longer_than_it_may_is_ended(write: Write) -> None:
    async def scenario() -> None:
        file = write(supervision(start_timeout_s=0.3, intensity=0))
        state = load_topology(file).state_dir
        state.mkdir(parents=True)
        (state / "encoder-0.slow").touch()
        async with supervised(file, "encoder-0", "head") as seen:
            left = await seen.until("encoder-0", "gave_up")
            assert left.reason.endswith("killed by SIGKILL: hung: no heartbeat for 0.3 s while it started")

    run(scenario())


def test_overdue_work_counts_as_hung_with_its_reason(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(supervision(heartbeat_timeout_s=1.5)), "encoder-0") as seen:
            first = await seen.until("encoder-0", "ready")
            seen.tell("encoder-0", Hang())
            second = await seen.until("encoder-0", "ready", after=first.generation)
            assert second.reason == "killed by SIGKILL: hung: encoder-0: step 3 takes too long"

    run(scenario())


def test_a_child_that_does_not_drain_is_killed(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(supervision(shutdown_s=0.3)), "encoder-0") as seen:
            first = await seen.until("encoder-0", "ready")
            os.kill(first.pid, signal.SIGSTOP)
            assert await seen.stop() == 0
            await seen.logged("child did not drain in time", child="encoder-0")
            await gone(first.pid)

    run(scenario())


def test_asking_twice_to_stop_kills(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(supervision(shutdown_s=3600)), "encoder-0") as seen:
            first = await seen.until("encoder-0", "ready")
            os.kill(first.pid, signal.SIGSTOP)
            seen.process.send_signal(signal.SIGINT)
            await seen.logged("stopping", reason="SIGINT")
            assert await seen.stop(signal.SIGINT) == 0
            await gone(first.pid)
            assert not seen.topology.run_dir.exists()

    run(scenario())


def test_a_killed_supervisor_leaves_no_orphan_and_its_successor_takes_over(write: Write) -> None:
    async def scenario() -> None:
        file = write()
        async with supervised(file, *ROLES) as seen:
            before = await seen.all_ready(*ROLES)
            zygote = (await seen.logged("zygote is warm"))["pid"]
            seen.process.kill()
            for pid in (zygote, *(report.pid for report in before.values())):
                await gone(pid)
        async with supervised(file, *ROLES) as again:
            after = await again.all_ready(*ROLES)
            assert all(after[name].generation > before[name].generation for name in ROLES)

    run(scenario())


def test_one_of_several_that_cannot_start_is_said_once_and_the_last_of_a_kind_ends_the_system(write: Write) -> None:
    async def scenario() -> None:
        file = write(roles=THREE_ROLES.replace('"denoiser"', '"denoiser"\ncount = 2'))
        state = load_topology(file).state_dir
        state.mkdir(parents=True)
        (state / "denoiser-0.broken").touch()
        async with supervised(file) as seen:
            failed = await seen.until("denoiser-0", "failed")
            assert failed.reason == "denoiser-0 has no model: give it one"
            ready = await seen.all_ready("encoder-0", "denoiser-1", "decoder-0", "head", "api")
            report = (await seen.report())["denoiser-0"]
            assert (report.state, report.restarts, report.pid) == ("failed", 0, 0)
            assert sum("child ended" in line for line in seen.lines) == 1
            (state / "denoiser-1.broken").touch()
            os.kill(ready["denoiser-1"].pid, signal.SIGKILL)
            assert await seen.ended() == 2
            assert [line for line in seen.lines if not line.startswith("{")] == [
                "denoiser-0 cannot start: denoiser-0 has no model: give it one\n"
            ]
            states = [report.state for report in seen.reports if report.name == "denoiser-0"]
            assert "backoff" not in states  # which is shown as "ended, starting it again"
            after = {r.name: r.state for r in seen.reports if r.name.startswith(("encoder", "decoder", "head", "api"))}
            assert set(after.values()) == {"stopped"}  # in order, as after Ctrl-C

    run(scenario())


def test_a_start_that_a_full_disk_prevents_is_tried_again_and_does_not_count(write: Write) -> None:
    async def scenario() -> None:
        file = write(supervision(intensity=0))
        state = load_topology(file).state_dir
        state.mkdir(parents=True)
        (state / "encoder-0.full").touch()
        async with supervised(file, "encoder-0") as seen:
            delayed = await seen.until("encoder-0", "delayed")
            assert delayed.reason == "OSError: [Errno 28] No space left on device"
            await seen.until("encoder-0", "delayed", after=delayed.generation)
            (state / "encoder-0.full").unlink()
            await seen.until("encoder-0", "ready")

    run(scenario())


def test_a_process_is_started_once_there_is_memory_for_it_and_nohup_is_honoured(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(supervision(intensity=1)), "encoder-0", under=("/usr/bin/nohup",)) as seen:
            before = await seen.until("encoder-0", "ready")
            limits = resource.prlimit(seen.process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(seen.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
            os.kill(before.pid, signal.SIGKILL)
            delayed = await seen.until("encoder-0", "delayed")
            assert delayed.reason == "no process could be started: Too many open files"
            resource.prlimit(seen.process.pid, resource.RLIMIT_NOFILE, limits)
            after = await seen.until("encoder-0", "ready", after=delayed.generation)
            seen.process.send_signal(signal.SIGHUP)
            assert (await seen.ping("encoder-0")).pid == after.pid
            assert await seen.stop() == 0
            await seen.logged("stopping", reason="SIGTERM")

    run(scenario())


def test_a_supervisor_with_nothing_left_to_run_ends(write: Write) -> None:
    async def scenario() -> None:
        file = write()
        state = load_topology(file).state_dir
        state.mkdir(parents=True)
        (state / "encoder-0.broken").touch()
        async with supervised(file, "encoder-0") as seen:
            assert await seen.ended() == 2
            assert seen.reports[-1].state == "failed"

    run(scenario())


def test_a_child_that_always_crashes_is_given_up(write: Write) -> None:
    async def scenario() -> None:
        file = write(supervision(intensity=2, period_s=600))
        state = load_topology(file).state_dir
        state.mkdir(parents=True)
        (state / "encoder-0.crashing").touch()
        async with supervised(file, "encoder-0", "head") as seen:
            left = await seen.until("encoder-0", "gave_up")
            assert left.restarts == 2
            assert "restarted 2 times within 600 s" in left.reason
            assert "RuntimeError: crashes whenever it starts" in left.reason
            await seen.until("head", "ready")
            assert (await seen.report("supervisor-encoder-0"))["encoder-0"] == left

    run(scenario())


@pytest.mark.parametrize(("strategy", "restarted"), [("one_for_all", ALL), ("rest_for_one", ALL[2:])])
def test_siblings_are_really_restarted_together(write: Write, strategy: str, restarted: tuple[str, ...]) -> None:
    async def scenario() -> None:
        async with supervised(write(supervision(strategy=strategy))) as seen:
            before = await seen.all_ready()
            os.kill(before["denoiser-0"].pid, signal.SIGKILL)
            for name in restarted:
                await seen.until(name, "ready", after=before[name].generation)
            report = await seen.report()
            changed = [name for name in before if report[name].generation != before[name].generation]
            assert changed == list(restarted)
            assert (seen.topology.state_dir / "head.drained").read_text() == str(before["head"].generation)

    run(scenario())


def test_a_temporary_child_is_left_and_a_shutdown_brings_a_permanent_one_back(write: Write) -> None:
    async def scenario() -> None:
        roles = '[[roles]]\nkind = "monolithic"\nrestart = "temporary"\n'
        async with supervised(write(roles=roles), "monolithic-0", "head") as seen:
            before = await seen.all_ready("monolithic-0", "head")
            for name in before:
                with suppress(UnreachableError):  # it may have ended before its answer was read
                    assert await seen.ask(name, Shutdown("rolling"), ShuttingDown) == ShuttingDown()
            left = await seen.until("monolithic-0", "stopped")
            assert left.reason == "exit code 0"
            await seen.until("head", "ready", after=before["head"].generation)

    run(scenario())


def test_a_killed_zygote_ends_no_child_and_is_started_again(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(), *ROLES[:2]) as seen:
            before = await seen.all_ready(*ROLES[:2])
            zygote = (await seen.logged("zygote is warm"))["pid"]
            os.kill(zygote, signal.SIGKILL)
            ended = await seen.logged("zygote ended, starting a new one", pid=zygote)
            assert ended["ending"] == "killed by SIGKILL"
            for name, report in before.items():
                assert (await seen.ping(name)).pid == report.pid
            os.kill(before["encoder-0"].pid, signal.SIGKILL)
            after = await seen.until("encoder-0", "ready", after=before["encoder-0"].generation)
            assert (await seen.ping("encoder-0")).parent == seen.process.pid
            assert after.pid != before["encoder-0"].pid
            assert not any("starting a fresh interpreter" in line for line in seen.lines)

    run(scenario())


def test_what_a_dead_child_had_started_does_not_outlive_it(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(), "encoder-0") as seen:
            first = await seen.until("encoder-0", "ready")
            orphan = await seen.ask("encoder-0", LeaveOrphan(), OrphanLeft)
            os.kill(first.pid, signal.SIGKILL)
            await gone(orphan.pid)
            await seen.until("encoder-0", "ready", after=first.generation)

    run(scenario())


def only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def until_reaped(entry: Path) -> None:
    while entry.exists():  # as that of a zombie would for ever
        time.sleep(0.05)


def test_as_the_first_process_of_a_container_it_reaps_what_others_have_left(write: Write) -> None:
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    under = ("unshare", *user, "--pid", "--fork", "--kill-child", "--mount-proc")
    assert why_unsupported() == ""

    async def scenario() -> None:
        async with supervised(write(), "encoder-0", under=under) as seen:
            await seen.until("encoder-0", "ready")
            assert (await seen.ping("encoder-0")).parent == 1
            orphan = await seen.ask("encoder-0", LeaveOrphan(), OrphanLeft)
            first = only_child(seen.process.pid)
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.to_thread(until_reaped, Path(f"/proc/{first}/root/proc/{orphan.pid}"))
            os.kill(first, signal.SIGTERM)
            assert await seen.ended() == 0

    run(scenario())


def test_components_run_on_their_own_find_each_other_and_each_runs_once(write: Write) -> None:
    async def scenario() -> None:
        file = write()
        async with supervised(file, "decoder-0") as one, supervised(file, "encoder-0") as other:
            await one.until("decoder-0", "ready")
            encoder = await other.until("encoder-0", "ready")
            assert (await one.ping("encoder-0")).pid == encoder.pid
            assert list(await other.report("supervisor-decoder-0")) == ["decoder-0"]
            async with supervised(file, "encoder-0") as second:
                assert await second.ended() != 0
                assert any("encoder-0 is already running here" in line for line in second.lines)
            assert (await one.ping("encoder-0")).pid == encoder.pid

    run(scenario())


def test_a_second_system_on_the_same_folders_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(file: Path, sentence: str, **environment: str) -> None:
        with monkeypatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            async with supervised(file, "decoder-0") as second:
                assert await second.ended() != 0
                assert any(sentence in line for line in second.lines)

    async def scenario() -> None:
        monkeypatch.setenv("TRIPTYCH_STATE_DIR", str(write().parent / "shared"))
        file = write()
        another = file.with_name("another.toml")
        another.write_text(file.read_text())
        async with supervised(file, "encoder-0") as first:
            ready = await first.until("encoder-0", "ready")
            (first.topology.run_dir / "owner.json").unlink()  # as a cleaner of /tmp does
            elsewhere = file.parent / "else"
            elsewhere.mkdir(mode=0o700)
            await refused(another, "cluster.toml (process")
            await refused(file, "set the same XDG_RUNTIME_DIR", XDG_RUNTIME_DIR=str(elsewhere))
            async with supervised(file, "encoder-0") as second:
                assert await second.ended() != 0
                assert any("encoder-0 is already running here" in line for line in second.lines)
            assert (await first.ping("encoder-0")).pid == ready.pid
            state = first.topology.state_dir
            assert stat.S_IMODE(state.stat().st_mode) == 0o700
            assert all(not file.stat().st_mode & 0o077 for file in state.rglob("*"))

    run(scenario())


def test_sigusr1_shows_tasks_and_mailboxes_of_any_process(write: Write) -> None:
    async def scenario() -> None:
        async with supervised(write(), "encoder-0") as seen:
            ready = await seen.until("encoder-0", "ready")
            os.kill(ready.pid, signal.SIGUSR1)
            await seen.printed("encoder-0 generation")
            await seen.printed("task encoder-0:handlers")
            seen.process.send_signal(signal.SIGUSR1)
            await seen.printed("task supervisor-encoder-0:heartbeats")
            (status,) = (await seen.ask("encoder-0", Inspect(), Inspection)).actors
            assert (status.pid, status.kind, status.facts) == (ready.pid, "encoder", {"credits": 3})

    run(scenario())
