from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.engines.families import all_families
from triptych.engines.parameters.serving_config import ParameterError, load_index, load_serving_config
from triptych.engines.partition.blocks import load_modular_partition
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.tools.make_model import CLASSIC, Family, Size, SizeError, flux, make_model
from triptych.tools.make_model.__main__ import main
from triptych.tools.make_model.recipe import Recipe

Models = Callable[[str], Path]
SOME = (Family.FLUX, Family.WAN, Family.PIXART)
NEEDS_VISION = {family for family in Family if family.startswith(("qwenimage-", "qwenimage21", "flux3", "minimax-h3"))}
# What libraries fix: layers of 2048, a width of 1280, 168,059 numbers of codes.
LARGE = {
    Family.HUNYUAN_VIDEO15: 20_000_000,
    Family.WAN_ANIMATE2: 50_000_000,
    Family.WAN_ANIMATE2_DISTILLED: 50_000_000,
    Family.MINIMAX_MUSIC3: 12_000_000,
}


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("family", all_families([*SOME, *sorted(CLASSIC - {Family.PIXART})], SOME))
def test_the_same_seed_makes_the_same_files(family: Family, models: Models, tmp_path: Path) -> None:
    make_model(tmp_path / "again", family, progress=False)
    make_model(tmp_path / "other", family, seed=1, progress=False)
    first, again, other = (contents(folder) for folder in (models(family), tmp_path / "again", tmp_path / "other"))
    assert first == again
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}
    assert sum(path.stat().st_size for path in models(family).rglob("*") if path.is_file()) < 2_000_000


@pytest.mark.parametrize("family", all_families(sorted(set(Family) - CLASSIC - NEEDS_VISION), SOME))
def test_every_family_makes_a_small_folder_that_can_be_cut(family: Family, models: Models) -> None:
    model = models(family)
    split = load_modular_partition(model)
    assert split.blocks_of.keys() == set(Stage)
    most = LARGE.get(family, 3_200_000)
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) < most
    missing = [name for name in split.blocks.component_names if not (model / name).is_dir()]
    made_of_nothing = set(split.pipeline(split.blocks).config_component_names)
    gone_without = {name for name, entry in load_index(model).items() if entry == [None, None]}
    assert set(missing) <= made_of_nothing | gone_without


@pytest.mark.parametrize(
    ("larger", "millions"),
    [
        (flux.mid, {"text_encoder": 85, "text_encoder_2": 309, "transformer": 639, "vae": 84}),
        (flux.full, {"text_encoder": 123, "text_encoder_2": 4762, "transformer": 11901, "vae": 84}),
    ],
)
def test_a_larger_size_is_made_of_the_same_parts(larger: Callable[[], Recipe], millions: dict[str, int]) -> None:
    recipe = larger()
    assert recipe.components.keys() == flux.flux(lambda: None, guidance_embeds=True).components.keys()
    with torch.device("meta"):
        models = {name: make() for name, make in recipe.components.items() if make and name in millions}
    weights = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert {name: round(count / 1e6) for name, count in weights.items()} == millions


def test_a_family_that_is_not_made_in_a_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SizeError, match="no wan of the size mid, only: flux-kl"):
        make_model(tmp_path / "model", Family.WAN, size=Size.MID)
    assert not (tmp_path / "model").exists()


def test_the_command_shows_its_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(tmp_path / "model", Family.FLUX, 0)
    shown, errors = capfd.readouterr()
    assert "Making components" in shown
    assert "100%" in shown
    assert f"A tiny flux model is in {tmp_path / 'model'}." in shown
    assert "it/s" not in errors


@pytest.mark.parametrize("family", all_families([*SOME, *sorted(CLASSIC - {Family.PIXART})], SOME))
def test_the_serving_config_makes_a_request_of_a_prompt(family: Family, models: Models) -> None:
    serving_config = load_serving_config(models(family))
    encoder = StagePipeline.load(models(family), (Stage.ENCODER,), dtype=torch.float32, device=torch.device("cpu"))
    parameters = encoder.signature.parameters
    follows_lines = family is Family.SD_CONTROLNET
    with pytest.raises(ParameterError, match="image is required") if follows_lines else nullcontext():
        inputs = serving_config.apply({"prompt": "a red ship", "num_inference_steps": 1}, parameters)
        assert inputs.keys() - {"prompt"} == serving_config.defaults.keys()


@pytest.mark.parametrize("family", SOME)
def test_each_word_and_each_seed_makes_another_image(family: Family, models: Models) -> None:
    inputs = {**load_serving_config(models(family)).defaults, "num_inference_steps": 1}
    pipeline = StagePipeline.load(models(family), tuple(Stage), dtype=torch.float32, device=torch.device("cpu"))
    made = set()
    for prompt, seed in (("a red ship", 0), ("a red shop", 0), ("a red ship", 1)):
        denoising = pipeline.denoise(pipeline.encode({**inputs, "prompt": prompt}, seed))
        while denoising.advance():
            pass
        (decoded,) = pipeline.decode(denoising.result()).values()
        made.add(np.asarray(decoded[0]).tobytes())
    assert len(made) == 3


def test_tokenizers_know_every_byte(models: Models) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(models("flux") / name)
        text = "Ein Mädchen, 猫 and 🚢"
        numbers = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in numbers
        assert len(numbers) == len(text.encode()) + (2 if name == "tokenizer" else 1)
        assert numbers[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(numbers, skip_special_tokens=True) == text
