from __future__ import annotations

import pytest

from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.engines.parameters.serving_config import ParameterError
from triptych.roles.head.output import resolve_output
from triptych.roles.media.formats import FORMATS, formats_for
from triptych.roles.messages.common import Output

PROMPT = (Parameter("prompt", ParameterKind.TEXT),)
IMAGES = Signature(PROMPT, medium="image")
VIDEOS = Signature(PROMPT, medium="video", fps=24.0)
MUSIC = Signature(PROMPT, medium="audio")


@pytest.mark.parametrize("signature", [IMAGES, VIDEOS, MUSIC], ids=lambda signature: signature.medium)
@pytest.mark.parametrize("output_format", [*FORMATS, "?"])
def test_a_format_is_taken_just_where_it_can_hold_what_is_made(signature: Signature, output_format: str) -> None:
    if output_format in formats_for(signature.medium):
        assert resolve_output(Output(output_format), signature, {}, {}).format == output_format
        return
    with pytest.raises(ParameterError) as refused:
        resolve_output(Output(output_format), signature, {}, {})
    assert refused.value.param == "output_format"
    assert output_format in refused.value.message
    assert formats_for(signature.medium)[0] in refused.value.message


def test_before_an_instance_has_come_only_unknown_formats_are_refused() -> None:
    for output_format in ("", *FORMATS):
        assert resolve_output(Output(output_format), Signature(), {}, {}).format == output_format
    with pytest.raises(ParameterError, match=r"must be png, jpeg, .* or ") as refused:
        resolve_output(Output("?"), Signature(), {}, {})
    assert all(name in refused.value.message for name in FORMATS)


@pytest.mark.parametrize(
    ("asked", "given", "inputs", "fps"),
    [
        (0.0, {}, {}, 24.0),
        (0.0, {}, {"frame_rate": 25}, 25.0),
        (0.0, {"frame_rate": 29.97}, {"frame_rate": 25}, 29.97),
        (0.0, {"fps": 8, "frame_rate": None}, {"fps": 25}, 8.0),
        (12.0, {"fps": 8}, {"fps": 25}, 12.0),
    ],
)
def test_the_frame_rate_is_that_of_the_request_the_serving_config_or_the_pipeline_in_turn(
    asked: float, given: dict[str, object], inputs: dict[str, object], fps: float
) -> None:
    assert resolve_output(Output("mp4", asked), VIDEOS, given, inputs) == Output("mp4", fps)
    unknown = 0.0 if fps == VIDEOS.fps else fps
    assert resolve_output(Output("mp4", asked), Signature(), given, inputs) == Output("mp4", unknown)
    assert resolve_output(Output("png", asked), IMAGES, given, inputs) == Output("png", 0.0)


@pytest.mark.parametrize("value", [0.5, 241, -1, float("nan"), float("inf"), "fast", True])
@pytest.mark.parametrize("name", ["fps", "frame_rate"])
def test_a_rate_that_is_none_is_named(name: str, value: object) -> None:
    with pytest.raises(ParameterError) as refused:
        resolve_output(Output(), VIDEOS, {name: value}, {})
    assert refused.value.param == name
