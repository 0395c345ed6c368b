"""What of a pipeline's inputs is public, for every block set and every classic pipeline of the installed diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import diffusers
import msgspec
import pytest
import torch
from PIL import Image

from engines.calling import signature
from engines.parameters import PICTURES, Kind, Parameter, names
from engines.split import prune, required
from engines.vocabulary import KNOWN, of_blocks, of_call
from tools.families.cases import cases
from tools.families.rows import blocks_of, pipelines

Picture = Image.Image
TENSORS = {"latents", "generator", "dtype", "attention_kwargs", "conditions", "prompt_embeds", "image_latents"}


def tasks_of(pipeline: str) -> list[str]:
    return [*(blocks_of(pipeline)._workflow_map or ()), "any"]


def public(pipeline: str, task: str) -> dict[str, Parameter]:
    whole = blocks_of(pipeline)
    found = of_blocks(prune(whole, task), required(whole, task))
    return {parameter.name: parameter for parameter in found}


def kind(hint: Any, name: str = "x", default: Any = None) -> Kind | None:
    def call(x: Any = default) -> None: ...

    call.__annotations__ = {"x": hint}
    call.__signature__ = None  # type: ignore[attr-defined]
    del call.__signature__  # type: ignore[attr-defined]
    found = of_call(call)
    return found[0].kind if found else None


@pytest.mark.parametrize("pipeline", pipelines())
def test_what_is_public_can_be_said_in_json_and_files(pipeline: str) -> None:
    for task in tasks_of(pipeline):
        found = public(pipeline, task)
        assert found["prompt"] == msgspec.structs.replace(found["prompt"], kind=Kind.TEXT, required=True)
        assert not found.keys() & TENSORS
        for item in prune(blocks_of(pipeline), task).inputs:
            typed = [item.type_hint, *getattr(item.type_hint, "__args__", ())]
            if item.name in found and found[item.name].kind not in PICTURES:
                assert torch.Tensor not in typed or float in typed, item.name
                assert dict not in typed, item.name
        for name in found.keys() & KNOWN.keys():
            # The same name means the same everywhere; but how many pictures, and which numbers, a family says.
            family = {found[name].kind, KNOWN[name]}
            assert len(family) == 1 or family <= PICTURES or family <= {Kind.INTEGER, Kind.NUMBER}, name
        msgspec.msgpack.decode(msgspec.msgpack.encode(tuple(found.values())), type=tuple[Parameter, ...])
