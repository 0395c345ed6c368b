"""What files say of themselves, read as other programs read it."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import av
import numpy as np
import pytest
from PIL import ExifTags, Image

from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.roles.media.decoded import Stills, VideoFrames
from triptych.roles.media.metadata import FileMetadata, file_metadata, mp4_tags
from triptych.roles.media.writers import encode
from triptych.roles.messages.common import Images, Input, Json, Numbers, Options, Provenance, Upload

IMAGE = Stills([Image.effect_noise((16, 8), 60).convert("RGB")])
FILM = VideoFrames(np.random.default_rng(0).integers(0, 256, (3, 8, 10, 3), np.uint8))
INPUTS: dict[str, Input] = {
    "prompt": "a red circle, naïve\nand a 猫",
    "negative_prompt": "grey",
    "height": 8,
    "width": 16,
    "num_inference_steps": 4,
    "guidance_scale": 3.5,
    "strength": 0.5,
    "scheduler": "EulerDiscreteScheduler",
    "image": Images((Upload("ab.png", 9),)),
    "sigmas": Numbers((1.0, 0.5)),
    "options": Options({"b": 1, "a": "x"}),
    "prompt_2": Json('["x"]'),
    "lora": None,
}
TEXT = (
    "a red circle, naïve\nand a 猫\nNegative prompt: grey\n"
    "Steps: 4, Sampler: EulerDiscreteScheduler, CFG scale: 3.5, Seed: 7, Size: 16x8, Model: shapes, image: ab.png, "
    r'options: "{\"a\": \"x\", \"b\": 1}", prompt_2: ["x"], sigmas: "[1.0, 0.5]", Denoising strength: 0.5'
)


def told(**inputs: Input) -> FileMetadata:
    return file_metadata(Provenance("shapes", inputs, 7), IMAGE)


def written(data: bytes) -> str:
    """The text in an image, from where AUTOMATIC1111 has it."""
    image = Image.open(io.BytesIO(data))
    if image.format == "PNG":
        image.load()
        return str(image.info["parameters"])
    if image.format == "GIF":
        return bytes(image.info["comment"]).decode()
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(b"UNICODE\0")
    return str(comment[8:].decode("utf-16-be"))


def test_the_text_is_the_prompts_and_a_line_of_parameters() -> None:
    assert told(**INPUTS).text == TEXT
    assert told().text == "Seed: 7, Size: 16x8, Model: shapes", "three parameters, without which the line is a prompt"
    assert "Size: 10x8" in file_metadata(Provenance("shapes", {}, 7), FILM).text


def test_the_json_is_the_request_whatever_the_order_of_its_fields() -> None:
    request = json.loads(told(**INPUTS).request)
    assert (request["prompt"], request["seed"], request["model"]) == (INPUTS["prompt"], 7, "shapes")
    assert (request["image"], request["sigmas"], request["prompt_2"]) == ("ab.png", [1.0, 0.5], ["x"])
    assert told(**dict(reversed(INPUTS.items()))) == told(**INPUTS)


def test_the_pipelines_own_steps_and_guidance_are_said_unless_an_alias_was_given() -> None:
    parameters = (
        Parameter("guidance_scale", ParameterKind.NUMBER, 5.0),
        Parameter("num_inference_steps", ParameterKind.INTEGER, 28),
        Parameter("true_cfg_scale", ParameterKind.NUMBER, alias_of="guidance_scale"),
    )
    assert file_metadata(Provenance("m", {}, 1), IMAGE, parameters).text.startswith(
        "Steps: 28, CFG scale: 5.0, Seed: 1"
    )
    given = file_metadata(Provenance("m", {"true_cfg_scale": 2.0, "num_inference_steps": 3}, 1), IMAGE, parameters)
    assert given.text == "Steps: 3, Seed: 1, Size: 16x8, Model: m, true_cfg_scale: 2.0"


def test_a_video_has_it_as_tags_and_the_same_frames_without() -> None:
    metadata = told(**INPUTS)
    data, plain = (encode(FILM, "mp4", 8.0, metadata=each) for each in (metadata, None))
    assert data == encode(FILM, "mp4", 8.0, metadata=told(**INPUTS))
    with av.open(io.BytesIO(data)) as container, av.open(io.BytesIO(plain)) as other:
        tags = container.metadata
        assert (tags["title"], tags["comment"]) == (INPUTS["prompt"], TEXT)
        assert tags["description"] == metadata.request
        assert not {"title", "comment", "description", "encoder"} & other.metadata.keys()
        frames = [[frame.to_ndarray().tobytes() for frame in each.decode(video=0)] for each in (container, other)]
    assert frames[0] == frames[1]
    assert mp4_tags(told(prompt="x\0" * 300))["title"] == "x" * 200
    assert "title" not in mp4_tags(told())


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp", "gif"])
def test_an_image_has_it_where_other_programs_look(output_format: str) -> None:
    metadata = told(**INPUTS)
    data = encode(IMAGE, output_format, 8.0, metadata=metadata)
    assert written(data) == TEXT
    assert (b"\x92\x86\0\x07" in data) is (output_format in ("jpeg", "webp")), "a comment is of the type `undefined`"
    assert data == encode(IMAGE, output_format, 8.0, metadata=told(**INPUTS))
    plain = encode(IMAGE, output_format, 8.0)
    assert Image.open(io.BytesIO(data)).tobytes() == Image.open(io.BytesIO(plain)).tobytes()
    if output_format != "jpeg":
        moving = Image.open(io.BytesIO(encode(FILM, output_format, 8.0, metadata=metadata)))
        assert moving.n_frames == 3  # type: ignore[attr-defined]
        assert written(encode(FILM, output_format, 8.0, metadata=metadata)) == TEXT


def test_a_png_has_the_request_too_also_within_an_archive() -> None:
    metadata = told(**INPUTS)
    with zipfile.ZipFile(io.BytesIO(encode(IMAGE, "zip", 8.0, metadata=metadata))) as archive:
        image: Any = Image.open(io.BytesIO(archive.read("00000.png")))
        assert image.text == {"parameters": TEXT, "triptych": metadata.request}


def test_what_does_not_fit_into_a_jpeg_is_left_out() -> None:
    metadata = told(prompt="\0" + 32_768 * "x")
    assert "\0" not in metadata.text
    assert encode(IMAGE, "jpeg", 8.0, metadata=metadata) == encode(IMAGE, "jpeg", 8.0)
    assert written(encode(IMAGE, "webp", 8.0, metadata=metadata)) == metadata.text
