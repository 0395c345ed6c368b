from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.engines.parameters.serving_config import ParameterError, ServingConfig, load_serving_config
from triptych.engines.parameters.validation import default_limits
from triptych.engines.stages import ModelError

TAKES = (
    Parameter("fps", ParameterKind.INTEGER, alias_of="frame_rate"),
    Parameter("frame_rate", ParameterKind.INTEGER, 25),
    Parameter("guidance_scale", ParameterKind.NUMBER, 3.5),
    Parameter("height", ParameterKind.INTEGER),
    Parameter("image", ParameterKind.IMAGES),
    Parameter("layers", ParameterKind.INTEGER),
    Parameter("mask_image", ParameterKind.IMAGE),
    Parameter("mu", ParameterKind.NUMBER),
    Parameter("num_inference_steps", ParameterKind.INTEGER, 50),
    Parameter("original_size", ParameterKind.PAIR),
    Parameter("prompt", ParameterKind.TEXT, required=True),
    Parameter("sigmas", ParameterKind.NUMBERS),
    Parameter("tiled", ParameterKind.BOOLEAN),
    Parameter("true_cfg_scale", ParameterKind.NUMBER, alias_of="guidance_scale"),
    Parameter("video", ParameterKind.IMAGE_LIST),
    Parameter("width", ParameterKind.INTEGER),
)
NOT_TAKEN = f"is not a parameter of shapes. It takes {', '.join(parameter.name for parameter in TAKES)}."
SERVING_CONFIG = ServingConfig(
    name="shapes",
    defaults={"height": 64, "num_inference_steps": 4, "guidance_scale": 5, "tiled": False, "strength": 0.5},
    ranges={"height": (64, 128, 8), "num_inference_steps": (1, 50), "frame_rate": (1, 30), "sigmas": (0, 1)},
)
FILLED = {"prompt": "a cat", "height": 64, "num_inference_steps": 4, "guidance_scale": 5.0, "tiled": False}


@dataclass(frozen=True)
class Files:
    """As `roles.messages.work.Images`, of which engines know nothing."""

    files: tuple[str, ...]


@dataclass(frozen=True)
class Values:
    """As `roles.messages.work.Numbers`."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class Json:
    """As `roles.messages.work.Json`."""

    json: str


def test_defaults_fill_what_is_left_out_and_nothing_else() -> None:
    given_inputs = {"prompt": "a cat", "height": 72, "width": None}
    assert SERVING_CONFIG.apply(given_inputs, TAKES) == {**FILLED, "height": 72}, (
        "strength is nothing that the pipeline takes"
    )
    assert given_inputs == {"prompt": "a cat", "height": 72, "width": None}


def test_every_kind_of_value_is_taken() -> None:
    given_inputs: dict[str, object] = {
        "image": Files(("a", "b")),
        "mask_image": Files(("m",)),
        "video": Files(("f",) * 5),
        "sigmas": Values((1.0, 0.5)),
        "original_size": Values((64, 64)),
        "mu": -3,
        "tiled": True,
    }
    applied = SERVING_CONFIG.apply({"prompt": "a cat", **given_inputs}, TAKES)
    assert applied == {**FILLED, **given_inputs, "num_inference_steps": 2}, "there is a step for each sigma"
    assert type(applied["mu"]) is float


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"colour": "red"}, NOT_TAKEN),
        ({"hieght": 64}, "is not a parameter of shapes. Did you mean height?"),
        ({"num_inference_step": 4}, "is not a parameter of shapes. Did you mean num_inference_steps?"),
        ({"negative_prompt": "x"}, NOT_TAKEN),
        ({"latents": Values((1.0,))}, NOT_TAKEN),
        ({"height": "64"}, "must be a whole number."),
        ({"height": 64.0}, "must be a whole number."),
        ({"height": True}, "must be a whole number."),
        ({"height": Files(("a",))}, "must be a whole number."),
        ({"height": 56}, "must be 64 to 128."),
        ({"height": 136}, "must be 64 to 128."),
        ({"height": 70}, "must be a multiple of 8."),
        ({"num_inference_steps": 0}, "must be 1 to 50."),
        ({"num_inference_steps": 10**400}, "must be 1 to 50."),
        ({"width": 1_000_000}, "must be 8 to 8192."),
        ({"layers": 10**6}, "must be 1 to 64."),
        ({"mu": 10**12}, "must be -1e+09 to 1e+09."),
        ({"fps": 31}, "must be 1 to 30."),
        ({"guidance_scale": float("nan")}, "must be a number."),
        ({"guidance_scale": float("inf")}, "must be a number."),
        ({"guidance_scale": 10**400}, "must be a number."),
        ({"guidance_scale": "high"}, "must be a number."),
        ({"guidance_scale": Values((1.0,))}, "must be a number."),
        ({"true_cfg_scale": -1}, "must be 0 to 100."),
        ({"tiled": 1}, "must be true or false."),
        ({"prompt": ["a", "b"]}, "must be text."),
        ({"prompt": Files(("a",))}, "must be text."),
        ({"prompt": "x" * 32_769}, "must be at most 32768 characters long."),
        ({"prompt": "\ud800"}, "must be valid Unicode."),
        ({"image": "ship.png"}, "must be an image, or several."),
        ({"image": 5}, "must be an image, or several."),
        ({"image": {"files": 1}}, "must be an image, or several."),
        ({"image": Files(())}, "must be an image, or several."),
        ({"image": Files(("f",) * 4097)}, "must be at most 4096 images."),
        ({"mask_image": "ship.png"}, "must be an image."),
        ({"mask_image": Files(("a", "b"))}, "must be one image, not 2."),
        ({"sigmas": 0.5}, "must be a list of numbers."),
        ({"sigmas": Values(())}, "must be a list of numbers."),
        ({"sigmas": ["a"]}, "must be a list of numbers."),
        ({"sigmas": {"values": [1.0]}}, "must be a list of numbers."),
        ({"sigmas": Values((0.5, float("nan")))}, "must be a finite number."),
        ({"sigmas": Values((0.5, 2.0))}, "must be 0 to 1."),
        ({"sigmas": Values((0.5,) * 4097)}, "must be at most 4096 numbers."),
        ({"sigmas": Values((0.5,) * 51)}, "must be 1 to 50 numbers, one for each step, not 51."),
        ({"original_size": Values((64,))}, "must be two whole numbers."),
        ({"original_size": Values((64, 64.5))}, "must be two whole numbers."),
        ({"original_size": Values((64, 10**6))}, "must be -65536 to 65536."),
    ],
    ids=lambda value: "",
)
def test_what_is_not_allowed_is_refused_by_name(inputs: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError) as refusal:
        SERVING_CONFIG.apply({"prompt": "a cat", **inputs}, TAKES)
    assert refusal.value.message == message
    assert [refusal.value.param] == list(inputs)


def test_what_is_required_must_be_there() -> None:
    takes = (*TAKES, Parameter("control_image", ParameterKind.IMAGE, required=True))
    for inputs, param in (({"prompt": "x"}, "control_image"), ({"control_image": Files(("a",))}, "prompt")):
        with pytest.raises(ParameterError, match="is required") as refusal:
            SERVING_CONFIG.apply(inputs, takes)
        assert refusal.value.param == param
    always = replace(SERVING_CONFIG, defaults={"prompt": "a ship"})
    assert always.apply({}, TAKES) == {"prompt": "a ship"}, "or have a default"


def test_two_names_of_one_parameter_must_agree() -> None:
    with pytest.raises(ParameterError, match="another name of guidance_scale") as refusal:
        SERVING_CONFIG.apply({"prompt": "x", "guidance_scale": 3, "true_cfg_scale": 4}, TAKES)
    assert refusal.value.param == "true_cfg_scale"
    both = SERVING_CONFIG.apply({"prompt": "x", "guidance_scale": 3, "true_cfg_scale": 3.0}, TAKES)
    assert (both["guidance_scale"], both["true_cfg_scale"]) == (3.0, 3.0)
    # The default is of the parameter, not of one of its names.
    assert "guidance_scale" not in SERVING_CONFIG.apply({"prompt": "x", "true_cfg_scale": 3}, TAKES)
    assert (
        replace(SERVING_CONFIG, defaults={"fps": 8}).apply({"prompt": "x", "frame_rate": 9}, TAKES)["frame_rate"] == 9
    )


def test_a_list_of_steps_says_how_many_there_are() -> None:
    for name in ("sigmas", "timesteps"):
        takes = (*TAKES, Parameter("timesteps", ParameterKind.NUMBERS))
        three = {"prompt": "x", name: Values((0.5,) * 3)}
        assert SERVING_CONFIG.apply(three, takes)["num_inference_steps"] == 3, "and not the default"
        assert SERVING_CONFIG.apply({**three, "num_inference_steps": 3}, takes)["num_inference_steps"] == 3
        with pytest.raises(ParameterError, match=f"{name} must be 4 numbers, as many as num_inference_steps, not 3"):
            SERVING_CONFIG.apply({**three, "num_inference_steps": 4}, takes)
    assert "num_inference_steps" not in ServingConfig().apply(
        three, [p for p in takes if p.name != "num_inference_steps"]
    )
    assert SERVING_CONFIG.apply(three)["num_inference_steps"] == 3, "also before the pipeline is known"


def test_all_images_of_a_request_share_a_bound_of_steps() -> None:
    SERVING_CONFIG.check_total({"num_inference_steps": 50}, 10)
    SERVING_CONFIG.check_total({}, 10)
    with pytest.raises(ParameterError, match="n times num_inference_steps must be at most 1000, not 1001"):
        SERVING_CONFIG.check_total({"num_inference_steps": 143}, 7)
    replace(SERVING_CONFIG, ranges={"num_inference_steps": (1, 2000)}).check_total({"num_inference_steps": 2000}, 1)


@pytest.mark.parametrize(
    ("steps", "strength", "fix"),
    [(1, 0.3, "at least 4 steps"), (4, 0.2, "at least 5 steps"), (None, 0.0, "more strength"), (3, None, "at least 4")],
)
def test_a_strength_that_leaves_no_step_is_said_in_words(steps: int | None, strength: float | None, fix: str) -> None:
    takes = (*TAKES, Parameter("strength", ParameterKind.NUMBER, 0.3))
    serving_config = replace(SERVING_CONFIG, defaults={"num_inference_steps": 4})
    sent = {"prompt": "x", "image": Files(("a",)), "num_inference_steps": steps, "strength": strength}
    with pytest.raises(ParameterError, match=f"num_inference_steps times strength must be at least 1.*{fix}"):
        serving_config.apply(sent, takes)
    serving_config.apply({**sent, "image": None}, takes)  # there is nothing that it could be the strength of
    serving_config.apply({**sent, "num_inference_steps": 5, "strength": 0.2}, takes)


def test_the_bound_of_a_prompt_is_that_of_the_tokenizers(tmp_path: Path) -> None:
    model = write(tmp_path, None, {"_class_name": "FluxPipeline"})
    length = Parameter("max_sequence_length", ParameterKind.INTEGER, 256)
    assert load_serving_config(model).limits(length) == (1, 8192)
    for folder, config in (("tokenizer", '{"model_max_length": 77}'), ("tokenizer_2", '{"model_max_length": 512}'),
                           ("tokenizer_3", '{"model_max_length": 1000000000000000019884624838656}'),
                           ("tokenizer_4", "{}")):  # fmt: skip
        (model / folder).mkdir()
        (model / folder / "tokenizer_config.json").write_text(config)
    assert load_serving_config(model).limits(length) == (1, 512)
    assert load_serving_config(model).limits(Parameter("max_sequence_length", ParameterKind.INTEGER, 600)) == (
        1,
        600,
    ), "its own default"
    assert replace(load_serving_config(model), ranges={"max_sequence_length": (1, 1024)}).limits(length) == (1, 1024)
    (model / "tokenizer" / "tokenizer_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read"):
        load_serving_config(model)


def test_what_costs_time_has_a_bound_by_its_name() -> None:
    for name, most in (
        ("ar_step", 1000), ("num_temporal_reasoning_steps", 1000), ("base_num_frames", 4096), ("gen_length", 8192),
        ("prompt_max_new_tokens", 8192), ("max_area", 8192**2), ("duration", 3600), ("audio_end_in_s", 3600),
        ("jump_n_sample", 1000),
    ):  # fmt: skip
        assert default_limits(name, ParameterKind.INTEGER)[1] == most, name
    assert default_limits("original_size", ParameterKind.PAIR) == (-65_536, 65_536)


def test_limits_and_defaults_of_a_parameter() -> None:
    named = {parameter.name: parameter for parameter in TAKES}
    limits = {name: SERVING_CONFIG.limits(parameter) for name, parameter in named.items()}
    assert limits["height"] == (64, 128, 8), "that of the serving config"
    assert limits["width"] == (8, 8192), "what no model goes beyond"
    assert limits["fps"] == (1, 30), "those of what it is another name of"
    assert limits["mu"] == (-1e9, 1e9)
    assert limits["prompt"] == limits["image"] == limits["tiled"] == ()
    assert [SERVING_CONFIG.default(named[name]) for name in ("height", "frame_rate", "width")] == [64, 25, None]


def test_before_the_pipeline_is_known_what_is_known_by_name_is_checked() -> None:
    applied = SERVING_CONFIG.apply({"colour": "red", "sigmas": Values((1.0,)), "image": Files(("a",)), "rank": 0.5})
    assert applied.keys() == SERVING_CONFIG.defaults.keys() | {"colour", "sigmas", "image", "rank"}
    for inputs, message in (
        ({"height": 56}, "64 to 128"),
        ({"image": "ship.png"}, "an image"),
        ({"strength": 2}, "0 to 1"),
        ({"colour": {}}, "a list of them, or an image"),
        ({"colour": float("nan")}, "a number"),
        ({"colour": 10**400}, r"to 1e\+09"),
    ):
        with pytest.raises(ParameterError, match=message) as refusal:
            SERVING_CONFIG.apply(inputs)
        assert [refusal.value.param] == list(inputs)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.sampled_from(["values", "files"]), inner, max_size=3)
        | st.builds(Files, st.lists(st.text(), max_size=3).map(tuple))
        | st.builds(Values, st.lists(inner, max_size=3).map(tuple))
    ),
)
known_names = st.sampled_from([parameter.name for parameter in TAKES])


@settings(deadline=None)
@given(st.dictionaries(known_names | st.text(), json_values), st.booleans())
def test_whatever_a_request_says_it_is_applied_or_refused(inputs: dict[str, object], known: bool) -> None:
    try:
        applied = SERVING_CONFIG.apply(inputs, TAKES if known else None)
    except ParameterError:
        return
    assert applied["height"] in range(64, 129, 8)
    assert "true_cfg_scale" in applied or type(applied["guidance_scale"]) is float
    assert not known or applied.keys() <= {parameter.name for parameter in TAKES}


def write(folder: Path, serving_config: object | None, index: object = None) -> Path:
    (folder / "model_index.json").write_text(json.dumps(index or {"_class_name": "FluxPipeline"}))
    if serving_config is not None:
        (folder / "triptych.json").write_text(
            serving_config if isinstance(serving_config, str) else json.dumps(serving_config)
        )
    return folder


def test_a_serving_config_is_read(tmp_path: Path) -> None:
    serving_config = load_serving_config(
        write(tmp_path, {"name": "shapes", "defaults": {"height": 64}, "ranges": {"height": [64, 64, 8]}})
    )
    assert serving_config == ServingConfig("shapes", "flux", "", {"height": 64}, {"height": (64, 64, 8)})


def test_a_folder_without_a_serving_config_gets_one_from_its_index(tmp_path: Path) -> None:
    serving_config = load_serving_config(write(tmp_path, None))
    assert serving_config == ServingConfig(name=tmp_path.name, family="flux")
    assert serving_config.apply({"prompt": "x", "height": 1024}) == {"prompt": "x", "height": 1024}


@pytest.mark.parametrize(
    ("serving_config", "sentence"),
    [
        ("{", "cannot be read"),
        ({"default": {}}, "unknown field `default`"),
        ({"defaults": {"height": [1]}}, "cannot be read"),
        ({"ranges": {"height": [64]}}, r"a range is \[lowest, highest\]"),
        ({"ranges": {"height": [64, 32]}}, r"a range is \[lowest, highest\]"),
        ({"ranges": {"height": [0, 64, 0]}}, r"a range is \[lowest, highest\]"),
        (
            {"defaults": {"height": 64}, "ranges": {"height": [128, 256]}},
            "forbids its own default: height must be 128 to 256",
        ),
    ],
)
def test_a_contradictory_serving_config_is_a_model_error(tmp_path: Path, serving_config: object, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        load_serving_config(write(tmp_path, serving_config))


def test_what_is_not_a_model_folder_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"There is no model folder .*nowhere"):
        load_serving_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"is not a diffusers model: it has no model_index\.json"):
        load_serving_config(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_serving_config(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ModelError, match="does not say which pipeline"):
        load_serving_config(tmp_path)


def test_serving_configs_need_no_torch() -> None:
    modules = "parameters.serving_config", "parameters.declarations", "codec.manifest"
    imports = "".join(f"import triptych.engines.{module};" for module in modules)
    program = f"{imports} import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


TAKEN = (
    Parameter("phrases", ParameterKind.TEXTS),
    Parameter("boxes", ParameterKind.JSON),
    Parameter("scale", ParameterKind.NUMBER, many=True),
    Parameter("steps", ParameterKind.INTEGER),
)


@pytest.mark.parametrize(
    "inputs",
    [
        {"phrases": "a cat"},
        {"phrases": Json('["a cat", "a dog"]'), "boxes": Json("[[0, 0.5, 1, 1]]")},
        {"boxes": Json('{"a": null}'), "scale": 1.5},
        {"scale": Values((0.5, 1.5))},
    ],
)
def test_texts_json_and_several_numbers_are_taken_where_the_pipeline_takes_them(inputs: dict[str, object]) -> None:
    assert ServingConfig().apply(inputs, TAKEN) == inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"phrases": Json('["a cat", 3]')}, "phrases must be a text, or a list of texts."),
        ({"phrases": Json("[]")}, "phrases must be a text, or a list of texts."),
        ({"boxes": 4}, "boxes must be a list or an object."),
        ({"scale": Json('["a"]')}, "scale must be a number."),
        ({"steps": Values((1, 2))}, "steps must be a whole number."),
    ],
)
def test_what_is_none_of_them_is_refused(inputs: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError) as raised:
        ServingConfig().apply(inputs, TAKEN)
    assert str(raised.value) == message


def test_null_is_left_out_but_for_what_can_be_none() -> None:
    serving_config = ServingConfig(name="x", defaults={"rules": "old"})
    parameters = (
        Parameter("prompt", ParameterKind.TEXT, required=True),
        Parameter("rules", ParameterKind.TEXTS, ("be", "good"), nullable=True),
        Parameter("strength", ParameterKind.NUMBER, 0.5),
    )
    given = {"prompt": "x", "rules": None, "strength": None}
    assert serving_config.apply(given, parameters) == {"prompt": "x", "rules": None}
    assert serving_config.apply({"prompt": "x"}, parameters) == {"prompt": "x", "rules": "old"}
    # Before the pipeline is known it is not known either which of them can be.
    assert serving_config.apply(given) == {"prompt": "x", "rules": "old", "strength": None}


def test_a_name_that_is_nearly_a_known_one_is_taken_for_misspelt() -> None:
    config = ServingConfig(defaults={"hieght": 64, "width": 64, "num_steps": 4, "colour": "red"}, ranges={"mv": (0, 1)})
    assert config.misspellings([parameter.name for parameter in TAKES], Path("m/triptych.json")) == [
        'The defaults in m/triptych.json have "hieght": did you mean "height"?'
    ]
