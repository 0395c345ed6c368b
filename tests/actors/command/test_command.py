"""The `triptych` command, as far as it goes without a model; whole clusters are in tests/system."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.actors.conftest import THREE_ROLES
from tests.actors.supervision.supervised import ROOT
from tests.ports import free_ports
from triptych.actors import TopologyError, load_topology
from triptych.actors.command import app
from triptych.actors.command._display import Display, LiveDisplay, _until_ready, line
from triptych.actors.command._progress import API_AWAY_TIMEOUT_S, wait_until_finished
from triptych.actors.command.generate import output_paths, parse_settings, preview_path
from triptych.actors.command.preflight import has_accelerator
from triptych.actors.command.reload import summarize
from triptych.actors.command.status import render
from triptych.actors.runtime.log_files import log_path
from triptych.actors.runtime.system_messages import ChildReport
from triptych.actors.supervision import module_command
from triptych.actors.topology import free_port
from triptych.api.client import ClientError, GeneratedImage, format_of, read_images, request_body
from triptych.api.launch import cannot_become_ready, describe_children, launch
from triptych.roles.messages.weights import Reloading

Write = Callable[..., Path]
runner = CliRunner()


TWO_HOSTS = "".join(f'[[hosts]]\nname = "{name}"\naddress = "127.0.0.{n}"\n' for n, name in enumerate("ab", start=2))
TWO_HOSTS += '[head]\nhost = "a"\n'


def report(name: str, state: str, reason: str = "", pid: int = 7) -> ChildReport:
    return ChildReport(name, name.partition("-")[0], pid, 1, state, 0, reason, 0.0)


def test_a_full_disk_under_what_it_prints_ends_nothing(write: Write) -> None:
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 - closing it fails, too
    topology = load_topology(write())
    display = Display(Console(file=full), topology)
    with display.showing(topology.components):
        display.changed(report("denoiser-0", "ready"))
        display.ready("Ready")
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.parametrize("option", [("--host", "a"), ("--only", "head"), ("--ssh",)])
def test_ray_is_asked_for_all_hosts_and_alone(write: Write, option: tuple[str, ...]) -> None:
    done = runner.invoke(app, ["up", str(write()), "--ray", "127.0.0.1:1", *option])
    assert (done.exit_code, "leave out --host, --only and --ssh" in " ".join(done.output.split())) == (2, True)


def test_every_command_has_an_example_in_its_help() -> None:
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert {"up", "check", "status", "generate"} < set(commands)
    for command in commands:
        showing = runner.invoke(app, [command, "--help"])
        assert showing.exit_code == 0
        assert "Example" in showing.stdout
        assert f"triptych {command} " in showing.stdout
        assert " [] " not in showing.stdout, "[[hosts]] is markup unless it is written with a backslash"
        assert "(image.png" not in showing.stdout, "a default in brackets reads as a pair"


def test_the_page_on_running_a_system_has_every_command() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert not [name for name in names if f"`triptych {name}" not in page]


def test_the_command_alone_shows_help_and_says_its_version() -> None:
    assert "generate" in runner.invoke(app, []).output
    showing = runner.invoke(app, ["--version"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (showing.exit_code, showing.stdout) == (0, f"triptych {project['version']}\n")


def test_ctrl_c_ends_a_command_with_one_word(folder: Path) -> None:
    file = folder / "t.toml"
    os.mkfifo(file)
    command = (*module_command("triptych.actors.command"), "check", str(file))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with process, file.open("wb"):  # which opens as soon as the command reads it
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "Interrupted.\n")


@pytest.mark.parametrize(
    ("joined", "total", "said"),
    [
        (3, 3, "All 3 instances have the weights that are on disk (v1)."),
        (2, 3, "2 of 3 instances have the weights that are on disk (v1); the others load them when they start."),
        (0, 3, "No instance has joined the head: each loads the weights that are on disk (v1) when it starts."),
    ],
)
def test_a_reload_says_who_has_the_weights(joined: int, total: int, said: str) -> None:
    assert summarize(Reloading("v1", (), joined, total)) == said


def test_check_lists_the_components(write: Write) -> None:
    file = write()
    showing = runner.invoke(app, ["check", str(file)])
    assert showing.exit_code == 0
    rows = [row.split() for row in showing.stdout.splitlines()]
    assert rows[0] == ["name", "kind", "address", "device"]
    address = load_topology(file).component("denoiser-0").address
    assert ["denoiser-0", "denoiser", address, "cpu"] in rows
    assert [row[0] for row in rows[1:-2]] == ["pool", "encoder-0", "denoiser-0", "decoder-0", "head", "api"]
    assert rows[-1][:7] == ["A", "pool", "of", "256MiB", "takes", "up", "to"]
    assert rows[-1][7] == "134,217,728"


def test_check_says_what_each_host_runs_and_looks_at_this_machine_alone(write: Write) -> None:
    roles = THREE_ROLES.replace("kind", 'host = "b"\nkind').replace('"b"\nkind = "encoder"', '"a"\nkind = "encoder"')
    file = write(f"{TWO_HOSTS}[transfer]\ntrusted_network = true\n", roles + 'device = "cuda"\n')
    showing = runner.invoke(app, ["check", str(file)])
    assert showing.exit_code == 0, showing.stderr
    rows = [row.split() for row in showing.stdout.splitlines()]
    assert rows[1] == [
        "a", "127.0.0.2", "encoder-0,", "head,", "api", "pool-a,", "256MiB", "21000-21015", "tcp://127.0.0.2:5562",
    ]  # fmt: skip
    assert ["decoder-0", "b", "decoder", "tcp://127.0.0.3:5560", "cuda"] in rows
    if not has_accelerator():
        showing = runner.invoke(app, ["check", str(file), "--host", "b"])
        assert (showing.exit_code, "shows no such device" in showing.stderr) == (2, True)
    showing = runner.invoke(app, ["check", str(file), "--host", "z"])
    assert (showing.exit_code, "no host is called 'z'" in showing.stderr) == (2, True)


def test_check_says_what_is_wrong_for_people_and_for_programs_with_one_exit_code(write: Write) -> None:
    file = write()
    showing = runner.invoke(app, ["check", str(file), "--model"])
    assert showing.exit_code == 2
    assert "is not a diffusers model: it has no model_index.json" in showing.stderr
    assert "denoiser-0" in showing.stdout
    showing = runner.invoke(app, ["check", str(file), "--model", "--json"])
    told = json.loads(showing.stdout)
    assert (showing.exit_code, told["ok"]) == (2, False)
    assert [(problem["where"], problem["fatal"]) for problem in told["models"][0]["problems"]] == [("index", True)]
    showing = runner.invoke(app, ["check", str(write("[head]\ndispatch = 'robin'\n")), "--json"])
    told = json.loads(showing.stdout)
    assert (showing.exit_code, told["ok"], told["models"]) == (2, False, [])
    assert 'dispatch = "robin" is not known' in told["problem"]


def test_check_says_as_json_that_models_cannot_be_looked_at(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["triptych.actors.command.check"], "CHECK_MODEL", "no_such_module:check")
    showing = runner.invoke(app, ["check", str(write()), "--model", "--json"])
    told = json.loads(showing.stdout)
    assert (showing.exit_code, told["ok"], told["models"]) == (2, False, [])
    assert "no_such_module:check cannot be imported" in told["problem"]
    showing = runner.invoke(app, ["check", str(write()), "--model"])
    assert (showing.exit_code, "no_such_module:check cannot be imported" in showing.stderr) == (2, True)


@pytest.mark.parametrize("command", ["check", "up", "status"])
def test_a_broken_topology_is_one_sentence_and_exit_code_2(write: Write, command: str) -> None:
    showing = runner.invoke(app, [command, str(write("[head]\ndispatch = 'robin'\n"))])
    assert showing.exit_code == 2
    assert showing.stderr.count("\n") == 1
    assert 'dispatch = "robin" is not known' in showing.stderr


def test_up_refuses_an_unknown_component_and_a_missing_model(write: Write) -> None:
    showing = runner.invoke(app, ["up", str(write()), "--only", "denoiser"])
    assert showing.exit_code == 2
    assert "no component is called 'denoiser'" in showing.stderr
    showing = runner.invoke(app, ["up", str(write(model='[model]\npath = "nowhere"\n'))])
    assert showing.exit_code == 2
    assert 'path = "nowhere" does not exist' in showing.stderr


def test_up_says_what_to_type_for_several_hosts(write: Write) -> None:
    file = write(TWO_HOSTS, THREE_ROLES.replace("kind", 'host = "b"\nkind'))
    for options, sentence in (
        ((), f"has 2 hosts (a, b): run `triptych up {file} --host NAME` on each"),
        (("--host", "c"), "no host is called 'c'"),
        (("--host", "a", "--only", "head"), "cannot be run with both --host a and --only head"),
        (("--only", "head,decoder-0"), "which are on the hosts a and b: name components of one host"),
    ):
        showing = runner.invoke(app, ["up", str(file), *options])
        assert (showing.exit_code, sentence in showing.stderr) == (2, True), showing.stderr
    showing = runner.invoke(app, ["up", str(write()), "--host", "a"])
    assert (showing.exit_code, "has no [[hosts]]: run it without --host" in showing.stderr) == (2, True)


def test_up_says_when_this_machine_is_not_the_host(write: Write) -> None:
    file = write(TWO_HOSTS.replace("127.0.0.", "192.0.2."), THREE_ROLES.replace("kind", 'host = "b"\nkind'))
    showing = runner.invoke(app, ["up", str(file), "--host", "b"])
    problem = '[[hosts]] "b" address = "192.0.2.3" cannot be listened on by this machine (Cannot assign requested'
    assert (showing.exit_code, problem in showing.stderr) == (1, True), showing.stderr


def test_a_host_without_components_waits_for_its_end(write: Write) -> None:
    third = '[[hosts]]\nname = "c"\naddress = "127.0.0.4"\n'
    file = write(f"{third}{TWO_HOSTS}port = {free_ports(9)}\n", THREE_ROLES.replace("kind", 'host = "b"\nkind'))
    command = (*module_command("triptych.actors.command"), "up", str(file), "--host", "c", "--until-eof")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Ready, with no component of the topology on this host, after")
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_launch_starts_one_machine(write: Write) -> None:
    file = write(TWO_HOSTS, THREE_ROLES.replace("kind", 'host = "b"\nkind'))
    with pytest.raises(TopologyError, match="has 2 hosts, and this starts one machine: start each with `triptych up"):
        asyncio.run(launch(file).__aenter__())


def test_without_a_server_the_sentence_says_so(folder: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for command in (["status", "--url", url], ["generate", "a cat", "-o", str(folder / "cat.png"), "--url", url]):
        showing = runner.invoke(app, command)
        assert showing.exit_code == 1
        assert f"{url} cannot be reached" in showing.stderr
        assert "is `triptych up` running?" in showing.stderr
    assert not list(folder.iterdir())


def test_a_file_that_is_given_goes_before_the_url_of_the_environment(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("TRIPTYCH_URL", "http://127.0.0.1:1")
    file = str(write(f"[api]\nport = {url.rpartition(':')[2]}\n"))
    for command in (["status", file], ["generate", "a cat", "--topology", file]):
        assert f"{url} cannot be reached" in runner.invoke(app, command).stderr
    assert "http://127.0.0.1:1 cannot be reached" in runner.invoke(app, ["status"]).stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://127.0.0.1:99999", "127.0.0.1:8000", "http://"])
def test_what_is_no_url_is_one_sentence(url: str) -> None:
    for command in (["status", "--url", url], ["generate", "a cat", "--url", url], ["bench", url]):
        showing = runner.invoke(app, command)
        assert (showing.exit_code, showing.stderr) == (
            1, f"{url.rstrip('/')!r} is no URL: write it as in http://127.0.0.1:8000\n",
        )  # fmt: skip


def test_a_key_that_no_header_can_have_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_API_KEY", "schl\u00fcssel")
    for command in (["status"], ["generate", "a cat"], ["bench"]):
        showing = runner.invoke(app, command)
        assert (showing.exit_code, "TRIPTYCH_API_KEY holds no key" in showing.stderr) == (1, True)


def test_generate_wants_a_folder_that_is_there(folder: Path) -> None:
    showing = runner.invoke(app, ["generate", "a cat", "-o", str(folder / "none" / "cat.png")])
    assert showing.exit_code == 1
    assert "make it first" in showing.stderr


def test_a_request_says_only_what_was_given() -> None:
    body = request_body("a cat", size=None, steps=4, seed=0, extra={"guidance_scale": 2.0})
    assert body == {
        "prompt": "a cat",
        "n": 1,
        "response_format": "b64_json",
        "num_inference_steps": 4,
        "seed": 0,
        "guidance_scale": 2.0,
    }


def answer(status: int, **content: object) -> httpx.Response:
    request = httpx.Request("POST", "http://127.0.0.1:8000/v1/images/generations")
    return httpx.Response(status, json=content, request=request)


def test_an_answer_becomes_an_image_or_the_server_s_own_sentence(folder: Path) -> None:
    data = base64.b64encode(b"png").decode()
    (image,) = read_images(answer(200, created=1, id="r1", data=[{"b64_json": data}]), 1)
    assert image == GeneratedImage(b"png", "r1")
    assert image.save(folder / "p.png").read_bytes() == b"png"
    with pytest.raises(ClientError, match=r"^size is too large$"):
        read_images(answer(400, error={"message": "size is too large", "param": "size", "type": "x", "code": "y"}), 1)
    with pytest.raises(ClientError, match="answered without an image"):
        read_images(answer(200, data=[{"b64_json": data}]), 2)
    with pytest.raises(ClientError, match="answered 502"):
        read_images(answer(502), 1)
    with pytest.raises(ClientError, match="no JSON: is it Triptych"):
        read_images(httpx.Response(200, text="<html>", request=httpx.Request("GET", "http://127.0.0.1")), 1)


def shown_on(width: int = 120, *, terminal: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=width, force_terminal=terminal, highlight=False), text


def test_files_and_bytes_are_images_of_a_body(folder: Path) -> None:
    file = folder / "start.png"
    file.write_bytes(b"the image")
    extra = {"image": file, "video": [file, b"another"], "mask": None, "strength": 0.5}
    body = request_body("x", size=None, steps=None, seed=7, extra=extra)
    first, second = (base64.b64encode(data).decode() for data in (b"the image", b"another"))
    assert body == {
        "prompt": "x", "n": 1, "response_format": "b64_json", "seed": 7, "image": first, "video": [first, second],
        "strength": 0.5,
    }  # fmt: skip


def test_the_ending_of_a_name_says_the_format() -> None:
    endings = {"a.png": "png", "a.JPG": "jpeg", "a.jpeg": "jpeg", "a.mp4": "mp4", "a.zip": "zip", "a.gif": "gif"}
    assert {name: format_of(Path(name)) for name in endings} == endings
    assert [format_of(Path(name)) for name in ("a", "a.bmp", ".png")] == [None, None, None]


def test_settings_are_json_or_text() -> None:
    pairs = ["strength=0.5", "lora=pixels", "sigmas=[1, 0.5]", "tiled=true", "negative_prompt=a=b", "seed="]
    assert parse_settings(pairs) == {
        "strength": 0.5, "lora": "pixels", "sigmas": [1, 0.5], "tiled": True, "negative_prompt": "a=b", "seed": "",
    }  # fmt: skip
    assert parse_settings(["output_format=webp"]) == parse_settings([], Path("a.webp")) == {"output_format": "webp"}
    for wrong, says in (
        ("strength", "is not NAME=VALUE"),
        ("mask=sky.png", "mask is a file: give it with --mask"),
        ("output_format=webp", "output_format is webp, but a.png"),
        ("prompt=a dog", "prompt is already given"),
        ("num_inference_steps=3", "num_inference_steps is already given"),
    ):
        showing = runner.invoke(app, ["generate", "a cat", "-o", "a.png", "--steps", "4", "--set", wrong])
        assert showing.exit_code == 2
        assert says in " ".join(showing.stderr.replace("│", " ").split())


def test_bench_sends_no_files() -> None:
    showing = runner.invoke(app, ["bench", "--set", "image=cat.png"])
    assert (showing.exit_code, "image is a file: bench sends no files" in " ".join(showing.stderr.split())) == (2, True)


def test_an_ending_that_is_no_format_is_refused_before_anything_is_made() -> None:
    showing = runner.invoke(app, ["generate", "a cat", "-o", "a.bmp"])
    assert showing.exit_code == 2
    assert ".bmp is not the suffix of a format: use .png" in " ".join(showing.stderr.replace("│", " ").split())


def test_several_images_have_names_of_their_own() -> None:
    one = {"artifact": {"content_type": "image/webp", "name": "req_0.webp"}}
    assert output_paths({"units": [one]}, None) == [Path("image.webp")]
    assert output_paths({"units": [one]}, Path("a.png")) == [Path("a.png")]
    assert output_paths({"units": [one, one]}, Path("a.png")) == [Path("a-0.png"), Path("a-1.png")]


def test_a_preview_is_called_after_its_image_and_step() -> None:
    preview = {"step": 12, "artifact": {"content_type": "image/webp", "name": "req_1.12.webp"}}
    assert preview_path(preview, None, 1, 1) == Path("image.step-12.webp")
    assert preview_path(preview, Path("out/a.png"), 1, 2) == Path("out/a-1.step-12.png")


def test_a_notebook_shows_an_image_and_not_its_bytes() -> None:
    image = GeneratedImage(b"\x89PNG...", "r1")
    assert (image._repr_png_(), image._repr_jpeg_()) == (image.data, None)
    assert repr(image) == "<GeneratedImage of 7 bytes, request r1>"


def test_a_request_that_failed_says_why() -> None:
    units = [{"causes": ["Traceback\nValueError: too blue", ""]}, {"causes": ["ValueError: too blue"]}]
    request = {"id": "r", "state": "FAILED", "terminal": True, "units": units}
    with (
        httpx.Client(base_url="http://127.0.0.1:1") as http,
        pytest.raises(ClientError, match=r"FAILED: ValueError: too blue$"),
    ):
        wait_until_finished(http, request)


def test_a_request_is_followed_for_a_while_though_nobody_answers() -> None:
    pauses: list[float] = []
    request = {"id": "r", "state": "PENDING", "terminal": False, "units": []}
    with httpx.Client(base_url="http://127.0.0.1:1") as http, pytest.raises(ClientError, match="cannot be reached"):
        wait_until_finished(http, request, pauses.append)
    assert sum(pauses) == pytest.approx(API_AWAY_TIMEOUT_S, abs=1)


def test_generate_wants_images_that_are_there(folder: Path) -> None:
    arguments = ["generate", "a cat", "-o", str(folder / "cat.png"), "--image", str(folder / "none.png")]
    showing = runner.invoke(app, arguments)
    assert showing.exit_code == 1
    assert f"{folder / 'none.png'} cannot be read: No such file or directory." in showing.stderr


def test_status_shows_every_actor_and_why_it_is_not_ready() -> None:
    console, text = shown_on(200)
    actors: list[dict[str, object]] = [
        {
            "name": "denoiser-0",
            "state": "ready",
            "pid": 12,
            "restarts": 1,
            "uptime_s": 3725.0,
            "mailbox_depth": 2,
            "mailbox_capacity": 1024,
            "credits": 1,
            "slots": 2,
            "detail": "",
        },
        {"name": "decoder-0", "state": "down", "pid": 0, "restarts": 0, "detail": "[gone]"},
    ]
    actors[0] |= {"component": "denoiser-0", "start_s": {"launch": 0.04, "import": 1.2, "start": 9.5, "weights": 9.25}}
    stream = {"name": "denoiser-0.stream", "component": "denoiser-0", "facts": {"first_denoiser_s": 2.04}}
    pools = [
        {"name": "pool", "free": 3 << 20, "capacity": 1 << 23, "transport": "shared memory"},
        {"name": "other", "state": "down"},
    ]
    console.print(render({"ready": False, "reasons": ["no decoder"], "actors": [*actors, stream], "pools": pools}))
    lines = text.getvalue().splitlines()
    assert lines[:2] == ["not ready", "  no decoder"]
    row = ["denoiser-0", "ready", "12", "1", "1h", "02m", "2/1024", "1", "of", "2", "free"]
    start = "launch 0.0 s, import 1.2 s, weights 9.2 s, other 0.2 s, first denoiser 2.0 s"
    assert lines[3].split() == [*row, *start.split()]
    assert lines[4].split() == ["decoder-0", "down", "0", "[gone]"]
    assert lines[6:] == ["pool: 3.0 MiB of 8.0 MiB free, shared memory", "other: down"]


def test_status_shows_hosts_where_there_are_any() -> None:
    console, text = shown_on(200)
    hosts = [
        {"name": "a", "state": "ready", "address": "10.0.0.1", "components": ["head", "api"], "restarts": 2},
        {"name": "b", "state": "down", "address": "10.0.0.2", "components": ["d-0"], "restarts": 0, "gave_up": ["d-0"]},
    ]
    actors = [{"name": "d-0", "host": "b", "state": "down"}]
    console.print(render({"ready": True, "reasons": [], "hosts": hosts, "actors": actors}))
    rows = [row.split() for row in text.getvalue().splitlines()]
    assert rows[2:4] == [["a", "ready", "10.0.0.1", "head,", "api", "2"], ["b", "down", "10.0.0.2", "d-0", "0", "d-0"]]
    assert (rows[5][:3], rows[6]) == (["name", "host", "state"], ["d-0", "b", "down"])


def test_status_shows_a_prompt_cache_where_there_is_one() -> None:
    console, text = shown_on()
    cache = {"entries": 3, "nbytes": 3 << 19, "capacity": 1 << 22, "hits": 40, "misses": 7}
    for head in ({"prompt_cache": cache}, {"prompt_cache": {**cache, "capacity": 0}}, {}, None):
        console.print(render({"ready": True, "actors": [], "head": head}))
    (line_of_it,) = [row for row in text.getvalue().splitlines() if "cache" in row]
    assert line_of_it == "prompt cache: 3 prompts in 1.5 MiB of 4.0 MiB, 40 hits, 7 misses"


def test_the_api_says_which_hosts_it_waits_for_when_that_changes(write: Write) -> None:
    console, text = shown_on(200)
    display = Display(console, load_topology(write(TWO_HOSTS, THREE_ROLES.replace("kind", 'host = "b"\nkind'))))
    for reasons in (["no encoder is ready"], ["no encoder is ready"], ["pool-b is not ready"]):
        display.waiting(reasons)
    assert text.getvalue().splitlines() == [
        "waiting for the hosts: no encoder is ready",
        "waiting for the hosts: pool-b is not ready",
    ]


def test_an_answer_without_reasons_does_not_end_the_wait_for_readiness() -> None:
    waiting: list[list[str]] = []
    answers = [
        (503, b'{"error": {"message": "the server has too many connections: retry later"}}'),
        (503, b"no JSON, as of a proxy"),
        (503, b'{"reasons": ["no encoder is ready"]}'),
        (200, b"{}"),
    ]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        status, body = answers.pop(0)
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            await _until_ready(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", waiting.append)

    asyncio.run(scenario())
    assert (waiting, answers) == ([["no encoder is ready"]], [])


def test_a_child_in_words() -> None:
    console, text = shown_on()
    for showing in (
        report("denoiser-0", "failed", "no model [here]"),
        report("denoiser-0", "backoff", "killed by SIGKILL"),
        report("denoiser-0", "gave_up", "restarted 5 times"),
        report("denoiser-0", "loading"),
    ):
        console.print(line(showing))
    assert [row.split(maxsplit=1)[1] for row in text.getvalue().splitlines()] == [
        "cannot start: no model [here]",
        "ended (killed by SIGKILL), starting it again",
        "given up: restarted 5 times",
        "loading (pid 7)",
    ]


def test_the_plain_display_has_a_line_for_each_change_and_announces_readiness(write: Write) -> None:
    console, text = shown_on()
    topology = load_topology(write())
    display = Display(console, topology)

    async def scenario() -> None:
        with display.showing([topology.component("encoder-0"), topology.component("decoder-0")]):
            announced = asyncio.create_task(display.announce_readiness())
            display.changed(report("encoder-0", "loading"))
            display.changed(report("encoder-0", "loading"))
            display.changed(report("encoder-0", "ready"))
            assert not announced.done()
            display.changed(report("decoder-0", "ready"))
            async with asyncio.timeout(5):
                await announced

    asyncio.run(scenario())
    rows = text.getvalue().splitlines()
    assert [row.split()[:2] for row in rows[:3]] == [
        ["encoder-0", "loading"],
        ["encoder-0", "ready"],
        ["decoder-0", "ready"],
    ]
    assert rows[3].startswith("encoder-0, decoder-0 ready after")
    assert len(rows) == 4


def test_the_live_display_redraws_a_table_and_keeps_what_went_wrong(write: Write) -> None:
    console, text = shown_on(terminal=True)
    topology = load_topology(write())
    display = LiveDisplay(console, topology)
    with display.showing(topology.components):
        display.changed(report("encoder-0", "loading"))
        detail = "encoder-0.stream: 3.1 of 24.0 GB"
        display.changed(msgspec.structs.replace(report("encoder-0", "loading"), detail=detail))
        assert " 3.1 of 24.0 GB" in text.getvalue()
        display.changed(report("decoder-0", "failed", "no model here"))
        display.ready("all is well")
        display.changed(report("encoder-0", "backoff", "killed by SIGKILL"))
    showing = text.getvalue()
    assert "cannot start:" in showing
    assert "no model here" in showing
    assert "all is well after" in showing
    assert "starting it again" in showing.rpartition("all is well")[2]


def test_logs_are_shown_without_what_a_terminal_takes_for_a_command(write: Write) -> None:
    file = write()
    folder = load_topology(file).log_dir
    folder.mkdir(parents=True)
    event = {"event": "served\x07", "level": "error", "path": "/\x1b[2J", "exception": "first\nsecond \x1b[2J"}
    log_path(folder, "api").write_text(json.dumps(event) + "\n" + '{"cut \x1b[2J\n')
    showing = runner.invoke(app, ["logs", "--topology", str(file)])
    assert showing.exit_code == 0, showing.stderr
    first, *others = showing.stdout.splitlines()
    assert r"served\x07" in first
    assert r"path=/\x1b[2J" in first
    assert others == ["first", r"second \x1b[2J", r'{"cut \x1b[2J']


def test_a_log_that_cannot_be_read_is_one_sentence(write: Write) -> None:
    file = write()
    log = log_path(load_topology(file).log_dir, "api")
    log.mkdir(parents=True)
    showing = runner.invoke(app, ["logs", "--topology", str(file)])
    assert (showing.exit_code, showing.stderr) == (1, f"{log} cannot be read: Is a directory.\n")


def test_logs_of_no_system_want_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.actors.command._running.running_systems", list)  # others may run some here
    showing = runner.invoke(app, ["logs"])
    assert (showing.exit_code, "no system runs here: give the FILE of the system" in showing.stderr) == (2, True)


@pytest.mark.parametrize(
    ("states", "hopeless"),
    [
        (["ready", "failed", "ready"], True),
        (["ready", "gave_up"], True),
        (["ready", "delayed"], True),
        (["ready", "ready"], False),
        (["loading", "failed"], False),
        (["backoff", "gave_up"], False),
        ([], False),
    ],
)
def test_waiting_for_readiness_is_hopeless_when_nothing_moves_any_more(states: list[str], hopeless: bool) -> None:
    assert cannot_become_ready(states) is hopeless
    assert describe_children([report("head", "ready"), report("decoder-0", "failed", "no model")]) == (
        "head is ready, decoder-0 is failed (no model)"
    )


def test_priority_and_deadline_are_fields_of_the_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, object]] = []

    def make(_url: str, _key: str, body: dict[str, object], _out: Path | None, _show: object) -> None:
        sent.append(body)
        raise ClientError("enough")

    monkeypatch.setattr(sys.modules["triptych.actors.command.generate"], "_make", make)
    arguments = ["generate", "a cat", "-o", str(folder / "cat.png")]
    runner.invoke(app, [*arguments, "--priority", "-3", "--deadline", "2.5"])
    runner.invoke(app, arguments)
    assert {name: sent[0][name] for name in ("priority", "deadline_s")} == {"priority": -3, "deadline_s": 2.5}
    assert not {"priority", "deadline_s"} & sent[1].keys(), "what is not given is left to the server"
    assert runner.invoke(app, [*arguments, "--priority", "101"]).exit_code == 2
