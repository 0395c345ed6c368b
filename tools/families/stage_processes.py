"""Run each stage in a process of its own; payloads travel over pipes, as a manifest and a block.

`python -m triptych.tools.families.stage_processes IN OUT IN OUT IN OUT` serves on the pipes of each stage. A frame is
two lengths of 8 bytes, then both bodies. Each request is a state {"model", "dtype", "route", "inputs", "seed"}, or one
with "state" in the place of the last two; each answer {"state", "components", "pid"}, or {"error"}. The processes part
when everything is imported and nothing is loaded yet.
"""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import diffusers
import torch
import transformers

from triptych.actors.supervision import module_command
from triptych.engines.codec.codec import pack, unpack
from triptych.engines.model_options import ModelOptions
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage

CPU: Final = torch.device("cpu")
_STOP_S: Final = 30


class StageError(RuntimeError):
    """A stage failed; the text names the stage and the reason."""


class StageProcesses:
    """Three processes that serve one stage each.

    Args:
        pipes: Where each takes requests and gives answers.
    """

    def __init__(self, pipes: dict[Stage, tuple[BinaryIO, BinaryIO]]) -> None:
        self._pipes = pipes

    def ask(self, stage: Stage, request: dict[str, object]) -> dict[str, Any]:
        """Run one stage.

        Raises:
            StageError: It could not, or its process has ended.
        """
        requests, answers = self._pipes[stage]
        write_state(requests, request)
        answer = read_state(answers)
        if answer is None:
            raise StageError(f"{stage}: its process has ended")
        if "error" in answer:
            raise StageError(f"{stage}: {answer['error']}")
        return answer

    def run(
        self, model: Path, inputs: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32, route: str = ""
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Run a request through all three; return the media by name, and the payload of each stage.

        Args:
            model: Its folder.
            inputs: Of the request.
            seed: Of the request.
            dtype: Of the weights.
            route: How the pipeline is cut; "" for the best that the model has.

        Raises:
            StageError: A stage failed.
        """
        base = {"model": str(model), "dtype": dtype, "route": route}
        answers = [self.ask(Stage.ENCODER, {**base, "inputs": inputs, "seed": seed})]
        for stage in (Stage.DENOISER, Stage.DECODER):
            answers.append(self.ask(stage, {**base, "state": answers[-1]["state"]}))
        return answers[-1]["state"], answers


@contextmanager
def start_stage_processes() -> Iterator[StageProcesses]:
    """Start the three processes, and end them afterwards."""
    ours, theirs = _pipes()
    command = [*module_command(__spec__.name), *map(str, theirs)]
    with subprocess.Popen(command, pass_fds=theirs) as process:  # noqa: S603 - our own interpreter and module
        for pipe in theirs:
            os.close(pipe)
        try:
            yield StageProcesses(ours)
        finally:
            for requests, _ in ours.values():
                requests.close()
            status = process.wait(_STOP_S)
            for _, answers in ours.values():
                answers.close()
    if status:
        raise StageError(f"a process ended with status {status}")


@contextmanager
def fork_stage_processes() -> Iterator[StageProcesses]:
    """Fork the three processes off this one, which must have one thread and must not have computed yet."""
    ours, theirs = _pipes()
    children = _fork(theirs, [stream.fileno() for pair in ours.values() for stream in pair])
    try:
        yield StageProcesses(ours)
    finally:
        for requests, answers in ours.values():
            requests.close()
            answers.close()
        for child in children:
            os.waitpid(child, 0)


def silence_libraries() -> None:
    """Silence the warnings of the libraries about each tiny model, so that stderr shows errors only."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    libraries: tuple[Any, ...] = (diffusers.utils.logging, transformers.utils.logging)
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()


def write_state(pipe: BinaryIO, state: dict[str, object]) -> None:
    """Write a payload as one frame.

    Raises:
        CodecError: It has a value that cannot cross; nothing has been written then.
    """
    packed = pack(state)
    block = torch.empty(packed.nbytes, dtype=torch.uint8)
    packed.copy_to(block)
    pipe.write(struct.pack("<QQ", len(packed.manifest), packed.nbytes))
    pipe.write(packed.manifest)
    pipe.write(block.numpy().tobytes())
    pipe.flush()


def read_state(pipe: BinaryIO) -> dict[str, Any] | None:
    """Read a payload; None at the end of the pipe."""
    head = pipe.read(16)
    if not head:
        return None
    lengths = struct.unpack("<QQ", head)
    manifest, body = (pipe.read(length) for length in lengths)
    block = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8)
    return unpack(manifest, block, CPU)


def _run(stage: Stage, pipeline: StagePipeline, request: dict[str, Any]) -> dict[str, object]:
    if stage is Stage.ENCODER:
        return pipeline.encode(request["inputs"], request["seed"])
    if stage is Stage.DECODER:
        return pipeline.decode(request["state"])
    denoising = pipeline.denoise(request["state"])
    while denoising.advance():
        pass
    return denoising.result()


def _serve(stage: Stage, requests: BinaryIO, answers: BinaryIO) -> None:
    pipelines: dict[tuple[str, torch.dtype, str], StagePipeline] = {}
    while (request := read_state(requests)) is not None:
        key = (request["model"], request["dtype"], request["route"])
        try:
            if key not in pipelines:
                pipelines[key] = StagePipeline.load(
                    Path(key[0]), (stage,), dtype=key[1], device=CPU, options=ModelOptions(route=key[2])
                )
            state = _run(stage, pipelines[key], request)
            write_state(answers, {"state": state, "components": sorted(pipelines[key].components), "pid": os.getpid()})
        except Exception as error:  # noqa: BLE001 - an answer too: it goes into the row
            write_state(answers, {"error": f"{type(error).__name__}: {error}"})


def _pipes() -> tuple[dict[Stage, tuple[BinaryIO, BinaryIO]], list[int]]:
    """Open the pipes of all stages: our ends, and the numbers of theirs."""
    ours: dict[Stage, tuple[BinaryIO, BinaryIO]] = {}
    theirs: list[int] = []
    for stage in Stage:
        requests_out, requests_in = os.pipe()
        answers_out, answers_in = os.pipe()
        ours[stage] = (os.fdopen(requests_in, "wb"), os.fdopen(answers_out, "rb"))
        theirs += [requests_out, answers_in]
    return ours, theirs


def _fork(pipes: list[int], others: list[int]) -> list[int]:
    """Fork a process for each stage; `pipes` are closed here and `others` there. Return their numbers."""
    children = []
    for stage, mine in zip(Stage, (pipes[0:2], pipes[2:4], pipes[4:6]), strict=True):
        if child := os.fork():
            children.append(child)
            continue
        for other in {*pipes, *others} - set(mine):
            os.close(other)
        try:
            _serve(stage, os.fdopen(mine[0], "rb"), os.fdopen(mine[1], "wb"))
        finally:
            # Whatever happened, what comes next is the code of the parent.
            os._exit(0)
    for pipe in pipes:
        os.close(pipe)
    return children


def _main() -> None:
    silence_libraries()
    children = _fork([int(number) for number in sys.argv[1:]], [])
    statuses = [os.waitpid(child, 0)[1] for child in children]
    os._exit(any(statuses))


if __name__ == "__main__":
    _main()
