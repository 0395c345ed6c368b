"""Modules are tried once: whether rows are computed independently of each other, and which arguments may differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engines.steps.runs import Models, payload, pipeline_of
from triptych.engines.steps.batching import Arguments, Leaf, arguments_of_call
from triptych.engines.steps.denoiser_calls import DenoiserCall
from triptych.engines.steps.denoising import Denoising
from triptych.engines.steps.probing import Prober, alterations
from triptych.tools.make_model.ltx_hunyuan import hunyuan_video

X = torch.linspace(-1, 1, 6).reshape(1, 3, 2)


class Plain(torch.nn.Module):
    """Uses each argument row by row."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * t.reshape(-1, 1, 1) + y * scale


class FirstRowOfY(torch.nn.Module):
    """Uses the first row of an argument for all, as Flux 2 does with position ids."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * t.reshape(-1, 1, 1) + y[:1]


class DecidesForAll(torch.nn.Module):
    """Asks once for all rows whether an argument is missing, as HunyuanVideo 1.5 does with image embeddings."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * (2 if bool((y == 0).all()) else 3) + y


class Mean(torch.nn.Module):
    """Mixes rows."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=0, keepdim=True) + y


class OneY(torch.nn.Module):
    """Takes one argument with a dimension of 1 that is no batch."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * y.reshape(3, 2)


class OfAnotherShape(torch.nn.Module):
    """Returns something without rows."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x.sum() + y.sum()


class Emptying(torch.nn.Module):
    """Takes items out of a list, as HunyuanDiT does with those of its ControlNet, and writes into a tensor."""

    def forward(self, x: torch.Tensor, samples: list[torch.Tensor]) -> torch.Tensor:
        return x.mul_(2) + samples.pop()


def call_of(module: torch.nn.Module, y: torch.Tensor = X + 3) -> tuple[DenoiserCall, Arguments]:
    values = {"x": X, "y": y, "t": torch.tensor([0.5])}
    call = DenoiserCall(module, (), values, None, Denoising(dict), 0)
    return call, arguments_of_call(call)


def may_differ(module: torch.nn.Module, y: torch.Tensor = X + 3) -> dict[str, bool]:
    prober = Prober()
    call, arguments = call_of(module, y)
    for leaf in arguments.leaves:
        prober.try_leaf(call, arguments, leaf)
    return {str(path[0]): may for path, may in prober.rules(call, arguments).per_row.items()}


def test_arguments_that_are_used_row_by_row_may_differ() -> None:
    assert may_differ(Plain()) == {"x": True, "y": True, "t": True}


def test_an_argument_whose_first_row_is_used_for_all_must_be_equal() -> None:
    assert may_differ(FirstRowOfY()) == {"x": True, "y": False, "t": True}


@pytest.mark.parametrize("y", [X + 3, torch.zeros_like(X)])
def test_an_argument_that_decides_for_all_rows_must_be_equal_whatever_it_is(y: torch.Tensor) -> None:
    assert may_differ(DecidesForAll(), y)["y"] is False


def test_an_argument_that_mixes_rows_must_be_equal() -> None:
    assert may_differ(Mean())["x"] is False


def test_an_argument_that_cannot_be_concatenated_is_passed_once() -> None:
    call, arguments = call_of(OneY())
    rules = Prober().rules(call, arguments)
    assert (rules.shared, rules.alone) == (frozenset({("y",)}), "")
    assert may_differ(OneY())["y"] is False


def test_a_module_that_changes_its_arguments_gets_copies() -> None:
    values = {"x": X.clone(), "samples": [X.clone()]}
    call = DenoiserCall(Emptying(), (), values, None, Denoising(dict), 0)
    prober, arguments = Prober(), arguments_of_call(call)
    for leaf in arguments.leaves:
        if isinstance(leaf.value, torch.Tensor):
            prober.try_leaf(call, arguments, leaf)
    assert set(prober.rules(call, arguments).per_row.values()) == {True}
    assert torch.equal(values["x"], X)
    assert torch.equal(values["samples"][0], X)


def test_a_module_whose_output_has_no_rows_is_called_alone() -> None:
    call, arguments = call_of(OfAnotherShape())
    assert "shape" in Prober().rules(call, arguments).alone


def test_a_class_and_set_of_arguments_is_tried_once() -> None:
    calls = 0

    class Counting(Plain):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return super().forward(*args, **kwargs)

    prober = Prober()
    call, arguments = call_of(Plain())
    call.module = Counting()
    prober.rules(call, arguments)
    assert calls == 2
    prober.rules(call, arguments.replace(("x",), X * 2))
    assert calls == 2


def test_an_error_of_the_call_alone_is_no_rule() -> None:
    class Failing(Plain):
        fails = True

        def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            if self.fails:
                raise ZeroDivisionError
            return super().forward(x, y, t, scale)

    prober = Prober()
    call, arguments = call_of(Failing())
    with pytest.raises(ZeroDivisionError):
        prober.rules(call, arguments)
    Failing.fails = False
    assert prober.rules(call, arguments).alone == ""


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(1, 3, 4),
        torch.zeros(1, 3, 4),
        torch.ones(1, 7, dtype=torch.bool),
        torch.tensor([[1, 1, 1, 0]]),
        torch.ones(1, 5),
        torch.tensor([801]),
        torch.tensor(0.3),
        torch.arange(12).reshape(1, 4, 3),
        [torch.randn(4, 2)],
    ],
)
def test_alterations_have_the_same_kind_and_other_values(value: Any) -> None:
    made = list(alterations(value))
    assert made
    for other in made:
        for one, altered in zip(value, other, strict=True) if isinstance(value, list) else [(value, other)]:
            assert (one.shape, one.dtype) == (altered.shape, altered.dtype)
            assert not torch.equal(one, altered)
            if one.dtype is not torch.bool and not one.is_floating_point() and one.ndim > 1:
                assert set(altered.flatten().tolist()) <= {*one.flatten().tolist(), 0}


def tried(models: Models, family: str, **inputs: Any) -> tuple[dict[str, bool], dict[str, Leaf]]:
    """What is found about each argument of the first call of a family."""
    model = models(family)
    run = pipeline_of(model).denoise(payload(model, 0, **inputs), bucket=2)
    call = run.proceed()
    assert call is not None
    prober, arguments = Prober(), arguments_of_call(call)
    torch.set_grad_enabled(False)
    for leaf in arguments.leaves:
        if isinstance(leaf.value, torch.Tensor):
            prober.try_leaf(call, arguments, leaf)
    run.cancel()
    return {str(path[0]): may for path, may in prober.rules(call, arguments).per_row.items()}, {
        str(leaf.path[0]): leaf for leaf in arguments.leaves
    }


def test_position_ids_of_flux_2_have_rows_and_must_be_equal(models: Models) -> None:
    found, leaves = tried(models, "flux2", height=64, width=48, num_inference_steps=2)
    assert leaves["img_ids"].value.shape[0] == 1
    assert found["img_ids"] is False
    assert found["hidden_states"] is found["encoder_hidden_states"] is found["timestep"] is True


@pytest.mark.parametrize("is_video_of_text", [True, False])
def test_image_embeddings_of_hunyuan_video_1_5_decide_for_the_batch_and_must_be_equal(is_video_of_text: bool) -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    make: Any = hunyuan_video().components["transformer"]
    module = make().eval()
    text = {"encoder_hidden_states": torch.randn(1, 4, 32), "encoder_attention_mask": torch.ones(1, 4)}
    values = {
        "hidden_states": torch.randn(1, 9, 1, 4, 4),
        "timestep": torch.tensor([500.0]),
        **text,
        **{f"{name}_2": value for name, value in text.items()},
        "image_embeds": torch.zeros(1, 3, 32) if is_video_of_text else torch.randn(1, 3, 32),
        "return_dict": False,
    }
    call = DenoiserCall(module, (), values, None, Denoising(dict), 0)
    prober, arguments = Prober(), arguments_of_call(call)
    for leaf in arguments.leaves:
        if leaf.path[0] in ("hidden_states", "encoder_hidden_states", "image_embeds"):
            prober.try_leaf(call, arguments, leaf)
    found = {str(path[0]): may for path, may in prober.rules(call, arguments).per_row.items()}
    assert found == {"hidden_states": True, "encoder_hidden_states": True, "image_embeds": False}
