"""Images by OpenAI's own client."""

from __future__ import annotations

import base64
import io

import msgspec
import openai
import pytest

from tests.api.image_inputs import PARAMETERS, PNG, encoded, submitted, text
from triptych.engines.parameters.schema import Parameter, ParameterKind

# OpenAI has deprecated variations in its client.
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")]


@pytest.fixture(autouse=True)
def model_with_images(fake_head):
    takes(fake_head, *PARAMETERS)


def takes(fake_head, *parameters: Parameter) -> None:
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=parameters)


@pytest.fixture
async def images(client):
    api = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=client, max_retries=0)
    return api.images


async def test_every_field_that_openai_has(images, fake_head):
    made = await images.generate(
        prompt="x", n=2, size="64x48", model="tiny/shapes", user="u", response_format="b64_json", stream=False,
        background="auto", moderation="low", quality="standard", style="vivid", partial_images=0,
        output_format="jpeg", output_compression=40, extra_body={"seed": 7, "metadata": False},
    )  # fmt: skip
    assert (made.output_format, made.size, made.usage, len(made.data)) == ("jpeg", "64x48", None, 2)
    assert base64.b64decode(made.data[0].b64_json).startswith(b"\xff\xd8")
    output = (await submitted(fake_head)).output
    assert (output.format, output.quality, output.metadata) == ("jpeg", 40, False)


@pytest.mark.parametrize(
    ("field", "value"),
    [("background", "transparent"), ("quality", "high"), ("style", "baroque"), ("moderation", "strict")],
)
async def test_what_has_no_effect_here_is_refused_by_name(images, field, value):
    with pytest.raises(openai.UnprocessableEntityError, match=f"{field} must be .* or left out: .+") as refused:
        await images.generate(prompt="x", extra_body={field: value})
    assert refused.value.param == field


async def test_sixteen_images_and_no_more(images, fake_head):
    files = [(f"{k}.png", encoded(colour=(k, 0, 0))) for k in range(17)]
    await images.edit(prompt="x", image=files[:16], input_fidelity="low", background="opaque", quality="auto")
    assert len((await submitted(fake_head)).inputs["image"].files) == 16
    with pytest.raises(openai.UnprocessableEntityError, match="image must be at most 16 images, and 17 were given"):
        await images.edit(prompt="x", image=files)


async def test_a_model_of_one_image_says_so(images, fake_head):
    takes(fake_head, Parameter("image", ParameterKind.IMAGE), Parameter("prompt", ParameterKind.TEXT))
    with pytest.raises(openai.UnprocessableEntityError, match="image must be one image, and 2 were given"):
        await images.edit(prompt="x", image=[PNG, PNG])
    both = [{"image_url": text(PNG)}, {"image_url": text(PNG)}]
    with pytest.raises(openai.UnprocessableEntityError, match="images must be one image, and 2 were given"):
        await images.generate(prompt="x", extra_body={"images": both})
    with pytest.raises(openai.UnprocessableEntityError, match="images has a file_id, and no files are kept here"):
        await images.generate(prompt="x", extra_body={"images": [{"file_id": "file-1"}]})


async def test_a_variation_is_an_edit_without_a_prompt(images, fake_head, uploads):
    made = await images.create_variation(image=io.BytesIO(PNG), n=2, size="64x48", response_format="url")
    assert [image.url is not None for image in made.data] == [True, True]
    submit = await submitted(fake_head)
    assert (submit.n, submit.inputs["prompt"], submit.inputs["width"]) == (2, "", 64)
    assert [uploads.read(file) for file in submit.inputs["image"].files] == [PNG]


async def test_a_variation_by_a_model_without_a_prompt_has_none(images, fake_head):
    takes(fake_head, Parameter("image", ParameterKind.IMAGE))
    await images.create_variation(image=PNG)
    assert (await submitted(fake_head)).inputs.keys() == {"image"}


async def test_a_model_that_starts_from_no_image_makes_no_variations(images, fake_head):
    takes(fake_head, Parameter("prompt", ParameterKind.TEXT))
    with pytest.raises(openai.UnprocessableEntityError, match="image takes no image: this model takes no images"):
        await images.create_variation(image=PNG)
    assert not fake_head.journal
