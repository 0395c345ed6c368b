"""Which files of a component's folder are its weights, in each of the forms that folders come in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from triptych.engines.model_options import ModelOptions
from triptych.engines.weights.files import choose_variant, in_checkpoint, read_ahead_files, weight_files

SHARDS = ("-00001-of-00002", "-00002-of-00002")


def folder_of(folder: Path, *names: str) -> Path:
    """A folder of empty files; an index names all shards that follow it."""
    for place, name in enumerate(names):
        shards = [name for name in names[place + 1 :] if "-of-" in name]
        text = json.dumps({"weight_map": {f"w{number}": shard for number, shard in enumerate(shards)}})
        (folder / name).write_text(text if name.endswith(".json") else "")
    return folder


def found(folder: Path, *names: str, variant: str = "") -> tuple[list[str], str]:
    files = weight_files(folder_of(folder, *names), variant)
    assert bool(files.files) is not bool(files.problem)
    return [path.name for path in files.files], files.variant


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_plain_files_come_before_variants(stem: str, tmp_path: Path) -> None:
    names = (f"{stem}.safetensors", f"{stem}.fp16.safetensors", "config.json", f"{stem}.bin")
    assert found(tmp_path, *names) == ([f"{stem}.safetensors"], "")
    assert found(tmp_path, *names, variant="fp16") == ([f"{stem}.fp16.safetensors"], "fp16")
    assert found(tmp_path, *names, variant="ema") == ([f"{stem}.safetensors"], "")


def test_the_only_variant_is_taken_and_named(tmp_path: Path) -> None:
    assert found(tmp_path, "model.fp16.safetensors") == (["model.fp16.safetensors"], "fp16")
    assert weight_files(tmp_path).note == 'variant "fp16"'


@pytest.mark.parametrize(
    ("index", "shard", "variant"),
    [
        ("model.safetensors.index.json", "model{}.safetensors", ""),
        ("model.safetensors.index.fp16.json", "model.fp16{}.safetensors", "fp16"),
        ("model.safetensors.index.fp16.json", "model{}.fp16.safetensors", "fp16"),
        ("model.safetensors.fp16.index.json", "model{}.fp16.safetensors", "fp16"),
    ],
)
def test_shards_are_those_of_their_index(index: str, shard: str, variant: str, tmp_path: Path) -> None:
    shards = [shard.format(part) for part in SHARDS]
    assert found(tmp_path, index, *shards) == (shards, variant)
    assert weight_files(tmp_path).index == tmp_path / index


@pytest.mark.parametrize(("stem", "sharded"), [("model", False), ("diffusion_pytorch_model", True)])
def test_of_shards_and_one_file_those_are_read_that_the_library_takes(stem: str, sharded: bool, tmp_path: Path) -> None:
    shards = [f"{stem}{part}.safetensors" for part in SHARDS]
    names, _ = found(tmp_path, f"{stem}.safetensors.index.json", *shards, f"{stem}.safetensors")
    assert names == (shards if sharded else [f"{stem}.safetensors"])


@pytest.mark.parametrize(
    ("names", "variant", "words"),
    [
        (["model.a.safetensors", "model.b.safetensors"], "", 'the variants "a" and "b": choose one with'),
        (["model.a.safetensors"], "fp16", 'no variant "fp16" of its weights, but "a"'),
        (["pytorch_model.bin"], "", "pytorch_model.bin, a pickle, which could run code and is never read: fetch the"),
        (["model-00001-of-00002.safetensors"], "", "but not their index"),
        (["flux1-dev.safetensors"], "", "but flux1-dev.safetensors: rename or convert it"),
        (["config.json"], "", "fetch the weights of this component"),
    ],
)
def test_what_cannot_be_read_is_said_with_what_to_do(
    names: list[str], variant: str, words: str, tmp_path: Path
) -> None:
    files = weight_files(folder_of(tmp_path, *names), variant)
    assert files.files == ()
    assert words in files.problem


def test_an_index_reaches_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../other/model.safetensors"}}')
    assert "which is not a file of its folder" in weight_files(tmp_path).problem


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert weight_files(tmp_path / "none").problem == "is not there: fetch it"


def test_a_variant_is_chosen_where_there_is_a_choice() -> None:
    assert choose_variant(["", "fp16"], "fp16") == "fp16"
    assert choose_variant(["", "fp16"], "") == ""
    assert choose_variant(["fp16"], "") == "fp16"
    assert choose_variant(["fp16"], "ema") is None
    assert choose_variant(["fp16", "ema"], "") is None


SDXL = ("model.diffusion_model.x", "first_stage_model.x", "conditioner.embedders.0.transformer.x")


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (SDXL, {"unet", "transformer", "vae", "text_encoder"}),
        (("double_blocks.0.x",), {"unet", "transformer"}),
        (("vae.x", "text_encoders.t5xxl.x"), {"vae", "text_encoder_2", "text_encoder_3"}),
        ((), {"unet", "transformer"}),
    ],
)
def test_what_a_checkpoint_has_is_told_by_how_names_begin(keys: tuple[str, ...], names: set[str]) -> None:
    known = {"unet", "transformer", "transformer_2", "vae", "audio_vae", "controlnet", "tokenizer"}
    known |= {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert {name for name in known if in_checkpoint(name, keys)} == names


def test_a_checkpoint_is_read_ahead_by_who_needs_most_of_it(tmp_path: Path) -> None:
    checkpoint, own = tmp_path / "x.safetensors", tmp_path / "vae.safetensors"
    save_file({key: np.zeros(1) for key in SDXL}, checkpoint)
    options = ModelOptions(checkpoint=checkpoint)
    assert read_ahead_files("unet", tmp_path / "unet", options) == (checkpoint,)
    assert read_ahead_files("vae", tmp_path / "vae", options) == ()
    assert read_ahead_files("vae", tmp_path / "vae", ModelOptions(components=(("vae", own),))) == (own,)
