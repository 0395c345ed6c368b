from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.card import CardError, ModelCard, load_card
from engines.panels import ModelError

CARD = ModelCard(
    name="shapes",
    defaults={"height": 64, "num_inference_steps": 4, "guidance_scale": 5, "tiled": False},
    ranges={"height": (64, 128, 8), "num_inference_steps": (1, 50)},
)


def test_defaults_fill_what_is_left_out_and_nothing_else() -> None:
    given_inputs = {"prompt": "a cat", "height": 72, "width": None}
    assert CARD.apply(given_inputs) == {
        "prompt": "a cat",
        "height": 72,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "tiled": False,
    }
    assert given_inputs == {"prompt": "a cat", "height": 72, "width": None}


def test_only_what_the_pipeline_accepts_is_filled_in_or_allowed() -> None:
    assert CARD.apply({"prompt": "x"}, accepted={"prompt", "height"}) == {"prompt": "x", "height": 64}
    with pytest.raises(CardError, match="no such parameter") as refusal:
        CARD.apply({"num_frames": 5}, accepted={"prompt", "height"})
    assert refusal.value.param == "num_frames"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"colour": "red"}, "shapes has no such parameter."),
        ({"generator": 5}, "shapes has no such parameter."),
        ({"latents": [1.0]}, "shapes has no such parameter."),
        ({"height": "64"}, "It must be a whole number."),
        ({"height": 64.0}, "It must be a whole number."),
        ({"height": True}, "It must be a whole number."),
        ({"height": 56}, "It must be 64 to 128."),
        ({"height": 136}, "It must be 64 to 128."),
        ({"height": 70}, "It must be a multiple of 8."),
        ({"num_inference_steps": 0}, "It must be 1 to 50."),
        ({"num_inference_steps": 10**400}, "It must be 1 to 50."),
        ({"width": 1_000_000}, "It must be 8 to 8192."),
        ({"guidance_scale": float("nan")}, "It must be a number."),
        ({"guidance_scale": float("inf")}, "It must be a number."),
        ({"guidance_scale": 10**400}, "It must be a number."),
        ({"guidance_scale": "high"}, "It must be a number."),
        ({"tiled": 1}, "It must be true or false."),
        ({"prompt": ["a", "b"]}, "It must be text."),
        ({"prompt": "x" * 32_769}, "It must be at most 32768 characters long."),
        ({"prompt": "\ud800"}, "It must be valid Unicode."),
    ],
    ids=lambda value: "",
)
def test_what_is_not_allowed_is_refused_by_name(inputs: dict[str, object], message: str) -> None:
    with pytest.raises(CardError) as refusal:
        CARD.apply({"prompt": "a cat", **inputs})
    assert refusal.value.message == message
    assert [refusal.value.param] == list(inputs)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "height", "guidance_scale", "tiled", "strength", "x"]), json_values))
def test_whatever_a_request_says_it_is_applied_or_refused(inputs: dict[str, object]) -> None:
    try:
        applied = CARD.apply(inputs)
    except CardError:
        return
    assert applied["height"] in range(64, 129, 8)
    assert type(applied["guidance_scale"]) is float


def write(folder: Path, card: object | None, index: object = None) -> Path:
    (folder / "model_index.json").write_text(json.dumps(index or {"_class_name": "FluxPipeline"}))
    if card is not None:
        (folder / "triptych.json").write_text(card if isinstance(card, str) else json.dumps(card))
    return folder


def test_a_card_is_read(tmp_path: Path) -> None:
    card = load_card(write(tmp_path, {"name": "shapes", "defaults": {"height": 64}, "ranges": {"height": [64, 64, 8]}}))
    assert card == ModelCard("shapes", "flux", "", {"height": 64}, {"height": (64, 64, 8)})


def test_a_folder_without_a_card_gets_one_from_its_index(tmp_path: Path) -> None:
    card = load_card(write(tmp_path, None))
    assert card == ModelCard(name=tmp_path.name, family="flux")
    assert card.apply({"prompt": "x", "height": 1024}) == {"prompt": "x", "height": 1024}


@pytest.mark.parametrize(
    ("card", "sentence"),
    [
        ("{", "cannot be read"),
        ({"default": {}}, "unknown field `default`"),
        ({"defaults": {"height": [1]}}, "cannot be read"),
        ({"ranges": {"height": [64]}}, r"a range is \[lowest, highest\]"),
        ({"ranges": {"height": [64, 32]}}, r"a range is \[lowest, highest\]"),
        ({"ranges": {"height": [0, 64, 0]}}, r"a range is \[lowest, highest\]"),
        ({"defaults": {"height": 64}, "ranges": {"height": [128, 256]}}, "forbids its own default of height"),
    ],
)
def test_a_card_that_makes_no_sense_is_a_model_error(tmp_path: Path, card: object, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        load_card(write(tmp_path, card))


def test_what_is_not_a_model_folder_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"There is no model folder .*nowhere"):
        load_card(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"is not a diffusers model: it has no model_index\.json"):
        load_card(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_card(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ModelError, match="does not say which pipeline"):
        load_card(tmp_path)


def test_cards_and_manifests_need_no_torch() -> None:
    program = "import sys, engines.card, engines.panels, engines.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
