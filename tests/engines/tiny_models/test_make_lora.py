from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.engines.stage_pipelines import Models
from triptych.tools.make_lora import main, make_lora


def test_the_same_seed_makes_the_same_file(models: Models, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("one", "same", "other")}
    for name, path in files.items():
        assert make_lora(models("sdxl"), path, rank=2, seed=int(name == "other")) == (
            "unet",
            "text_encoder",
            "text_encoder_2",
        )
    assert files["one"].read_bytes() == files["same"].read_bytes() != files["other"].read_bytes()
    tensors = load_file(files["one"])
    assert {name.partition(".")[0] for name in tensors} == {"unet", "text_encoder", "text_encoder_2"}
    assert all(2 in tensor.shape for tensor in tensors.values())


def test_the_command_says_what_it_made_or_why_not(models: Models, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    made = CliRunner().invoke(app, [str(models("flux")), str(tmp_path / "a.safetensors"), "--component", "transformer"])
    assert made.exit_code == 0
    assert "A LoRA for transformer of" in made.stdout
    for model, reason in ((models("pixart"), "nothing"), (models("flux"), "transformer, text_encoder")):
        refused = CliRunner().invoke(app, [str(model), str(tmp_path / "b.safetensors"), "--component", "vae"])
        assert refused.exit_code == 2
        assert reason in " ".join(re.sub(r"[│\s]+", " ", refused.output).split())
    with pytest.raises(ValueError, match="loads LoRAs for FluxPipeline into: transformer, text_encoder"):
        make_lora(models("flux"), tmp_path / "b.safetensors", components=("vae",))
