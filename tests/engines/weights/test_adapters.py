"""LoRA adapters: each request runs with its own or with none, and makes what plain diffusers makes with that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.results import same
from tests.engines.stage_pipelines import Models, Stages, expected, lora, plain
from triptych.engines.parameters.lora import LoraChoice, LoraFile, check_lora, choose_loras
from triptych.engines.parameters.schema import names
from triptych.engines.parameters.serving_config import ParameterError, load_index, load_serving_config
from triptych.engines.partition.strategy import lora_class
from triptych.engines.pipelines.pipeline import InputError, StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.engines.weights.adapters import Adapters
from triptych.tools.families.stage_processes import CPU

STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


# Against plain diffusers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("flux", torch.float32),
        ("flux", torch.bfloat16),
        ("sdxl", torch.float32),
        ("cogvideox", torch.float32),
        pytest.param("wan", torch.float32, marks=pytest.mark.families),
        pytest.param("sana", torch.bfloat16, marks=pytest.mark.families),
    ],
)
def test_each_request_makes_what_diffusers_makes_with_its_adapter(
    family: str, dtype: torch.dtype, models: Models, files: Path
) -> None:
    model = models(family)
    loras = {name: lora(files, model, f"{family}-{name}") for name in ("a", "b")}
    adapters = tuple(LoraFile(name, path, 0.8) for name, path in loras.items())
    stages = Stages(model, dtype, adapters=adapters)
    both = {"lora": ["b", "a"], "lora_scale": [0.5, -0.7]}
    asked = [{"lora": "a"}, {}, {"lora": "b", "lora_scale": 1.5}, {"lora": "a", "lora_scale": -0.5}, {"lora": ""}, both]
    ours = [stages.make(3, **STEPS, **more) for more in asked]

    without = plain(model, dtype, blocks=family not in ("cogvideox", "sana"))
    bare = expected(without, model, 3, **STEPS)
    assert same(ours[1], bare)
    assert same(ours[4], bare)
    for index, name, scale in ((0, "a", 0.8), (2, "b", 1.5), (3, "a", -0.5)):
        without.load_lora_weights(str(loras[name]), adapter_name="only")
        without.set_adapters("only", scale)
        assert same(ours[index], expected(without, model, 3, **STEPS)), (name, scale)
        without.unload_lora_weights()
    for name, path in loras.items():
        without.load_lora_weights(str(path), adapter_name=name)
    without.set_adapters(["b", "a"], [0.5, -0.7])
    assert same(ours[5], expected(without, model, 3, **STEPS))
    without.unload_lora_weights()
    assert not same(ours[5], bare)
    assert not same(ours[0], ours[2])
    assert not same(ours[0], ours[3])
    assert not same(ours[0], bare)


def test_a_process_with_adapters_computes_without_one_as_if_there_were_none(models: Models, files: Path) -> None:
    model = models("sdxl")
    adapters = (LoraFile("a", lora(files, model, "sdxl-a")),)
    for stages in (Stages(model), Stages(model, adapters=adapters)):
        state = stages.encode(1, **STEPS)
        latents = stages.denoise(state)["latents"]
        wanted = [
            sorted(name for name, weight in module.named_parameters() if weight.requires_grad and ".lora_" not in name)
            for pipeline in stages.pipelines.values()
            for module in vars(pipeline._runner.pipeline).values()
            if isinstance(module, torch.nn.Module)
        ]
        if not stages.pipelines[Stage.ENCODER].placement.adapters.files:
            first = state, latents
            weights = sum(len(names_of) for names_of in wanted)
    assert torch.equal(first[0]["prompt_embeds"], state["prompt_embeds"])  # type: ignore[arg-type]
    assert torch.equal(first[1], latents)  # type: ignore[arg-type]
    # `torch.matmul` rounds otherwise for some layouts of weights that want no gradients.
    assert sum(len(names_of) for names_of in wanted) == weights > 0


@pytest.mark.parametrize("family", ["flux", "cogvideox"])
def test_requests_that_take_turns_step_by_step_are_identical_to_runs_alone(
    family: str, models: Models, files: Path
) -> None:
    model = models(family)
    # Not of text encoders, which would make a difference before the first step.
    paths = {name: lora(files, model, f"{family}-{name}-turns", "transformer") for name in ("a", "b")}
    stages = Stages(model, adapters=tuple(LoraFile(name, path) for name, path in paths.items()))
    asked = [{"lora": "a"}, {}, {"lora": "b"}, {"lora": "a", "lora_scale": 0.3}]
    states = [stages.encode(5, num_inference_steps=3, **more) for more in asked]
    alone = [stages.denoise(state)["latents"] for state in states]
    turns = [stages.pipelines[Stage.DENOISER].denoise(state) for state in states]
    running = list(turns)
    while running:
        running = [denoising for denoising in running if denoising.advance()]
    for denoising, latents in zip(turns, alone, strict=True):
        assert torch.equal(denoising.result()["latents"], latents)  # type: ignore[arg-type]
    assert len({bytes(latents.numpy().tobytes()) for latents in alone}) == 4  # type: ignore[attr-defined]


def test_the_two_transformers_of_wan_2_2_have_a_file_each(models: Models, files: Path) -> None:
    model = models("wan22")
    high = lora(files, model, "high", "transformer")
    low = lora(files, model, "low", "transformer")
    # Both are written as if for the only transformer.
    assert {name.partition(".")[0] for name in load_file(low)} == {"transformer"}
    stages = Stages(model, adapters=(LoraFile("both", high, path_2=low), LoraFile("one", high)))
    ours = {name: stages.make(2, lora=name, num_inference_steps=4) for name in ("both", "one")}
    pipeline = plain(model)
    pipeline.load_lora_weights(str(high), adapter_name="x")
    pipeline.set_adapters("x", 1.0)
    assert same(ours["one"], expected(pipeline, model, 2, num_inference_steps=4))
    pipeline.load_lora_weights(str(low), adapter_name="x", load_into_transformer_2=True)
    pipeline.set_adapters("x", 1.0)
    assert same(ours["both"], expected(pipeline, model, 2, num_inference_steps=4))
    assert not same(ours["both"], ours["one"])


@pytest.mark.parametrize("family", ["flux", "cogvideox"])
def test_a_payload_that_is_used_again_runs_with_the_adapter_of_the_other_request(
    family: str, models: Models, files: Path
) -> None:
    model = models(family)
    paths = {name: lora(files, model, f"{family}-{name}-again", "transformer") for name in ("a", "b")}
    stages = Stages(model, adapters=tuple(LoraFile(name, path) for name, path in paths.items()))
    denoiser = stages.pipelines[Stage.DENOISER]
    asked: list[dict[str, object]] = [{"lora": "a"}, {"lora": "b", "lora_scale": 0.5}, {}]
    first = stages.encode(1, **STEPS, **asked[0])
    for more in asked:
        inputs = {"prompt": "a red ship", **load_serving_config(model).defaults, **STEPS, **more}
        rebound = denoiser.rebind(first, inputs, 2)
        expected_latents = stages.denoise(stages.encode(2, **STEPS, **more))["latents"]
        assert torch.equal(stages.denoise(rebound)["latents"], expected_latents)  # type: ignore[arg-type]


# What is loaded where ---------------------------------------------------------------------------------------------


def test_each_process_loads_what_it_owns_and_lets_the_rest_go(models: Models, files: Path) -> None:
    model = models("sdxl")
    stages = Stages(model, adapters=(LoraFile("a", lora(files, model, "sdxl-a")),))
    loaded = {stage: sorted(pipeline.placement.adapters._components) for stage, pipeline in stages.pipelines.items()}
    assert loaded == {
        Stage.ENCODER: ["text_encoder", "text_encoder_2"],
        Stage.DENOISER: ["unet"],
        Stage.DECODER: [],
    }
    assert all(not pipeline.placement.adapters._weights for pipeline in stages.pipelines.values())


def test_the_signature_says_where_there_is_a_choice_and_whether_it_changes_the_text(
    models: Models, files: Path
) -> None:
    model = models("flux")
    both = LoraFile("a", lora(files, model, "flux-a"))
    other = LoraFile("t", lora(files, model, "flux-t", "transformer"))

    def load(*adapters: LoraFile) -> list[StagePipeline]:
        return list(Stages(model, adapters=adapters).pipelines.values())

    for adapters, public, encodes in (((), False, False), ((other,), True, False), ((both, other), True, True)):
        for part in load(*adapters):
            for name in ("lora", "lora_scale"):
                assert (name in part.accepted) is public
                assert (name in names(part.signature.parameters)) is public
                assert (name in part.signature.encodes) is encodes
    with pytest.raises(InputError, match="takes no lora"):
        load()[0].encode({"prompt": "x", "lora": "a"}, 1)
    with pytest.raises(InputError, match="lora must be one of t: there is no adapter 'b'"):
        load(other)[0].encode({"prompt": "x", "lora": "b"}, 1)


def test_what_connects_a_text_encoder_and_a_transformer_belongs_to_the_encoder(models: Models, files: Path) -> None:
    model = models("ltx2")
    for name, component, encodes in (("c", "connectors", True), ("t", "transformer", False)):
        path = lora(files, model, f"ltx2-{name}", component)
        adapters = Adapters.read(model, (LoraFile(name, path),), lora_class(load_index(model)))
        assert adapters.encodes is encodes
    stages = Stages(model, adapters=(LoraFile("c", files / "ltx2-c.safetensors"),))
    states = [stages.encode(1, **STEPS, lora=name) for name in ("c", "")]
    assert stages.pipelines[Stage.DECODER].signature.encodes == stages.pipelines[Stage.ENCODER].signature.encodes
    assert "lora" in stages.pipelines[Stage.DECODER].signature.encodes
    assert not all(
        torch.equal(value, states[1][name])  # type: ignore[arg-type]
        for name, value in states[0].items()
        if isinstance(value, torch.Tensor)
    )


def test_a_payload_of_an_adapter_that_is_not_here_is_refused(models: Models, files: Path) -> None:
    model = models("flux")
    state = Stages(model, adapters=(LoraFile("a", lora(files, model, "flux-a")),)).encode(1, lora="a", **STEPS)
    denoising = Stages(model).pipelines[Stage.DENOISER].denoise(state)
    with pytest.raises(ValueError, match="There is no adapter 'a' here, only: none"):
        denoising.advance()
    assert not denoising.advance()


# Files that cannot be served --------------------------------------------------------------------------------------


def load_denoiser(model: Path, path: Path) -> StagePipeline:
    return StagePipeline.load(
        model, (Stage.DENOISER,), dtype=torch.float32, device=CPU, adapters=(LoraFile("a", path),)
    )


def changed(source: Path, out: Path, **renamed: str) -> Path:
    """A copy of a LoRA with parts of names replaced, in the first pair of matrices alone."""
    tensors = load_file(source)
    first = sorted(tensors)[0].rpartition(".lora_")[0]
    for old, new in renamed.items():
        tensors = {
            (name.replace(old, new, 1) if name.startswith(f"{first}.") else name): tensor
            for name, tensor in tensors.items()
        }
    save_file(tensors, out)
    return out


def test_nothing_of_a_file_is_dropped_silently(models: Models, files: Path, tmp_path: Path) -> None:
    model = models("flux")
    good = lora(files, model, "flux-t", "transformer")
    problems = {
        "of another component": (changed(good, tmp_path / "1.safetensors", transformer="vision"), "vision, which"),
        "of no layer": (changed(good, tmp_path / "2.safetensors", attn="attention"), "2.safetensors does not fit the"),
        "of another format": (changed(good, tmp_path / "3.safetensors", lora_A="dora_scale"), "is a DoRA"),
        "no LoRA": (changed(good, tmp_path / "4.safetensors", lora_A="norm_q"), "which is not a weight of a LoRA"),
        "of another model": (lora(files, models("wan"), "wan-a"), "does not fit the transformer"),
    }
    for path, sentence in problems.values():
        with pytest.raises(ModelError, match=sentence) as failure:
            load_denoiser(model, path)
        assert str(path) in str(failure.value)
        assert "\n" not in str(failure.value)


def test_only_safetensors_are_read(models: Models, files: Path, tmp_path: Path) -> None:
    model = models("flux")
    good = lora(files, model, "flux-t", "transformer")
    torch.save(load_file(good), tmp_path / "pickled.bin")
    with pytest.raises(ModelError, match=r"is not a \.safetensors file"):
        load_denoiser(model, tmp_path / "pickled.bin")
    with pytest.raises(ModelError, match=r"exactly one \.safetensors file, and has 0"):
        load_denoiser(model, tmp_path)
    with pytest.raises(ModelError, match="There is no LoRA file"):
        load_denoiser(model, tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not really")
    with pytest.raises(ModelError, match="cannot be read"):
        load_denoiser(model, tmp_path / "broken.safetensors")
    (tmp_path / "folder").mkdir()
    shutil.copy(good, tmp_path / "folder")
    assert load_denoiser(model, tmp_path / "folder").placement.adapters.files


def test_a_pipeline_that_takes_no_adapters_says_so(models: Models, files: Path) -> None:
    with pytest.raises(ModelError, match="diffusers loads no LoRA into a PixArtSigmaPipeline"):
        load_denoiser(models("pixart"), lora(files, models("flux"), "flux-t", "transformer"))


# By name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "param", "sentence"),
    [
        ({"lora": "c"}, "lora", "must be one of a, b: there is no adapter 'c'."),
        ({"lora": 3}, "lora", "must be a text, or a list of texts."),
        ({"lora": "a", "lora_scale": 4.1}, "lora_scale", "must be -4 to 4."),
        ({"lora_scale": float("nan")}, "lora_scale", "must be a number."),
        ({"lora_scale": True}, "lora_scale", "must be a number."),
        ({"lora": ["a", "c"]}, "lora", "must be one of a, b: there is no adapter 'c'."),
        ({"lora": ["a", "a"]}, "lora", "must not name an adapter twice."),
        (
            {"lora": ["a", "b"], "lora_scale": [1.0]},
            "lora_scale",
            "must be one number, or 2, one for each adapter, not 1.",
        ),
        ({"lora": ["a", "b"], "lora_scale": [1.0, 9]}, "lora_scale", "must be -4 to 4."),
    ],
)
def test_what_is_asked_for_must_be_there(inputs: dict[str, object], param: str, sentence: str) -> None:
    with pytest.raises(ParameterError) as failure:
        check_lora(inputs, {"a", "b"})
    assert (failure.value.param, failure.value.message) == (param, sentence)


def test_without_adapters_there_is_no_such_parameter() -> None:
    for name, value in (("lora", "a"), ("lora", ""), ("lora_scale", 1)):
        with pytest.raises(ParameterError, match="is not a parameter of shapes"):
            check_lora({name: value}, (), "shapes")
    check_lora({"prompt": "x", "lora": None}, ())


def test_a_choice_has_the_scale_of_the_request_or_of_its_entry() -> None:
    files = (LoraFile("a", Path("a"), 0.5),)
    check_lora({"lora": "a", "lora_scale": -4}, {"a"})
    assert choose_loras({"lora": "a", "lora_scale": -4}, files) == (LoraChoice("a", -4.0),)
    assert choose_loras({"lora": "a"}, files) == (LoraChoice("a", 0.5),)
    assert choose_loras({"lora": "", "lora_scale": 2.0}, files) == ()
    assert choose_loras({}, files) == choose_loras({"lora_scale": [1.0, 2.0]}, files) == ()
    files += (LoraFile("b", Path("b")),)
    assert choose_loras({"lora": ["b", "a"]}, files) == (LoraChoice("b", 1.0), LoraChoice("a", 0.5))
    assert choose_loras({"lora": ["b", "a"], "lora_scale": [2, 0.1]}, files) == (
        LoraChoice("b", 2.0),
        LoraChoice("a", 0.1),
    )
    assert choose_loras({"lora": ["b", "a"], "lora_scale": 2.0}, files) == (LoraChoice("b", 2.0), LoraChoice("a", 2.0))
