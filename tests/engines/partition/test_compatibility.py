"""The files of a model are held against the classes of its components, without its weights being read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from triptych.engines.model_options import ModelOptions
from triptych.engines.parameters.lora import LoraFile
from triptych.engines.partition.compatibility import check_compatibility, difference, lora_difference
from triptych.engines.weights.inspection import Finding
from triptych.tools.make_lora import make_lora

Models = Callable[[str], Path]


@pytest.fixture
def flux(models: Models, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models("flux"), tmp_path / "flux"))


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def problems(found: tuple[Finding, ...]) -> list[tuple[str, bool]]:
    return [(finding.where, finding.fatal) for finding in found]


def said(found: tuple[Finding, ...]) -> str:
    return "\n".join(finding.problem for finding in found)


def test_a_model_that_fits_has_no_findings_and_its_size_is_known(flux: Path) -> None:
    found = check_compatibility(flux)
    assert found.findings == ()
    assert found.needed >= {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler"}
    weights = load_file(flux / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.elements["transformer"] == sum(tensor.numel() for tensor in weights.values())


def test_weights_of_another_shape_missing_ones_and_others_are_all_said(flux: Path) -> None:
    for name, file in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = flux / name / f"{file}.safetensors"
        weights = load_file(path)
        first, second, *_ = sorted(weights)
        weights.pop(first)
        weights[second] = torch.zeros(3, 5)
        weights["strange"] = torch.zeros(2)
        save_file(weights, path, metadata={"format": "pt"})
    found = check_compatibility(flux)
    each = [True, True, False]
    assert problems(found.findings) == [
        (name, fatal) for name in ("text_encoder", "transformer") for fatal in each
    ] or problems(found.findings) == [(name, fatal) for name in ("transformer", "text_encoder") for fatal in each]
    for words in ("lacks 1 of the", "has the shape [3, 5] instead of", "that are ignored: strange"):
        assert said(found.findings).count(words) == 2


def test_missing_classes_tokenizers_and_serving_configs_are_all_checked(flux: Path) -> None:
    change(
        flux / "model_index.json",
        text_encoder_2=["transformers", "T7EncoderModel"],
        transformer=["my_transformer", "MyTransformer"],
    )
    (flux / "tokenizer" / "tokenizer.json").write_text("{}")
    change(flux / "vae" / "config.json", latent_channels="many")
    found = check_compatibility(flux)
    assert sorted(problems(found.findings)) == [
        (name, True) for name in ("text_encoder_2", "tokenizer", "transformer", "vae")
    ]
    assert "T7EncoderModel of transformers, and transformers" in said(found.findings)
    assert "MyTransformer of my_transformer, which is code that came with the model" in said(found.findings)


def test_a_default_that_is_misspelt_is_named_with_what_it_means(flux: Path) -> None:
    change(flux / "triptych.json", defaults={"hieght": 64, "width": 64})
    (found,) = check_compatibility(flux).findings
    assert (found.where, found.fatal) == ("serving config", False)
    assert found.problem.endswith('have "hieght": did you mean "height"?')


def test_a_task_whose_components_the_model_lacks_is_refused(models: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models("sdxl"), tmp_path / "sdxl"))
    shutil.rmtree(model / "controlnet")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "controlnet"}))
    assert check_compatibility(model).findings == ()
    found = check_compatibility(model, ModelOptions(task="controlnet_text2image"))
    assert "has no controlnet" in said(found.findings)
    assert "for the task controlnet_text2image" in said(found.findings)


def test_a_lora_of_another_model_is_refused_before_it_is_loaded(models: Models, tmp_path: Path) -> None:
    make_lora(models("flux"), tmp_path / "fits.safetensors")
    weights = load_file(tmp_path / "fits.safetensors")
    other = {name: torch.zeros(tensor.shape[0] + 1, tensor.shape[1] + 1) for name, tensor in weights.items()}
    save_file(other, tmp_path / "other.safetensors", metadata={"format": "pt"})
    loras = tuple(LoraFile(name, tmp_path / f"{name}.safetensors") for name in ("fits", "other"))
    found = check_compatibility(models("flux"), loras=loras)
    assert {finding.where for finding in found.findings} == {"LoRA other"}
    assert "do not fit" in said(found.findings)


def test_differences_are_named() -> None:
    wanted = {"a": (2,), "b": (2, 3), "table": (4,)}
    assert difference(wanted, frozenset({"table"}), {"a": (2,), "b": (2, 3)}) == []
    assert difference(wanted, frozenset({"table"}), {"b": (3, 2), "c": ()}) == [
        ("lacks 1 of the 3 weights of its class, such as a", True),
        ("does not fit its config.json: b has the shape [3, 2] instead of [2, 3]", True),
        ("has weights that its class does not have and that are ignored: c", False),
    ]


def test_an_adapter_fits_by_the_places_and_sides_of_its_matrices() -> None:
    module = {"block.to_q.weight": (8, 6)}
    fits = {"block.to_q.lora_A.weight": (2, 6), "block.to_q.lora_B.weight": (8, 2), "block.to_q.alpha": ()}
    assert lora_difference(fits, module) == ""
    assert lora_difference({**fits, "block.to_q.lora_B.weight": (7, 2)}, module).startswith("1 of its 2 matrices")
    assert lora_difference(fits, {"block.other.weight": (8, 6)}).startswith("2 of its 2 matrices")
