"""The three panels in a process each: states come in and go out on pipes, as a manifest and a slot.

Usage: `python panel_process.py IN OUT IN OUT IN OUT`, the pipes of each panel. A frame is two lengths of 8 bytes,
then both bodies. Each request is a state {"model", "dtype", "inputs", "seed"} or {"model", "dtype", "state"}; each
answer {"state", "components"}. The processes part when everything is imported and nothing is loaded yet.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engines.codec import pack, unpack
from engines.panels import Panel
from engines.pipeline import PanelPipeline

CPU = torch.device("cpu")


def write_state(pipe: BinaryIO, state: dict[str, object]) -> None:
    packed = pack(state)
    slot = torch.empty(packed.nbytes, dtype=torch.uint8)
    packed.copy_to(slot)
    pipe.write(struct.pack("<QQ", len(packed.manifest), packed.nbytes))
    pipe.write(packed.manifest)
    pipe.write(slot.numpy().tobytes())
    pipe.flush()


def read_state(pipe: BinaryIO) -> dict[str, Any] | None:
    head = pipe.read(16)
    if not head:
        return None
    lengths = struct.unpack("<QQ", head)
    manifest, body = (pipe.read(length) for length in lengths)
    slot = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8)
    return unpack(manifest, slot, CPU)


def run(panel: Panel, pipeline: PanelPipeline, request: dict[str, Any]) -> dict[str, object]:
    if panel is Panel.ENCODER:
        return pipeline.encode(request["inputs"], request["seed"])
    if panel is Panel.DECODER:
        return pipeline.decode(request["state"])
    denoising = pipeline.denoise(request["state"])
    while denoising.advance():
        pass
    return denoising.result()


def serve(panel: Panel, requests: BinaryIO, answers: BinaryIO) -> None:
    pipelines: dict[tuple[str, torch.dtype], PanelPipeline] = {}
    while (request := read_state(requests)) is not None:
        key = (request["model"], request["dtype"])
        if key not in pipelines:
            pipelines[key] = PanelPipeline.load(Path(key[0]), (panel,), dtype=key[1], device=CPU)
        state = run(panel, pipelines[key], request)
        write_state(answers, {"state": state, "components": sorted(pipelines[key].components), "pid": os.getpid()})


def main() -> None:
    torch.set_num_threads(1)
    children = []
    pipes = [int(number) for number in sys.argv[1:]]
    for panel, mine in zip(Panel, (pipes[0:2], pipes[2:4], pipes[4:6]), strict=True):
        if child := os.fork():
            children.append(child)
            continue
        for other in set(pipes) - set(mine):
            os.close(other)
        serve(panel, os.fdopen(mine[0], "rb"), os.fdopen(mine[1], "wb"))
        os._exit(0)
    for pipe in pipes:
        os.close(pipe)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    os._exit(any(statuses))


if __name__ == "__main__":
    main()
