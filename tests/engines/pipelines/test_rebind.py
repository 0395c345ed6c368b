"""A state that was encoded for one request becomes another's, and is then what its own encoder would have made."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests.engines.families import all_families
from triptych.engines.codec.codec import pack, unpack
from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME
from triptych.engines.partition.blocks import ModularPartition, cut_blocks
from triptych.engines.pipelines.modular import encoded
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.pipelines.random_state import is_unused, seeded_generator
from triptych.engines.stages import Stage
from triptych.tools.families.cases import PROMPT, input_image
from triptych.tools.families.rows import blocks_of, pipelines
from triptych.tools.make_model import CLASSIC, Family

CPU = torch.device("cpu")
INPUTS: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 48, "num_inference_steps": 3}
OTHER: dict[str, Any] = {
    "num_inference_steps": 5,
    "height": 32,
    "width": 80,
    "guidance_scale": 7.5,
    "num_frames": 9,
    "strength": 0.3,
}
MODULAR = ("flux", "flux-kl", "wan", "qwenimage", "sdxl", "ltx2")
SAMPLED = "glm_image"
"""Its encoder samples text, from torch's own generator, which it gives the seed of the request."""


@pytest.fixture
def encoder(models: Callable[[str], Path]) -> Callable[[str], StagePipeline]:
    def load(family: str) -> StagePipeline:
        model = models(family)
        return StagePipeline.load(model, (Stage.ENCODER,), dtype=torch.float32, device=CPU)

    return load


def packed_bytes(state: dict[str, object]) -> tuple[bytes, bytes]:
    """All of a state, to the bit."""
    packed = pack(state)
    slot = torch.empty(packed.nbytes, dtype=torch.uint8)
    packed.copy_to(slot)
    return packed.manifest, slot.numpy().tobytes()


def crossed(state: dict[str, object]) -> dict[str, object]:
    manifest, slot = packed_bytes(state)
    return unpack(manifest, torch.frombuffer(bytearray(slot), dtype=torch.uint8), CPU)


@pytest.mark.parametrize(
    "family",
    all_families([*MODULAR, *sorted(CLASSIC - {Family.SD_CONTROLNET})], ("flux", "flux-kl", "wan", "pixart", SAMPLED)),
)
def test_an_adapted_payload_is_that_of_the_other_request_to_the_bit(
    family: str, encoder: Callable[[str], StagePipeline]
) -> None:
    pipeline = encoder(family)
    inputs = {name: value for name, value in INPUTS.items() if name in pipeline.accepted}
    kept = crossed(pipeline.encode(inputs, 11))
    seed = 12 if pipeline.seed_independent else 11
    assert pipeline.seed_independent == (family != SAMPLED)
    free = pipeline.accepted - set(pipeline.signature.encodes)
    others = {name: value for name, value in OTHER.items() if name in free}
    assert others or family not in MODULAR, "a classic encoder may read anything"
    assert "prompt" not in free
    # One at a time as well, so that no change hides another.
    for changes in ({}, *({name: value} for name, value in others.items()), others):
        expected = packed_bytes(pipeline.encode({**inputs, **changes}, seed))
        assert packed_bytes(pipeline.rebind(kept, {**inputs, **changes}, seed)) == expected, changes
        assert (expected != packed_bytes(kept)) == pipeline.seed_independent, "the generator at least is another one"
    left_out = {name: value for name, value in inputs.items() if name == "prompt" or name not in free}
    assert packed_bytes(pipeline.rebind(kept, left_out, 11)) == packed_bytes(pipeline.encode(left_out, 11))


def test_an_image_that_later_stages_take_passes_through(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(models("sdxl"), tmp_path / "model")
    (model / SERVING_CONFIG_NAME).write_text('{"task": "any"}')
    pipeline = StagePipeline.load(model, (Stage.ENCODER,), dtype=torch.float32, device=CPU)
    kept = pipeline.encode({**INPUTS, "width": 64, "image": input_image(), "strength": 0.9}, 11)
    assert kept["image"].size == input_image().size  # type: ignore[attr-defined]
    assert {"image", "mask_image"} <= set(pipeline.signature.passes_through)


def test_what_an_encoder_drew_is_left_to_its_seed(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(models("flux-kl"), tmp_path / "model")
    (model / SERVING_CONFIG_NAME).write_text('{"task": "image-to-image"}')
    pipeline = StagePipeline.load(model, (Stage.ENCODER,), dtype=torch.float32, device=CPU)
    inputs = {**INPUTS, "width": 64, "image": input_image()}
    kept = crossed(pipeline.encode(inputs, 11))
    assert not pipeline.seed_independent
    assert {"image", "height", "prompt"} <= set(pipeline.signature.encodes)
    assert "image" not in {*kept, *pipeline.signature.passes_through}, "latents are made of it"
    changed = {**inputs, "num_inference_steps": 9, "strength": 0.3}
    del changed["image"]
    again = pipeline.rebind(kept, changed, 11)
    assert packed_bytes(again) == packed_bytes(pipeline.encode({**changed, "image": input_image()}, 11))


def test_a_generator_that_crossed_still_tells_whether_it_was_drawn_from() -> None:
    for seed in (0, 2**32 + 7, -3):
        generator = seeded_generator(seed)
        assert is_unused(generator.clone_state())
        torch.rand(1, generator=generator)
        assert not is_unused(generator.clone_state())


@pytest.mark.parametrize("name", all_families(pipelines()))
def test_no_encoder_reads_or_makes_what_it_does_not_declare(name: str) -> None:
    whole = blocks_of(name)
    parts = cut_blocks(whole)
    partition = ModularPartition(Path(), getattr(diffusers, name), {}, whole, whole, parts, ())
    known = encoded(partition)
    for block in leaves(parts[Stage.ENCODER]):
        undeclared = {item for item in touched(type(block)) if item not in known}
        assert not undeclared, type(block).__name__


def leaves(block: Any) -> Iterator[Any]:
    yield block
    for inner in block.sub_blocks.values():
        yield from leaves(inner)


def touched(block: type) -> Iterator[str]:
    """The NAME of each `state.get("NAME")` and `state.set("NAME", ...)` of a block's own code."""
    if block.__module__.endswith(".modular_pipeline"):
        return
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(block)))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("get", "set")
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "state"
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)
