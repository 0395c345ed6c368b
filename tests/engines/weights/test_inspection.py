"""What is wrong with the files of a model is said before any weights are read, all of it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from triptych.engines.parameters.lora import LoraFile
from triptych.engines.weights.inspection import (
    ComponentEntry,
    HeaderError,
    TensorHeader,
    class_problem,
    component_entries,
    inspect_files,
    read_header,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2147483648\n"
Break = Callable[[Path], None]


def safetensors(path: Path, *, cut: int = 0, **tensors: tuple[int, ...]) -> Path:
    """Write float32 zeros."""
    header, end = {}, 0
    for name, shape in tensors.items():
        nbytes = 4
        for side in shape:
            nbytes *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    path.write_bytes((struct.pack("<Q", len(text)) + text + bytes(end))[: -cut or None])
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of Stable Diffusion's components, with next to no weights."""
    folder = tmp_path / "model"
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (folder / name / "config.json").write_text("{}")
        safetensors(folder / name / f"{stem}.safetensors", weight=(2, 2))
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    return folder


def rename(old: str, new: str) -> Break:
    return lambda model: (model / old).rename(model / new) and None


def write(name: str, content: str | bytes) -> Break:
    def change(model: Path) -> None:
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(name: str) -> Break:
    return lambda model: shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()


UNET = "unet/diffusion_pytorch_model.safetensors"
FIRST = "diffusion_pytorch_model-00001-of-00002.safetensors"
SHARDS = {"metadata": {}, "weight_map": {"a": FIRST, "b": "x-2.safetensors"}}


def in_shards(model: Path) -> None:
    (model / UNET).unlink()
    safetensors(model / "unet" / FIRST, b=(1,))
    (model / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(SHARDS))


def test_a_model_that_is_whole_has_no_findings(model: Path) -> None:
    assert inspect_files(model) == []


@pytest.mark.parametrize(
    ("harm", "where", "words"),
    [
        (remove("vae"), "vae", "has no folder"),
        (remove(UNET), "unet", "has no diffusion_pytorch_model.safetensors"),
        (rename(UNET, "unet/diffusion_pytorch_model.bin"), "unet", "a pickle, which could run code"),
        (lambda model: safetensors(model / UNET, weight=(2, 2), cut=4) and None, "unet", r"is truncated: it has .* of"),
        (write(UNET, POINTER), "unet", "git lfs pull"),
        (write("vae/config.json", POINTER), "vae", "git lfs pull"),
        (write(UNET, b"not weights at all"), "unet", "not a safetensors file"),
        (in_shards, "unet", "x-2.safetensors, which .*index.json names, is missing"),
        (in_shards, "unet", "index.json names a, which no shard has"),
        (write("vae/config.json", '{"block": '), "vae", "config.json that is not JSON"),
        (remove("vae/config.json"), "vae", "has no config.json"),
        (remove("scheduler/scheduler_config.json"), "scheduler", "has no scheduler_config.json"),
        (remove("tokenizer/vocab.json"), "tokenizer", "has no vocabulary"),
        (
            write("unet/config.json", '{"quantization_config": {"quant_method": "gptq"}}'),
            "unet",
            "quantized by gptq, which needs the package gptqmodel",
        ),
        (write("triptych.json", '{"defaults": {"height": "tall"}}'), "serving config", "forbids its own default"),
        (write("triptych.json", '{"defualts": {}}'), "serving config", "cannot be read"),
        (write("model_index.json", '{"_class_name": ["pipeline", "MyPipeline"]}'), "index", "code that came with the"),
        (remove("model_index.json"), "index", "is not a diffusers model"),
    ],
)
def test_each_thing_that_is_wrong_is_a_sentence(model: Path, harm: Break, where: str, words: str) -> None:
    harm(model)
    found = [finding for finding in inspect_files(model) if finding.where == where and finding.fatal]
    assert found
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("\n".join(finding.problem for finding in found))


def test_what_the_libraries_write_and_take_is_no_finding(model: Path) -> None:
    (model / "scheduler" / "scheduler_config.json").write_text('{"lambda_min_clipped": -Infinity}')
    index = json.loads((model / "model_index.json").read_text())
    index |= {"guider": ["diffusers", "ClassifierFreeGuidance"], "sound_tokenizer": ["diffusers", "AudioTokenizer"]}
    (model / "model_index.json").write_text(json.dumps(index))
    for name in ("guider", "sound_tokenizer"):
        (model / name).mkdir()
    (model / "guider" / "guider_config.json").write_text("{}")
    (model / "sound_tokenizer" / "config.json").write_text("{}")
    safetensors(model / "sound_tokenizer" / "diffusion_pytorch_model.safetensors", weight=(2, 2))
    assert inspect_files(model) == []


def test_everything_that_is_wrong_is_said_and_not_just_the_first(model: Path) -> None:
    for harm in (remove("vae"), write(UNET, POINTER), remove("scheduler/scheduler_config.json")):
        harm(model)
    config = {"auto_map": {"AutoModel": "modelling.Mine"}}
    (model / "text_encoder" / "config.json").write_text(json.dumps(config))
    (model.parent / "a.safetensors").write_bytes(POINTER)
    found = inspect_files(model, loras=(LoraFile("a", model.parent / "a.safetensors"),))
    assert [(finding.where, finding.fatal) for finding in found] == [
        ("unet", True),
        ("vae", True),
        ("text_encoder", False),
        ("scheduler", True),
        ("LoRA a", True),
    ]


def test_a_header_tells_names_dtypes_and_shapes(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", one=(2, 3), two=())
    assert read_header(path) == {"one": TensorHeader("F32", (2, 3)), "two": TensorHeader("F32", ())}
    assert TensorHeader("BF16", (2, 3)).nbytes == 12
    for content in (
        b"",
        b"1234",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{x",
    ):
        path.write_bytes(content)
        with pytest.raises(HeaderError):
            read_header(path)


def test_modular_indexes_say_where_a_component_is(tmp_path: Path) -> None:
    index = {
        "vae": ["diffusers", "AutoencoderKL", {"pretrained_model_name_or_path": "/other", "subfolder": "vae_2"}],
        "unet": ["diffusers", "UNet2DConditionModel", {"subfolder": "unet"}],
        "guider": [None, None, {}],
    }
    assert component_entries(tmp_path, index) == (
        ComponentEntry("vae", "diffusers", "AutoencoderKL", Path("/other/vae_2")),
        ComponentEntry("unet", "diffusers", "UNet2DConditionModel", tmp_path / "unet"),
    )


def test_a_class_that_is_not_there_is_said_with_the_version_that_it_takes() -> None:
    entry = ComponentEntry("text_encoder", "transformers", "T7EncoderModel", Path("/none"))
    has = frozenset({"T5EncoderModel"})
    newer = class_problem(entry, has, "5.23.0", "5.31.0.dev0")
    assert newer.endswith(
        "and transformers 5.23.0 has no such class. The model was made with transformers 5.31.0.dev0."
    )
    assert class_problem(entry, has, "5.23.0", "5.9.1").endswith("Did you mean T5EncoderModel?")
    own = class_problem(ComponentEntry("unet", "my_unet", "Mine", Path("/none")), frozenset(), "")
    words = "such code is not run without [model] trust_remote_code = true"
    assert own == f"The unet is a Mine of my_unet, which is code that came with the model: {words}."
