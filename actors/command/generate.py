"""`triptych generate`: make images or videos, and write each to a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, EXIT_INTERRUPTED, fail, stderr, stdout
from triptych.actors.command._draw import Draw, Sheet, open_canvas
from triptych.actors.command._progress import wait_until_finished
from triptych.actors.errors import TopologyError
from triptych.actors.topology import load_topology
from triptych.api.client import (
    GENERATE_TIMEOUT_S,
    KEY_VARIABLE,
    ClientError,
    GeneratedImage,
    authorization,
    format_of,
    read_json,
    request_body,
    timeout,
    unreachable,
)
from triptych.api.keys import ApiKeysError, read_client_key
from triptych.roles.media.formats import FORMAT_OF_ENDING
from triptych.roles.messages.common import MAX_PARTIAL_IMAGES, MAX_PRIORITY

DEFAULT_URL: Final = "http://127.0.0.1:8000"
URL_VARIABLE: Final = "TRIPTYCH_URL"
_PORTS: Final = 1 << 16
_FILES: Final = {"image": "--image", "mask": "--mask", "last_image": "--last-image"}

Url = Annotated[
    str,
    typer.Option(
        "--url", help=f"Base URL of the API; default: {URL_VARIABLE}, else {DEFAULT_URL}.", show_default=False
    ),
]

KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        metavar="FILE",
        help="A file with the API key alone, or with name:key lines, of which the first counts;"
        f" default: the environment's {KEY_VARIABLE}.",
        show_default=False,
    ),
]

Images = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="An image to start from; may be repeated.", show_default=False),
]


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What to show; omit it if the model takes none.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where to write it; default: image.png, video.mp4 or sound.wav, as the model makes it.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str, typer.Option(metavar="WIDTHxHEIGHT", help="In pixels; default: the model's own.", show_default=False)
    ] = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; default: the model's own.", show_default=False)
    ] = None,
    seed: Annotated[
        str,
        typer.Option(
            metavar="SEED[,SEED...]",
            help="The same seed makes the same image; default: random. With several seeds, each makes one image.",
            show_default=False,
        ),
    ] = "",
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Which model; default: the first.", show_default=False)
    ] = "",
    negative: Annotated[
        str | None, typer.Option("--negative", metavar="TEXT", help="What not to show.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How closely to follow the prompt; default: the model's own.", show_default=False),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("-n", min=1, max=10, help="How many, with consecutive seeds.", show_default="1"),
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option(min=-MAX_PRIORITY, max=MAX_PRIORITY, help="Higher goes before other requests.", show_default="0"),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help='When it is wanted; \\[head] policy = "deadline" goes by it, and nothing is cancelled.',
            show_default=False,
        ),
    ] = None,
    image: Images = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The part of the image to repaint: white.", show_default=False),
    ] = None,
    last_image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The last frame of a video.", show_default=False)
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another parameter of the model.", show_default=False),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Save partial images as they come, as NAME.step-STEP.png.")
    ] = False,
    draw: Annotated[
        Draw,
        typer.Option(
            help="Draw the image and its partial images in the terminal: as it can (auto asks it), with kitty's"
            " graphics protocol, as sixels, as half blocks, or not.",
        ),
    ] = "auto",
    topology: Annotated[
        Path | None,
        typer.Option(
            "--topology", metavar="FILE", help="The topology, for its URL; see also --url.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the request as the API returns it.")] = False,
    url: Url = "",
    key_file: KeyFile = None,
) -> None:
    """Make images or videos from a prompt or another image, and write each to a file.

    The suffix of the file chooses the format, such as .png or .jpg, .mp4 for a video, .zip for its frames. With -n,
    NAME.png becomes NAME-0.png, NAME-1.png and so on. Ctrl-C cancels the request.

    [bold]Examples[/]

    triptych generate "a red circle" -o circle.png

    triptych generate "a lighthouse in a storm" -o storm.png --size 1024x768 --steps 28 --seed 7

    triptych generate "a red circle" -n 4 --negative "blue" --guidance 4.5 --json | jq '.units[].seed'

    triptych generate "the same in snow" --image storm.png --mask sky.png -o snow.webp --set strength=0.6
    """
    if out is not None and not out.parent.is_dir():
        fail(f"{out.parent} is not a folder: make it first, or choose another file with -o.", EXIT_FAILED)
    begun = time.monotonic()
    options = {"negative_prompt": negative, "guidance_scale": guidance, "mask": mask, "last_image": last_image}
    options |= {"priority": priority, "deadline_s": deadline} | ({"model": model} if model else {})
    options |= {"partial_images": MAX_PARTIAL_IMAGES} if preview else {}
    seeds = read_seeds(seed)
    by_option = {
        "prompt": prompt,
        "size": size or None,
        "num_inference_steps": steps,
        "seed": seeds,
        "n": count,
    } | options
    extra = {**parse_settings(more or [], out, by_option), **options, "image": image or None}
    show = _show("off" if as_json else draw, save=preview)
    extra |= {"partial_images": MAX_PARTIAL_IMAGES} if show.sheet and "partial_images" not in extra else {}
    try:
        body = request_body(prompt, size=size or None, steps=steps, seed=seeds, extra=extra, n=count)
    except OSError as error:
        fail(f"{error.filename} cannot be read: {error.strerror}.", EXIT_FAILED)
    try:
        target = load_topology(topology).url if topology and not url else base_url(url)
        request, files = _make(target, api_key(key_file), body, out, show)
        written = [result.save(path) for result, path in zip(files, output_paths(request, out), strict=True)]
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    except ClientError as error:
        fail(str(error), EXIT_FAILED)
    except OSError as error:
        fail(f"{error.filename} cannot be written: {error.strerror}.", EXIT_FAILED)
    if as_json:
        print(json.dumps({**request, "files": [str(path) for path in written]}))
        return
    _print_saved(files, written, show, time.monotonic() - begun)


def _print_saved(files: Sequence[GeneratedImage], written: Sequence[Path], show: Show, seconds: float) -> None:
    if show.sheet:
        for index, result in enumerate(files):
            show.sheet.put(index, len(files), result.data)
        show.sheet.draw()
    for result, path in zip(files, written, strict=True):
        about = f"{len(result.data) / 1024:.0f} KiB, {seconds:.1f} s"
        stdout().print(f"[green]saved[/] {escape(str(path))} ({about}, request {escape(result.request_id)})")
        if result.nsfw_content_detected:
            stdout().print("[yellow]The model's safety checker made the image black: try another seed or prompt.[/]")


def output_paths(request: Mapping[str, Any], out: Path | None) -> list[Path]:
    """Return the file of each image of a finished request; `out` is the name that the user gave. Pure."""
    artifacts = [unit["artifact"] for unit in request["units"]]
    if out is None:
        kind = str(artifacts[0]["content_type"]).partition("/")[0]
        stem = {"image": "image", "video": "video", "audio": "sound"}.get(kind, "frames")
        out = Path(f"{stem}{Path(artifacts[0]['name']).suffix}")
    if len(artifacts) == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{index}") for index in range(len(artifacts))]


def read_seeds(text: str) -> int | list[int] | None:
    """Read one seed, or several between commas; None for no text. Raises `typer.BadParameter`. Pure."""
    try:
        seeds = [int(seed) for seed in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a whole number nor a list such as 1,2,3", param_hint="--seed"
        ) from None
    return seeds if len(seeds) > 1 else next(iter(seeds), None)


def base_url(url: str) -> str:
    """Return the given or the default URL, without a slash at the end. Raises `ClientError` for what is no URL."""
    chosen = (url or os.environ.get(URL_VARIABLE, "") or DEFAULT_URL).rstrip("/")
    try:
        parsed = httpx.URL(chosen)
        usable = parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 1) < _PORTS
    except httpx.InvalidURL:
        usable = False
    if not usable:
        raise ClientError(f"{chosen!r} is no URL: write it as in {DEFAULT_URL}")
    return chosen


def api_key(file: Path | None) -> str:
    """Return the key of a file, or of the environment; "" for none. Raises `ClientError` for an unusable one."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ClientError(f"{KEY_VARIABLE} holds no key: all characters of one are visible ASCII.")
        return key
    try:
        return read_client_key(file)
    except ApiKeysError as error:
        raise ClientError(f"The key file {file} {error}.") from error


def parse_settings(
    pairs: Sequence[str],
    out: Path | None = None,
    by_option: Mapping[str, object] | None = None,
    *,
    sends_files: bool = True,
) -> dict[str, object]:
    """Read NAME=VALUE pairs: a value is JSON (a number, true, false, a list), else text.

    `out` is the file to write, whose suffix chooses the format; `by_option` are the values given by other options;
    `sends_files` is whether the command has options for files.

    Raises `typer.BadParameter` for a pair that is malformed, is in `by_option` already, or contradicts `out`.
    """
    read = dict(_parse_setting(pair, sends_files=sends_files) for pair in pairs)
    for name in read:
        if (by_option or {}).get(name) is not None:
            raise typer.BadParameter(f"{name} is already given by its own option", param_hint="--set")
    ending = format_of(out) if out else None
    if out is not None and out.suffix and ending is None:
        endings = ", ".join(f".{name}" for name in FORMAT_OF_ENDING)
        raise typer.BadParameter(f"{out.suffix} is not the suffix of a format: use {endings}", param_hint="--out")
    if ending is not None and read.setdefault("output_format", ending) != ending:
        contradiction = f"output_format is {read['output_format']}, but {out} is the file to write"
        raise typer.BadParameter(contradiction, param_hint="--set")
    return read


def _parse_setting(pair: str, *, sends_files: bool) -> tuple[str, object]:
    name, equals, text = pair.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--set")
    if name in _FILES:
        fix = f"give it with {_FILES[name]}" if sends_files else "bench sends no files"
        raise typer.BadParameter(f"{name} is a file: {fix}", param_hint="--set")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text


def preview_path(preview: Mapping[str, Any], out: Path | None, index: int, count: int) -> Path:
    """Return the file of a preview of one of `count` images: that of the image, with the step in its name. Pure."""
    (path,) = output_paths({"units": [preview]}, out)
    stem = path.stem if count == 1 else f"{path.stem}-{index}"
    return path.with_name(f"{stem}.step-{preview['step']}{path.suffix}")


class Show(NamedTuple):
    """Where a request is shown while it runs, and whether its previews are saved."""

    console: Console
    save: bool
    sheet: Sheet | None


def _show(draw: Draw, *, save: bool) -> Show:
    console = stderr()
    canvas = open_canvas(draw, console)
    return Show(console, save, Sheet(canvas) if canvas else None)


class PreviewFeed:
    """Fetches the previews of a request that it does not know yet, saves them and draws them."""

    def __init__(self, http: httpx.Client, out: Path | None, show: Show) -> None:
        self._http = http
        self._out = out
        self._show = show
        self._known: set[str] = set()

    def take_new(self, request: Mapping[str, Any]) -> None:
        """Take new previews; raises OSError and httpx.HTTPError. One that is not kept any more is left out."""
        sheet, count = self._show.sheet, len(request["units"])
        new = [(unit["index"], preview) for unit in request["units"] for preview in self._new(unit)]
        for index, preview in new:
            file = self._http.get(f"/v1/images/{preview['artifact']['name']}")
            if file.is_success and self._show.save:
                self._save(preview, index, count, file.content)
            if file.is_success and sheet:
                sheet.put(index, count, file.content)
        if new and sheet:
            sheet.draw()

    def _new(self, unit: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        new = [preview for preview in unit.get("previews", ()) if preview["artifact"]["name"] not in self._known]
        self._known.update(preview["artifact"]["name"] for preview in new)
        return new

    def _save(self, preview: Mapping[str, Any], index: int, count: int, data: bytes) -> None:
        path = preview_path(preview, self._out, index, count)
        path.write_bytes(data)
        self._show.console.print(f"[dim]preview[/] {escape(str(path))} (step {preview['step']})")
        if self._show.sheet:
            self._show.sheet.leave()


def _make(
    url: str, key: str, body: dict[str, object], out: Path | None, show: Show
) -> tuple[dict[str, Any], list[GeneratedImage]]:
    """Send the request and wait; return it as it ended, and the file of each of its images."""
    with httpx.Client(base_url=url, timeout=timeout(GENERATE_TIMEOUT_S), headers=authorization(key)) as http:
        try:
            answer = http.post("/v1/images/generations", json=body, headers={"Prefer": "respond-async"})
            request = read_json(answer)
            try:
                look = PreviewFeed(http, out, show).take_new
                request = wait_until_finished(http, request, look=look, console=show.console)
            except KeyboardInterrupt:
                read_json(http.delete(f"/v1/requests/{request['id']}"))
                fail("Interrupted; the request is cancelled.", EXIT_INTERRUPTED)
            files = [http.get(f"/v1/images/{unit['artifact']['name']}") for unit in request["units"]]
        except httpx.HTTPError as error:
            raise unreachable(url, error) from error
    for file in files:
        if not file.is_success:
            read_json(file)
    flags = [unit["artifact"].get("nsfw_content_detected") for unit in request["units"]]
    return request, [
        GeneratedImage(file.content, str(request["id"]), flag) for file, flag in zip(files, flags, strict=True)
    ]
