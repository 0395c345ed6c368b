"""Models in the forms that people have them in: each served in three stages, identical to diffusers' own loading."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    StableDiffusionXLPipeline,
    TorchAoConfig,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torchao.quantization import Int8WeightOnlyConfig
from typer.testing import CliRunner

from tests.engines.original_checkpoints import narrow_flux, save, save_flux, save_gguf, save_sdxl, weights_of
from tests.engines.results import media, same, seeded_generator
from tests.engines.stage_pipelines import Models
from triptych.actors import load_topology
from triptych.actors.command import app
from triptych.actors.command.preflight import preflight
from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.roles.worker.model_loading import describe_model, model_options
from triptych.tools.make_model import stable_diffusion, text, write_model

CPU = torch.device("cpu")
FLUX: dict[str, Any] = {
    "prompt": "a red boat",
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
}


def load(
    model: Path, stage: Stage, options: ModelOptions = DEFAULTS, dtype: torch.dtype = torch.float32
) -> StagePipeline:
    return StagePipeline.load(model, (stage,), dtype=dtype, device=CPU, options=options)


def served(
    model: Path, inputs: dict[str, Any], options: ModelOptions = DEFAULTS, dtype: torch.dtype = torch.float32
) -> np.ndarray[Any, Any]:
    """What three stages make, each of which has loaded its own components alone."""
    encoder, denoiser, decoder = (load(model, stage, options, dtype) for stage in Stage)
    assert not encoder.components & denoiser.components & decoder.components
    denoising = denoiser.denoise(encoder.encode(inputs, 7))
    while denoising.advance():
        pass
    return media(decoder.decode(denoising.result()))


def plain(pipeline: Any, inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    return media(pipeline(generator=seeded_generator(7), **inputs))


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


# Variants and shards ----------------------------------------------------------------------------------------------


def saved(model: Path, folder: Path, **how: Any) -> Path:
    """A model as diffusers saves it, with its serving config."""
    DiffusionPipeline.from_pretrained(str(model)).save_pretrained(str(folder), **how)
    shutil.copy(model / "triptych.json", folder)
    return folder


def test_a_folder_with_nothing_but_a_variant_is_served(models: Models, tmp_path: Path) -> None:
    model = saved(models("flux"), tmp_path / "model", variant="fp16")
    assert not list(model.glob("*/model.safetensors"))
    theirs = DiffusionPipeline.from_pretrained(str(model), variant="fp16")
    assert same(served(model, FLUX), plain(theirs, FLUX))
    assert load(model, Stage.DENOISER).placement.notes == {"transformer": 'variant "fp16"'}


def test_a_variant_is_read_where_the_topology_says_so(models: Models, tmp_path: Path) -> None:
    model = copied(models("flux"), tmp_path)
    other = DiffusionPipeline.from_pretrained(str(model)).transformer
    with torch.no_grad():
        other.proj_out.weight.mul_(-1)
    other.save_pretrained(str(model / "transformer"), variant="ema")
    theirs = DiffusionPipeline.from_pretrained(str(model), transformer=other)
    ours = served(model, FLUX, ModelOptions(variant="ema"))
    assert same(ours, plain(theirs, FLUX))
    assert not same(ours, served(model, FLUX))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_served_of_every_component(variant: str | None, models: Models, tmp_path: Path) -> None:
    model = saved(models("flux"), tmp_path / "model", max_shard_size="40KB", variant=variant)
    assert list(model.glob("transformer/*-of-*"))
    assert list(model.glob("text_encoder/*-of-*"))
    theirs = DiffusionPipeline.from_pretrained(str(model), variant=variant)
    assert same(served(model, FLUX), plain(theirs, FLUX))


# One file ---------------------------------------------------------------------------------------------------------


SDXL: dict[str, Any] = {"prompt": "a red boat", "height": 32, "width": 32, "num_inference_steps": 2}


def without_weights(model: Path, folder: Path) -> Path:
    """The configurations and tokenizers of a model."""
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text encoders of two widths, by which diffusers tells them apart, and with the layers by which it knows them."""
    folder, recipe = tmp_path_factory.mktemp("sdxl"), stable_diffusion.sdxl()
    made = recipe.components | {
        "text_encoder": lambda: text.clip_text(hidden_size=16, intermediate_size=32),
        "text_encoder_2": lambda: text.clip_text(projection=True, num_hidden_layers=10),
        "unet": lambda: UNet2DConditionModel(
            **stable_diffusion._unet() | {"cross_attention_dim": 16 + text.WIDTH},
            sample_size=16,
            layers_per_block=1,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
    }
    components = {name: make for name, make in made.items() if name not in ("controlnet", "image_encoder")}
    write_model(folder, "sdxl", replace(recipe, components=components, files={}), 0, progress=False)
    return folder


def test_a_checkpoint_of_stable_diffusion_xl_is_served(sdxl: Path, tmp_path: Path) -> None:
    file, config = tmp_path / "tiny.safetensors", without_weights(sdxl, tmp_path / "config")
    save_sdxl(sdxl, file)
    options = ModelOptions(checkpoint=file, route="classic")
    theirs = StableDiffusionXLPipeline.from_single_file(str(file), config=str(config), local_files_only=True)
    ours = served(config, SDXL, options)
    assert same(ours, plain(theirs, SDXL))
    assert same(ours, served(sdxl, SDXL, ModelOptions(route="classic"))), "as the folder that it was made of"
    assert same(served(config, SDXL, ModelOptions(checkpoint=file)), served(sdxl, SDXL)), "in blocks too"
    assert load(config, Stage.DENOISER, options).placement.notes == {"unet": "tiny.safetensors"}


def test_a_checkpoint_of_flux_is_served(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"], "checkpoint_mapping_fn", narrow_flux(32)
    )
    model = models("flux-kl")
    file, config = tmp_path / "tiny.safetensors", without_weights(model, tmp_path / "config")
    save_flux(model, file)
    theirs = FluxPipeline.from_single_file(str(file), config=str(config), local_files_only=True)
    theirs.text_encoder_2.eval()  # which diffusers leaves in training, and so with dropout
    ours = served(config, FLUX, ModelOptions(checkpoint=file))
    assert same(ours, plain(theirs, FLUX))
    assert same(ours, served(model, FLUX))


def test_what_a_checkpoint_lacks_comes_from_the_folder_of_configurations(models: Models, tmp_path: Path) -> None:
    model = copied(models("flux-kl"), tmp_path)
    file = tmp_path / "transformer.safetensors"
    weights = weights_of(model / "transformer")
    save(file, {name: -value if name == "proj_out.weight" else value for name, value in weights.items()})
    ours = served(model, FLUX, ModelOptions(checkpoint=file))
    other = FluxTransformer2DModel.from_single_file(str(file), config=str(model), subfolder="transformer")
    assert same(ours, plain(FluxPipeline.from_pretrained(model, transformer=other), FLUX))
    assert not same(ours, served(model, FLUX))
    shutil.rmtree(model / "vae")
    with pytest.raises(ModelError, match=r"there is no folder .*/vae for its vae"):
        load(model, Stage.DECODER, ModelOptions(checkpoint=file))


def test_components_come_from_files_of_their_own(models: Models, tmp_path: Path) -> None:
    model = models("flux-kl")
    config = without_weights(model, tmp_path / "config")
    files = {}
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        files[name] = tmp_path / f"{name}.safetensors"
        save(files[name], weights_of(model / name))
    files["vae"] = model / "vae"
    assert same(served(config, FLUX, ModelOptions(components=tuple(files.items()))), served(model, FLUX))
    with pytest.raises(
        ModelError, match=r"transfromer, which is not a component of FluxPipeline: did you mean transform"
    ):
        load(config, Stage.DENOISER, ModelOptions(components=(("transfromer", files["transformer"]),)))
    with pytest.raises(ModelError, match=r"The transformer in .* cannot be loaded: "):
        load(config, Stage.DENOISER, ModelOptions(components=(("transformer", files["text_encoder"]),)))


def test_scaled_weights_are_refused(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "scaled.safetensors"
    save(file, weights_of(models("flux") / "transformer"), {"proj_out.scale_weight": torch.ones(1)})
    with pytest.raises(ModelError, match=r"its weights are scaled \(proj_out.scale_weight\)"):
        load(models("flux"), Stage.DENOISER, ModelOptions(components=(("transformer", file),)))


def test_a_gguf_file_is_served_and_stays_in_its_blocks(models: Models, tmp_path: Path) -> None:
    model, file = models("flux"), tmp_path / "transformer.gguf"
    save_gguf(weights_of(model / "transformer"), file)
    theirs = DiffusionPipeline.from_pretrained(
        str(model),
        transformer=FluxTransformer2DModel.from_single_file(
            str(file),
            config=str(model),
            subfolder="transformer",
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        ),
    )
    options = ModelOptions(components=(("transformer", file),))
    ours = served(model, FLUX, options)
    assert same(ours, plain(theirs, FLUX))
    assert not same(ours, served(model, FLUX)), "a little other than before it was quantized"
    held = load(model, Stage.DENOISER, options).placement.held_bytes
    assert held < 0.5 * load(model, Stage.DENOISER).placement.held_bytes
    assert same(served(model, FLUX, ModelOptions(checkpoint=file)), ours), "as the file of the model as well"


# Quantized --------------------------------------------------------------------------------------------------------


def test_a_component_that_torchao_quantized_is_served_as_it_is(models: Models, tmp_path: Path) -> None:
    model = copied(models("flux"), tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    FluxTransformer2DModel.from_pretrained(
        str(model), subfolder="transformer", quantization_config=config, dtype=torch.bfloat16
    ).save_pretrained(str(tmp_path / "int8"))
    shutil.rmtree(model / "transformer")
    shutil.move(tmp_path / "int8", model / "transformer")
    assert [path.suffix for path in (model / "transformer").glob("*model*")] == [".safetensors"]
    theirs = DiffusionPipeline.from_pretrained(str(model), dtype=torch.bfloat16)
    ours = served(model, FLUX, dtype=torch.bfloat16)
    assert same(ours, plain(theirs, FLUX))
    assert not same(ours, served(models("flux"), FLUX, dtype=torch.bfloat16))
    denoiser = StagePipeline.load(
        model, (Stage.DENOISER,), dtype=torch.bfloat16, device=CPU, quantization="float8"
    ).placement
    assert denoiser.held_bytes == denoiser.read_bytes, "what is quantized already stays as it is"


def test_a_component_of_bitsandbytes_is_refused_on_the_cpu(models: Models, tmp_path: Path) -> None:
    model = copied(models("flux"), tmp_path)
    file = model / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"The transformer in .* computes on a CUDA device and not on cpu"):
        load(model, Stage.DENOISER)
    load(model, Stage.DECODER)


# triptych init -----------------------------------------------------------------------------------------------------


def test_init_writes_a_topology_that_check_takes(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "made.toml"
    shown = CliRunner().invoke(app, ["init", str(models("wan")), "-o", str(file)])
    assert shown.exit_code == 0, shown.stderr
    assert f"triptych up {file}" in shown.stdout
    topology = load_topology(file)
    preflight(topology, topology.components)
    assert topology.models[0].path == models("wan")
    assert [role.kind for role in topology.models[0].section.roles] == list(Stage)
    assert "# WanPipeline, by the modular partition" in file.read_text()


def test_init_says_which_configurations_a_checkpoint_needs(
    sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, out = tmp_path / "tiny.safetensors", tmp_path / "made.toml"
    save_sdxl(sdxl, model)
    shown = CliRunner().invoke(app, ["init", str(model), "-o", str(out)])
    assert shown.exit_code == 2
    assert 'hf download stabilityai/stable-diffusion-xl-base-1.0 --include "*.json"' in shown.stderr
    repository = tmp_path / "hub" / "models--stabilityai--stable-diffusion-xl-base-1.0"
    without_weights(sdxl, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert CliRunner().invoke(app, ["init", str(model), "-o", str(out)]).exit_code == 0
    (found,) = load_topology(out).models
    assert (found.section.path, found.section.config) == (
        "tiny.safetensors",
        "stabilityai/stable-diffusion-xl-base-1.0",
    )
    assert (found.source.problem, found.title) == ("", "tiny")
    sentence, problem = describe_model(found)
    assert "unet from tiny.safetensors" in sentence
    assert not problem
    assert same(served(found.path, SDXL, model_options(found)), served(sdxl, SDXL))


# Code that comes with a model -------------------------------------------------------------------------------------


def with_code(model: Path, folder: Path) -> Path:
    """A model with a pipeline and a transformer of its own, which say that they were used."""
    made = copied(model, folder)
    (made / "helpers.py").write_text("NAME = 'mine'\n")
    (made / "pipeline.py").write_text(
        "from diffusers import PixArtSigmaPipeline\n"
        "from .helpers import NAME\n"
        "class Mine(PixArtSigmaPipeline):\n"
        "    name = NAME\n"
    )
    (made / "transformer" / "mine.py").write_text(
        "from diffusers import PixArtTransformer2DModel\nclass Other(PixArtTransformer2DModel):\n    pass\n"
    )
    index = json.loads((made / "model_index.json").read_text())
    index |= {"_class_name": ["pipeline", "Mine"], "transformer": ["mine", "Other"]}
    (made / "model_index.json").write_text(json.dumps(index))
    return made


def test_code_that_comes_with_a_model_is_run_only_where_the_topology_says_so(models: Models, tmp_path: Path) -> None:
    plain_model = models("pixart")
    model = with_code(plain_model, tmp_path)
    words = r"Mine is code that comes with the model .*/pipeline.py\). It is not run unless .* trust_remote_code = true"
    with pytest.raises(ModelError, match=words):
        load(model, Stage.ENCODER)
    trusted = ModelOptions(trust_remote_code=True)
    inputs = {name: value for name, value in FLUX.items() if name != "max_sequence_length"}
    assert same(served(model, inputs, trusted), served(plain_model, inputs))
    pipeline = load(model, Stage.DENOISER, trusted)._runner.pipeline
    assert (pipeline.name, type(pipeline.transformer).__name__) == ("mine", "Other")
    index = json.loads((model / "model_index.json").read_text()) | {"_class_name": ["missing", "Mine"]}
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="cannot be imported: No module named"):
        load(model, Stage.ENCODER, trusted)


def test_code_of_a_component_alone_is_refused_as_well(models: Models, tmp_path: Path) -> None:
    model = with_code(models("pixart"), tmp_path)
    index = json.loads((model / "model_index.json").read_text()) | {"_class_name": "PixArtSigmaPipeline"}
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="Other is code that comes with the model"):
        load(model, Stage.DENOISER)
