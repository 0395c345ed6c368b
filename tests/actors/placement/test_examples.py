"""The files in `examples/` and the Containerfile that start supervisors, as far as that goes without their engines."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from triptych.actors.command import app
from triptych.actors.placement.kubernetes import USER

ROOT = Path(__file__).parents[3]
UNIT = ROOT / "examples" / "triptych@.service"
SLURM = ROOT / "examples" / "slurm.sh"
CLIENT = ROOT / "examples" / "clients" / "generate.sh"


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
    """Programs in place of sbatch and srun take what they are given; a real Slurm is in tests/placement."""
    programs = {
        "sbatch": f'printf "%s\\n" "$@" > {tmp_path}/"$2".words; host=${{2#*=}} bash || [ $? = 2 ]',
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/"$host".run; exit 2',
    }
    for name, text in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    file = tmp_path / "t $(touch 'bad') \"x\".toml"
    file.touch()
    command = ["bash", "-eu", SLURM, file, "b", "c"]
    subprocess.run(command, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path)
    words = (tmp_path / "--nodelist=c.words").read_text().splitlines()
    assert {"--nodelist=c", "--requeue", "--ntasks=1"} <= set(words)
    for host in "bc":
        run = (tmp_path / f"{host}.run").read_text().splitlines()
        assert run == ["--cpu-bind=none", "triptych", "up", str(file), "--host", host]
    assert not (tmp_path / "bad").exists()


def test_the_image_copies_what_is_there_and_runs_as_the_user_of_the_manifests() -> None:
    lines = (ROOT / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    links = [link.name for link in (ROOT / "triptych").iterdir() if link.is_symlink()]
    assert set(links) <= set(copied)
    assert f"USER {USER}:{USER}" in lines


def test_the_image_has_what_a_topology_can_ask_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = (re.findall(r"^triptych\[(.*)\]$", line) for line in extras["dev"] if line.startswith("triptych["))
    (installed,) = re.findall(r'"\.\[\$MOONCAKE,(.*)\]"', (ROOT / "Containerfile").read_text())
    assert installed.split(",") == wanted[0].split(",")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")
def test_the_client_with_curl_shows_nobody_its_key(tmp_path: Path) -> None:
    key = r'a-"key"-with\signs'
    seen: list[object] = []

    class Api(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.extend([self.headers["Authorization"], body["prompt"], _shown_to_everybody("signs")])
            answer = json.dumps({"data": [{"b64_json": base64.b64encode(b"png").decode()}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        environment = {"PATH": os.environ["PATH"], "TRIPTYCH_URL": url, "TRIPTYCH_API_KEY": key}
        command = ["sh", CLIENT, r'a "red" \circle', tmp_path / "x.png"]
        subprocess.run(command, check=True, env=environment, timeout=60)
        server.shutdown()
    assert seen == [f"Bearer {key}", r'a "red" \circle', []]
    assert (tmp_path / "x.png").read_bytes() == b"png"


def _shown_to_everybody(part: str) -> list[str]:
    """The command lines of this machine that have a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(file.read_text(errors="replace"))
    return [line for line in found if part in line and "curl" in line]
