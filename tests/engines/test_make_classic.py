"""The tiny models of pipelines without blocks are what their makers say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from triptych.engines.card import CardError, load_card
from triptych.engines.panels import Panel
from triptych.engines.pipeline import PanelPipeline
from triptych.tools.make_classic import Classic, main, make_classic

Models = Callable[[str], Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", Classic)
def test_the_same_seed_makes_the_same_files(family: Classic, classic_models: Models, tmp_path: Path) -> None:
    make_classic(tmp_path / "again", family)
    make_classic(tmp_path / "other", family, seed=1)
    first, again, other = (contents(f) for f in (classic_models(family), tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {n for n in first if n.endswith(".safetensors")}
    assert sum(map(len, first.values())) < 2_000_000


@pytest.mark.parametrize("family", Classic)
def test_the_card_makes_a_request_of_a_prompt(family: Classic, classic_models: Models) -> None:
    card = load_card(classic_models(family))
    model = classic_models(family)
    encoder = PanelPipeline.load(model, (Panel.ENCODER,), dtype=torch.float32, device=torch.device("cpu"))
    parameters = encoder.signature.parameters
    follows_lines = family is Classic.SD_CONTROLNET
    with pytest.raises(CardError, match="image is required") if follows_lines else nullcontext():
        inputs = card.apply({"prompt": "a red ship", "num_inference_steps": 1}, parameters)
        assert inputs.keys() - {"prompt"} == card.defaults.keys()


def test_the_command_says_where_the_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tmp_path / "model", Classic.CHROMA, 0)
    assert f"A tiny chroma model is in {tmp_path / 'model'}." in capsys.readouterr().out
