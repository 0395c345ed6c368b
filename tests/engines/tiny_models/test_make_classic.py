"""The tiny models of pipelines without blocks are what their makers say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from triptych.engines.parameters.serving_config import ParameterError, load_serving_config
from triptych.engines.partition.stages import Stage
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.tools.make_classic import ClassicFamily, main, make_classic

Models = Callable[[str], Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ClassicFamily)
def test_the_same_seed_makes_the_same_files(family: ClassicFamily, classic_models: Models, tmp_path: Path) -> None:
    make_classic(tmp_path / "again", family)
    make_classic(tmp_path / "other", family, seed=1)
    first, again, other = (contents(f) for f in (classic_models(family), tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {n for n in first if n.endswith(".safetensors")}
    assert sum(map(len, first.values())) < 2_000_000


@pytest.mark.parametrize("family", ClassicFamily)
def test_the_card_makes_a_request_of_a_prompt(family: ClassicFamily, classic_models: Models) -> None:
    serving_config = load_serving_config(classic_models(family))
    model = classic_models(family)
    encoder = StagePipeline.load(model, (Stage.ENCODER,), dtype=torch.float32, device=torch.device("cpu"))
    parameters = encoder.signature.parameters
    follows_lines = family is ClassicFamily.SD_CONTROLNET
    with pytest.raises(ParameterError, match="image is required") if follows_lines else nullcontext():
        inputs = serving_config.apply({"prompt": "a red ship", "num_inference_steps": 1}, parameters)
        assert inputs.keys() - {"prompt"} == serving_config.defaults.keys()


def test_the_command_says_where_the_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tmp_path / "model", ClassicFamily.CHROMA, 0)
    assert f"A tiny chroma model is in {tmp_path / 'model'}." in capsys.readouterr().out
