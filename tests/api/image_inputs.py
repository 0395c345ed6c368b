"""Images for requests, good ones and bad ones, and a model that takes them."""

from __future__ import annotations

import base64
import io
import struct
import zlib

from PIL import Image

from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.roles.messages import requests as wire

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def encoded(
    form: str = "PNG", *, mode: str = "RGB", colour: object = 7, size: tuple[int, int] = (5, 4), **options
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, form, **options)
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def header_only(width: int, height: int) -> bytes:
    """A PNG that promises to be huge, and is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def moving(form: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), (k, 0, 0)) for k in (0, 250)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


PNG = encoded()
MASK = encoded(mode="L", colour=255)
PARAMETERS = (
    Parameter("image", ParameterKind.IMAGES),
    Parameter("last_image", ParameterKind.IMAGE),
    Parameter("mask_image", ParameterKind.IMAGE),
    Parameter("prompt", ParameterKind.TEXT, required=True),
    Parameter("sigmas", ParameterKind.NUMBERS),
    Parameter("strength", ParameterKind.NUMBER),
    Parameter("max_sequence_length", ParameterKind.INTEGER),
    Parameter("clean_caption", ParameterKind.BOOLEAN),
    Parameter("prompt_2", ParameterKind.TEXT),
    Parameter("video", ParameterKind.IMAGE_LIST),
)


def check(answer, status: int, param: str | None, *words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


async def submitted(fake_head) -> wire.SubmitRequest:
    (submit,) = await fake_head.received(wire.SubmitRequest)
    return submit
