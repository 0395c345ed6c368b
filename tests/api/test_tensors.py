"""Files of tensors that come in: what is taken, how it reaches the head and the pipeline, and what is refused."""

from __future__ import annotations

import json
import struct

import msgspec
import pytest
import torch
from safetensors.torch import save

from tests.api.image_inputs import GENERATIONS, PNG, check, submitted, text
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.roles.head.prompt_cache import PromptCache
from triptych.roles.messages.common import Tensors
from triptych.roles.worker.inputs import has_files, resolve_inputs

pytestmark = pytest.mark.anyio

LATENTS = torch.arange(8.0, dtype=torch.bfloat16).reshape(1, 2, 2, 2)
FILE = save({"latents": LATENTS, "prompt_embeds": torch.ones(1, 3, 4)})
PARAMETERS = (
    Parameter("prompt", ParameterKind.TEXT, required=True),
    Parameter("tensors", ParameterKind.TENSORS, choices=("latents", "prompt_embeds")),
)


@pytest.fixture(autouse=True)
def model_with_tensors(fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=PARAMETERS)


def forged(header: dict[str, object], data: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.mark.parametrize("form", [False, True])
async def test_tensors_become_a_file_and_a_reference_and_then_inputs(client, fake_head, uploads, form):
    sent = (
        {"data": {"seed": "1"}, "files": {"tensors": ("x.safetensors", FILE)}}
        if form
        else {"json": {"tensors": text(FILE)}}
    )
    answer = await client.post(GENERATIONS, **sent)
    assert answer.status_code == 200, answer.text
    inputs = (await submitted(fake_head)).inputs
    (tensors,) = inputs.values()
    assert isinstance(tensors, Tensors)
    assert tensors.tensors == ("latents", "prompt_embeds")
    assert uploads.read(tensors.file) == FILE
    assert has_files(inputs)
    resolved = resolve_inputs(inputs, uploads, Signature(PARAMETERS))
    assert resolved.keys() == {"latents", "prompt_embeds"}
    assert resolved["latents"].dtype == torch.bfloat16
    assert torch.equal(resolved["latents"], LATENTS)
    cache = PromptCache()
    cache.update_signature(Signature(PARAMETERS, encodes=("prompt",)))
    assert cache.key(inputs) != cache.key({})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (PNG, "must be a safetensors file"),
        (b"", "must be a safetensors file"),
        (struct.pack("<Q", 1 << 62) + b"{}", "with a header of at most 65536 bytes"),
        (FILE[:-1], "must be a safetensors file"),
        (FILE + b"x", "must be a safetensors file"),
        (forged({}), "must have 1 to 32 tensors, not 0"),
        (forged({"a": {"dtype": "F32", "shape": [1 << 40, 9], "data_offsets": [0, 4]}}, b"1234"), "must be a safe"),
        (forged({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "has a of shape [0]"),
        (forged({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"1234"), "has a of dtype F8_E4M3"),
    ],
)  # fmt: skip
async def test_what_is_no_such_file_is_refused(client, data, words):
    answer = await client.post(GENERATIONS, json={"tensors": text(data)})
    check(answer, 422, "tensors", words)


async def test_there_is_one_file(client):
    for value in ([text(FILE)] * 2, {"latents": [1.0]}, 7):
        check(await client.post(GENERATIONS, json={"tensors": value}), 422, "tensors", "must be one safetensors file")
