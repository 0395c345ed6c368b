"""The report of a GPU: its runner and its page, and on the CPU every row with tiny shapes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

from triptych.tools.gpu_report import __main__ as command
from triptych.tools.gpu_report import gpu_tests
from triptych.tools.gpu_report.models import scratch_folders
from triptych.tools.gpu_report.page import page
from triptych.tools.gpu_report.published_figures import FIGURES
from triptych.tools.gpu_report.report import GpuReport, Measured, RowResult, Status, read, write
from triptych.tools.gpu_report.row_context import RowContext, RowFailedError, Settings
from triptych.tools.gpu_report.row_process import RowEnd, run
from triptych.tools.gpu_report.rows import ROWS, chosen
from triptych.tools.gpu_report.runner import ROOT, RowRunner, environment, run_process

BOUND_S = 60.0
ROW = ROWS[0]
LATE = RowEnd(Status.FAILED, "late")
TELL = 'import os, sys, time; tell = lambda line: os.write(int(sys.argv[1]), line.encode() + b"\\n"); '
VALUE = '{"measured": {"what": "speed", "value": 3.0}}'


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="triptych-gpu-test-"))
    yield folder
    for place in (folder, *scratch_folders(folder)):
        shutil.rmtree(place, ignore_errors=True)


def test_every_row_has_its_function() -> None:
    assert all(callable(row.load()) for row in ROWS)


def process_of(program: str, tmp_path: Path, limit_s: float = BOUND_S) -> RowResult:
    result = RowResult("machine", "The machine", Status.FAILED)
    return run_process(
        result,
        lambda descriptor: [sys.executable, "-c", TELL + program, str(descriptor)],
        limit_s,
        LATE,
        tmp_path / "log",
    )


# The runner ---------------------------------------------------------------------------------------------------------


def test_a_crash_leaves_what_was_measured_before_it(tmp_path: Path) -> None:
    result = process_of(f"tell('{VALUE}'); os.kill(os.getpid(), 9)", tmp_path)
    assert result.values == [Measured("speed", 3.0)]
    assert result.status is Status.FAILED
    assert "killed" in result.reason


def test_a_process_that_dies_without_a_word_is_told_of_by_its_log(tmp_path: Path) -> None:
    result = process_of("print('a line'); sys.exit('no such GPU')", tmp_path)
    assert result.reason == "Its process ended with code 1: no such GPU"
    assert "a line" in (tmp_path / "log").read_text()


def test_a_row_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    program = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
tell('{VALUE}'.replace("3.0", str(child.pid)))
time.sleep(600)"""
    result = process_of(program, tmp_path, limit_s=2.0)
    assert result.reason == "late"
    (started,) = result.values
    assert isinstance(started.value, float)
    until = time.monotonic() + BOUND_S
    while Path(f"/proc/{started.value:.0f}/exe").exists():
        assert time.monotonic() < until, "the child of the row lives on"


def test_a_row_says_how_it_has_ended(tmp_path: Path) -> None:
    told = '{"ended": {"status": "skipped", "reason": "The GPU is too small."}}'
    result = process_of(f"tell('{told}'); time.sleep(600)", tmp_path)
    assert (result.status, result.reason) == (Status.SKIPPED, "The GPU is too small.")
    assert result.seconds < BOUND_S


def test_a_row_is_not_begun_where_the_time_is_short(tmp_path: Path) -> None:
    settings = Settings("cuda:0", True, str(tmp_path), 0.0)
    ((_, measure),) = RowRunner(settings, 20.0, tmp_path / "log", lambda measured: None).rows(chosen("flux"))
    result = measure()
    assert (result.status, result.title) == (Status.SKIPPED, "FLUX.1-dev in one process, random weights, full shapes")
    assert "it takes about 90" in result.reason


def test_roles_find_what_is_not_installed() -> None:
    assert environment({"PYTHONPATH": "/site"})["PYTHONPATH"] == f"{ROOT}:/site"
    assert environment({})["PYTHONPATH"] == str(ROOT)


def test_what_a_row_raises_becomes_a_sentence(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this is about a machine without a GPU")
    ended = run(ROW, Settings("cuda:0", True, str(tmp_path), 1.0), lambda measured: None)
    assert ended == RowEnd(Status.FAILED, f"torch {torch.__version__} finds no cuda:0 here.")


# The page -----------------------------------------------------------------------------------------------------------


def report(device: str, shapes: str) -> GpuReport:
    machine = RowResult("machine", "The machine", Status.DONE, values=[Measured("GPU", "NVIDIA H200")])
    flux = RowResult(
        "flux", "FLUX.1-dev", Status.DONE, values=[Measured("an image, our engine", 5.43, "s", "28 steps")]
    )
    wan = RowResult("wan", "Wan", Status.FAILED, "It was still running after 90 s.")
    return GpuReport(
        device, shapes, "2026-11-21T18:00:00+00:00", 540.0, ["compiled denoisers"], 500.0, [machine, flux, wan]
    )


def test_the_page_of_a_gpu_has_the_figures_of_others_beside_ours() -> None:
    text = page(report("cuda:0", "full"))
    assert "| an image, our engine | 5.43 s | 28 steps | 3.82 s | SGLang-Diffusion, H200; https" in text
    assert "cuda:0 (NVIDIA H200) with compiled denoisers" in " ".join(text.split())
    assert "| Wan | failed | It was still running after 90 s. |" in text
    assert "Nothing has been measured" not in text


def test_the_page_of_a_cpu_says_that_nothing_was_measured_on_a_gpu() -> None:
    text = page(report("cpu", "tiny"))
    assert "**Nothing has been measured on a GPU yet.**" in text
    assert "SGLang" not in text


def test_the_figures_of_others_stand_beside_rows_that_there_are() -> None:
    assert {row for row, _ in FIGURES} <= {row.name for row in ROWS}


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(report("cuda:0", "full"), tmp_path / "gpu.json")
    assert read(tmp_path / "gpu.json") == report("cuda:0", "full")
    assert command.main(["--from", str(tmp_path / "gpu.json"), "--page", str(tmp_path / "gpu.md")]) == 0
    assert (tmp_path / "gpu.md").read_text() == page(report("cuda:0", "full"))


# The command --------------------------------------------------------------------------------------------------------


def test_a_row_that_fails_gives_the_command_another_exit_status(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this is about a machine without a GPU")
    arguments = ["--only", "machine", "-o", tmp_path / "gpu.json", "--page", tmp_path / "p"]
    program = [sys.executable, "-m", "triptych.tools.gpu_report", *arguments]
    found = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "finds no cuda:0 here" in found.stdout
    assert "| The machine | failed |" in (tmp_path / "p").read_text()


def test_an_interrupt_leaves_a_report_and_no_process(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "triptych.tools.gpu_report", "--device", "cpu", "--only", "kill,wan", "-o", output],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    until = time.monotonic() + BOUND_S
    while not output.exists():
        assert time.monotonic() < until
    process.send_signal(signal.SIGINT)
    assert process.wait(BOUND_S) == command.INTERRUPTED
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["name"], row["status"], row["reason"]) == ("kill", "skipped", "It was interrupted.")
    assert not list(tmp_path.glob("triptych-gpu-*"))


@pytest.mark.parametrize(
    "arguments", [["--only", "machine,nothing"], ["--from", "/nowhere", "--page", "p"], ["--from", "x"]]
)
def test_what_cannot_be_run_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert "error" in capsys.readouterr().err


# The rows -----------------------------------------------------------------------------------------------------------

SHOWN = {
    "machine": {"torch", "bfloat16 matrix product"},
    "image": {
        "an image, three processes",
        "bytes of three processes equal those of diffusers",
        "memory of denoiser-0",
    },
    "tests": {"tests that need a GPU"},
    "hop": {"pool pinned", "hop, 4 MiB"},
    "overlap": {"both at once"},
    "kill": {"kill -9 to the next step, with a second denoiser", "kill -9 to the next step, with no other denoiser"},
    "flux": {"a step, our engine", "bytes of our engine equal those of diffusers' blocks"},
    "roles": {"an image", "bytes equal those of one process", "kill -9 to the next step, with no other denoiser"},
    "qwen": {"a step at batch 1", "a step at batch 2"},
    "wan": {"a step of 32 x 32, 5 frames", "decoding 32 x 32, 5 frames"},
    "attention": {"a step with native", "a step with _native_math", "backend flash"},
    "compile": {"first step, with compilation", "a step, compiled"},
}


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_measures(row: object, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = [known for known in ROWS if known is row]
    monkeypatch.setattr(gpu_tests, "FOLDERS", ("tests/engines/test_streams_gpu.py",))
    monkeypatch.setenv("TRIPTYCH_LOG_LEVEL", "warning")
    values: list[Measured] = []
    with attention_backend("native"):  # a row has a process of its own, and sets the backend of the whole process
        ended = run(one, Settings("cpu", False, str(scratch), 400.0), values.append)
    assert ended == RowEnd(Status.DONE)
    shown = {measured.what: measured.value for measured in values}
    assert shown.keys() >= SHOWN[one.name]
    assert not [what for what, value in shown.items() if value == "no"]


def test_the_options_change_the_denoisers(scratch: Path) -> None:
    values: list[Measured] = []
    settings = Settings("cpu", False, str(scratch), 100.0, attention="_native_math")
    with attention_backend("native"):  # as above
        assert run(chosen("flux")[0], settings, values.append) == RowEnd(Status.DONE)
    (note,) = [measured.note for measured in values if measured.what == "an image, our engine"]
    assert "attention _native_math" in note


def test_failures_of_tests_are_named() -> None:
    xml = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1" time="2.5">
        <testcase name="one"/>
        <testcase name="two"><failure>no</failure></testcase>
        <testcase name="three"><skipped/></testcase>
    </testsuite></testsuites>"""
    values: list[Measured] = []
    with pytest.raises(RowFailedError, match="Failed: two"):
        gpu_tests.report(RowContext(Settings("cuda:0", True, "", 1.0), values.append), xml)
    assert [measured.value for measured in values] == [1.0, 1.0, 1.0]
