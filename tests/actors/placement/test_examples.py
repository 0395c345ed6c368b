"""The files in `examples/` and the Containerfile that start supervisors, as far as that goes without their engines."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from triptych.actors.command import app
from triptych.actors.placement.kubernetes import USER

ROOT = Path(__file__).parents[3]
UNIT = ROOT / "examples" / "triptych@.service"
SLURM = ROOT / "examples" / "slurm.sh"


def options_of_up() -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, ["up", "--help"], terminal_width=200).output)


def faults_of_unit(text: str, folder: Path) -> str:
    """What systemd says against a unit, in which a program and a user of this machine stand."""
    here = re.sub(r"(?m)^User=.*\n", "", text).replace("/opt/triptych/bin/triptych", sys.executable)
    unit = folder / "triptych@b.service"
    unit.write_text(here)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_takes_the_unit_and_finds_a_planted_fault(tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert faults_of_unit(text, tmp_path) == ""
    assert "WatchdogSecs" in faults_of_unit(text.replace("WatchdogSec=", "WatchdogSecs="), tmp_path)


def test_the_unit_runs_an_option_that_there_is() -> None:
    command = next(line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart="))
    words = shlex.split(command.partition("=")[2])
    assert words[:2] == ["/opt/triptych/bin/triptych", "up"]
    assert all(word in options_of_up() for word in words if word.startswith("--"))


def test_the_script_for_slurm_submits_a_job_for_each_host(tmp_path: Path) -> None:
    """A program in place of sbatch takes what it is given; a real Slurm is in tests/placement."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/"$2".words; bash -n || echo broken > {tmp_path}/bad\n'
    )
    sbatch.chmod(0o755)
    (tmp_path / "t x.toml").touch()
    command = ["bash", "-eu", SLURM, tmp_path / "t x.toml", "b", "c"]
    subprocess.run(command, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path)
    words = (tmp_path / "--nodelist=c.words").read_text().splitlines()
    assert {"--nodelist=c", "--requeue", "--ntasks=1"} <= set(words)
    assert not (tmp_path / "bad").exists()


def test_the_image_copies_what_is_there_and_runs_as_the_user_of_the_manifests() -> None:
    lines = (ROOT / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    links = [link.name for link in (ROOT / "triptych").iterdir() if link.is_symlink()]
    assert set(links) <= set(copied)
    assert f"USER {USER}:{USER}" in lines
