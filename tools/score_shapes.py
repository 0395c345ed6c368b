"""Render captions that the demo model never saw, through a server or in this process; score the pixels."""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from triptych.actors.command.generate import api_key
from triptych.api.client import KEY_VARIABLE, ClientError, authorization
from triptych.tools.shapes.contact_sheet import write_sheet
from triptych.tools.shapes.scenes import Pixels, Scene, all_scenes, caption, held_out_scenes, held_out_triples
from triptych.tools.shapes.scoring import Score, score

EXAMPLES = """examples:
  python -m triptych.tools.score_shapes                                  200 prompts through 127.0.0.1:8000
  python -m triptych.tools.score_shapes --prompts 50 --seed 7 --url http://127.0.0.1:9000
  python -m triptych.tools.score_shapes --model examples/shapes          without a server
  python -m triptych.tools.score_shapes --among all --sheet out/all.png  trained captions as well
"""
CONCURRENCY = 4
ATTEMPT_TIMEOUT_S = 300.0


class RenderError(Exception):
    """An image could not be rendered; the text says where and why."""


def main(arguments: list[str] | None = None) -> int:
    """Render, score, write the sheet and print one JSON object; 1 if an image could not be rendered."""
    options = _parse(arguments)
    rows = choose_prompts(options.prompts, options.seed, held_out_only=options.among == "held-out")
    source = _by_model(options.model, rows) if options.model else _by_server(options.url, options.key_file, rows)
    console = Console(stderr=True)
    try:
        with closing(source):
            images = list(track(source, "rendering", total=len(rows), console=console))
    except RenderError as error:
        print(f"score_shapes: {error}", file=sys.stderr)
        return 1
    scores = [score(image, scene) for image, (scene, _) in zip(images, rows, strict=True)]
    for (scene, seed), one in zip(rows, scores, strict=True):
        if not one.perfect:
            wrong = ", ".join(field.name for field in fields(one) if not getattr(one, field.name))
            print(f"wrong {wrong}: {caption(scene)!r}, seed {seed}", file=sys.stderr)
    write_sheet(options.sheet, images, [one.perfect for one in scores])
    print(f"contact sheet: {options.sheet}", file=sys.stderr)
    print(json.dumps(summary(scores, [scene for scene, _ in rows])))
    return 0


def choose_prompts(count: int, seed: int, *, held_out_only: bool = True) -> list[tuple[Scene, int]]:
    """Choose scenes, each with a seed; a scene comes again only after all others had their turn."""
    chooser = random.Random(seed)
    scenes = list(held_out_scenes() if held_out_only else all_scenes())
    rows: list[tuple[Scene, int]] = []
    while len(rows) < count:
        chooser.shuffle(scenes)
        rows.extend((scene, chooser.randrange(2**31)) for scene in scenes[: count - len(rows)])
    return rows


def summary(scores: Sequence[Score], scenes: Sequence[Scene]) -> dict[str, float | int]:
    """Count the share of images right in each property, and the prompts held out of training."""
    shares = {
        field.name: round(sum(getattr(one, field.name) for one in scores) / len(scores), 4) for field in fields(Score)
    }
    held_out = sum(scene.triple in held_out_triples() for scene in scenes)
    return {**shares, "prompts": len(scores), "held_out": held_out}


def _by_server(url: str, key_file: Path | None, rows: Sequence[tuple[Scene, int]]) -> Generator[Pixels, None, None]:
    """Render over HTTP, at most CONCURRENCY requests at a time; images come in the order of the rows."""
    try:
        headers = authorization(api_key(key_file))
    except ClientError as error:
        raise RenderError(str(error)) from error
    with (
        httpx.Client(base_url=url, timeout=ATTEMPT_TIMEOUT_S, headers=headers) as client,
        ThreadPoolExecutor(CONCURRENCY) as workers,
    ):
        waiting = [workers.submit(_request, client, caption(scene), seed) for scene, seed in rows]
        try:
            for future in waiting:
                yield future.result()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _request(client: httpx.Client, prompt: str, seed: int) -> Pixels:
    wish = {"prompt": prompt, "seed": seed, "response_format": "b64_json"}
    try:
        answer = client.post("/v1/images/generations", json=wish)
        answer.raise_for_status()
    except httpx.HTTPStatusError as error:
        status, text = error.response.status_code, error.response.text[:300]
        raise RenderError(f"{client.base_url} answered {status} to {prompt!r}: {text}") from error
    except httpx.HTTPError as error:
        raise RenderError(f"no answer from {client.base_url} ({error}): is the server up?") from error
    try:
        png = base64.b64decode(answer.json()["data"][0]["b64_json"], validate=True)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise RenderError(f"{client.base_url} answered {prompt!r} with something that is no image") from error


def _by_model(folder: Path, rows: Sequence[tuple[Scene, int]]) -> Generator[Pixels, None, None]:
    """Render in this process, one at a time, with the model's own defaults."""
    import torch
    from diffusers import FluxPipeline

    serving_config = json.loads((folder / "triptych.json").read_text())
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for scene, seed in rows:
        generator = torch.Generator("cpu").manual_seed(seed)
        image = pipe(caption(scene), generator=generator, **serving_config["defaults"]).images[0]
        yield np.asarray(image.convert("RGB"))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m triptych.tools.score_shapes",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=_positive, default=200)
    parser.add_argument("--seed", type=int, default=1, help="chooses the prompts and the images' seeds")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--key-file", type=Path, help=f"a file with the API key; else the environment's {KEY_VARIABLE}")
    parser.add_argument("--model", type=Path, help="a model folder to render with here, in place of a server")
    parser.add_argument("--among", choices=("held-out", "all"), default="held-out", help="scenes to choose from")
    parser.add_argument("--sheet", type=Path, default=Path("out/sheet.png"), help="the contact sheet to write")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least one prompt is needed")
    return number


if __name__ == "__main__":
    sys.exit(main())
