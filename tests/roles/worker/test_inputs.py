"""What a pipeline gets for the files and numbers that a message names."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image

from tests.video_files import COLOURS, film
from triptych.engines.parameters.declarations import parameters_of_blocks
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.engines.partition.blocks import prune
from triptych.roles.media.files import LocalFiles
from triptych.roles.media.uploads import UploadError, UploadStore
from triptych.roles.messages.common import Images, Input, Numbers, Upload
from triptych.roles.worker.inputs import as_image, as_mask, resolve_inputs
from triptych.tools.families.cases import Case, cases
from triptych.tools.families.rows import blocks_of

ALPHA = ("QwenImageLayeredModularPipeline",)


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return UploadStore(LocalFiles(tmp_path / "uploads"))


def sent(store: UploadStore, *images: Image.Image, form: str = "PNG", **options: Any) -> Images:
    files = []
    for image in images:
        data = io.BytesIO()
        image.save(data, form, **options)
        files.append(store.save(data.getvalue(), form.lower()))
    return Images(tuple(files))


def signature(**kinds: ParameterKind) -> Signature:
    return Signature(tuple(Parameter(name, kind) for name, kind in kinds.items()))


def pixels(value: object) -> list[np.ndarray]:
    return [np.asarray(image) for image in (value if isinstance(value, list) else [value])]


RED = Image.new("RGB", (4, 2), (200, 10, 20))
BLUE = Image.new("RGB", (4, 2), (0, 10, 200))


def test_scalars_stay_and_numbers_become_lists(store: UploadStore) -> None:
    inputs = {"prompt": "x", "seed": 1, "sigmas": Numbers((1.0, 0.5)), "original_size": Numbers((64, 48)), "n": None}
    resolved = resolve_inputs(inputs, store, signature(sigmas=ParameterKind.NUMBERS, original_size=ParameterKind.PAIR))
    assert resolved == {"prompt": "x", "seed": 1, "sigmas": [1.0, 0.5], "original_size": (64, 48), "n": None}
    assert inputs["sigmas"] == Numbers((1.0, 0.5))


def test_inputs_are_the_same_after_the_wire_and_the_journal(store: UploadStore) -> None:
    inputs: dict[str, Input] = {"image": sent(store, RED, BLUE), "sigmas": Numbers((1, 0.5)), "prompt": "x", "n": None}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(inputs), type=dict[str, Input]) == inputs


def test_one_file_is_an_image_and_several_are_a_list(store: UploadStore) -> None:
    kinds = signature(image=ParameterKind.IMAGES, last_image=ParameterKind.IMAGE, video=ParameterKind.IMAGE_LIST)
    one, two = sent(store, RED), sent(store, RED, BLUE)
    resolved = resolve_inputs({"image": one, "last_image": one, "video": one, "unknown": two}, store, kinds)
    assert isinstance(resolved["image"], Image.Image)
    assert isinstance(resolved["last_image"], Image.Image)
    assert isinstance(resolved["video"], list)
    assert [image.getpixel((0, 0)) for image in resolved["unknown"]] == [(200, 10, 20), (0, 10, 200)]  # type: ignore[attr-defined]
    with pytest.raises(UploadError, match="last_image is one image, 2 were given"):
        resolve_inputs({"last_image": two}, store, kinds)
    with pytest.raises(UploadError, match="image is empty"):
        resolve_inputs({"image": Images(())}, store, kinds)


def test_a_video_is_its_frames(store: UploadStore) -> None:
    kinds = signature(video=ParameterKind.IMAGE_LIST, mask=ParameterKind.IMAGE_LIST)
    sent_video = Images((store.save(film(), "mp4"),))
    resolved = resolve_inputs({"video": sent_video, "mask": sent_video}, store, kinds)
    assert [(image.mode, image.size) for image in resolved["video"]] == [("RGB", (32, 16))] * 3  # type: ignore[attr-defined]
    assert {image.mode for image in resolved["mask"]} == {"L"}  # type: ignore[attr-defined]
    np.testing.assert_allclose([image.mean(axis=(0, 1)) for image in pixels(resolved["video"])], COLOURS, atol=12)
    with pytest.raises(UploadError, match=r"the upload [0-9a-f]*.mp4 has no video"):
        resolve_inputs({"video": Images((store.save(film(0, sound=True), "mp4"),))}, store, kinds)


def test_a_missing_file_is_the_requests_own_fault(store: UploadStore) -> None:
    with pytest.raises(ValueError, match="send the image again"):
        resolve_inputs({"image": Images((Upload(f"{'a' * 64}.png", 3),))}, store, Signature())


def test_images_are_upright_and_of_three_channels(store: UploadStore) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    lying = sent(store, RED, form="JPEG", exif=exif)
    image = resolve_inputs({"image": lying}, store, Signature())["image"]
    assert (image.mode, image.size) == ("RGB", (2, 4))  # type: ignore[attr-defined]
    for mode in ("L", "LA", "P", "RGBA", "1", "CMYK"):
        assert as_image(RED.convert(mode)).mode == "RGB"


def test_alpha_is_kept_only_where_the_model_takes_it_and_nothing_hidden_shows() -> None:
    clear = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    assert as_image(clear).getpixel((0, 0)) == (251, 251, 251), "it lies on white"
    assert as_image(Image.new("RGBA", (2, 2), (1, 2, 3, 255))).getpixel((0, 0)) == (1, 2, 3)
    assert as_image(clear, alpha=True).getpixel((0, 0)) == (1, 2, 3, 4)
    assert as_image(RED, alpha=True).getpixel((0, 0)) == (200, 10, 20, 255)


def test_sixteen_bits_are_read_as_diffusers_reads_them(store: UploadStore) -> None:
    deep = Image.fromarray(np.array([[0, 128, 255, 256, 65535]], dtype=np.uint16))
    image = resolve_inputs({"control_image": sent(store, deep)}, store, Signature())["control_image"]
    assert isinstance(image, Image.Image)
    assert image.tobytes() == load_image(deep).tobytes()


def test_a_mask_is_white_where_to_paint_or_transparent_there() -> None:
    white = Image.fromarray(np.array([[0, 255, 128]], dtype=np.uint8))
    assert np.asarray(as_mask(white)).tolist() == [[0, 255, 128]]
    assert np.asarray(as_mask(white.convert("RGBA"))).tolist() == [[0, 255, 128]]  # nothing is transparent
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(as_mask(clear)).tolist() == [[0, 255]]
    assert as_mask(RED).mode == "L"


def given(case: Case) -> dict[str, Any]:
    def is_image(value: Any) -> bool:
        return isinstance(value, Image.Image) or (isinstance(value, list) and isinstance(value[0], Image.Image))

    return {name: value for name, value in case.inputs.items() if is_image(value)}


@pytest.mark.parametrize("case", [case for case in cases() if given(case)], ids=lambda c: f"{c.pipeline}:{c.task}")
def test_every_family_gets_what_it_takes(case: Case, store: UploadStore) -> None:
    """The images that the families run with come out of the store as they are given to diffusers."""
    known = Signature(parameters_of_blocks(prune(blocks_of(case.pipeline), case.task or "any")))
    inputs = given(case)
    files = {name: sent(store, *(value if isinstance(value, list) else [value])) for name, value in inputs.items()}
    resolved = resolve_inputs(files, store, known, alpha=case.pipeline in ALPHA)
    for name, value in inputs.items():
        parameter = known.parameter(name)
        assert parameter is not None, f"{name} is not public"
        if isinstance(value, list) and len(value) == 1 and parameter.kind is ParameterKind.IMAGES:
            value = value[0]  # these take one image as well as a list of one
        assert isinstance(resolved[name], list) == isinstance(value, list), name
        assert all(np.array_equal(a, b) for a, b in zip(pixels(resolved[name]), pixels(value), strict=True)), name
