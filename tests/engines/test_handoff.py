"""Recordings are played back as they were made, and latents take the place of others once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from triptych.engines.handoff import Elsewhere, Handoff, Recording, Resumption
from triptych.engines.shadows import Shadow, shadow


def test_a_recording_has_the_outermost_calls_and_the_generator_as_they_left_it() -> None:
    generator = torch.Generator().manual_seed(1)
    recording = Recording(generator)
    inner = recording.record("inner", lambda: torch.rand(2, generator=generator))
    outer = recording.record("outer", lambda: [inner()])
    quiet = recording.record("quiet", lambda: None)
    assert quiet() is None
    (drawn,) = outer()
    assert quiet() is None
    assert [(call["method"], call["generator"] is None) for call in recording.calls] == [
        ("quiet", True),
        ("outer", False),
        ("quiet", False),
    ], "what a call is given may be made of what was drawn before it"
    after = torch.rand(1, generator=generator)

    replayed = torch.Generator().manual_seed(1)
    playback = Recording(replayed, recording.calls)
    assert playback.play("quiet", lambda: "run again")() is None
    played = playback.play("outer", lambda: "run again")
    (again,) = played()
    assert torch.equal(again, drawn)
    assert torch.equal(torch.rand(1, generator=replayed), after)
    assert played() == "run again"
    # A state can be run again, whatever a pipeline does to what it is given.
    again.zero_()
    assert drawn.any()


def test_a_method_that_was_not_next_is_run() -> None:
    recording = Recording(torch.Generator(), [{"method": "first", "result": 1, "generator": None}])
    second = recording.play("second", lambda: "run")
    assert second() == "run"
    assert recording.play("first", lambda: "run")() == 1


def test_decoding_in_more_than_one_call_is_an_error_and_not_a_wrong_picture() -> None:
    begun: list[bool] = []
    resumption = Resumption("theirs", lambda: begun.append(True))
    inner = resumption.resume(lambda z: f"decoded {z}")
    decode = resumption.resume(lambda z, scale=1: (z, scale, inner("a part")))
    assert not resumption.used
    assert decode("mine", scale=2) == ("theirs", 2, "decoded a part")
    assert (resumption.used, begun) == (True, [True])
    with pytest.raises(RuntimeError, match="decodes in more than one call"):
        decode("mine")
    assert Resumption("theirs", lambda: None).resume(lambda z: z)(z="mine") == "theirs"


def test_what_is_elsewhere_is_read_and_cast_but_ends_a_run_that_computes_with_it(tmp_path: Path) -> None:
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)  # fmt: skip
    stand_in = shadow("vae", AutoencoderTiny, tmp_path, torch.bfloat16, torch.device("cpu"))
    assert isinstance(stand_in, Shadow)
    vae = Elsewhere(stand_in)
    assert vae.latent_magnitude == 3
    assert {parameter.dtype for parameter in vae.parameters()} == {vae.dtype} == {torch.bfloat16}
    for name in ("encode", "decode"):
        with pytest.raises(Handoff, match=rf"vae\.{name}") as raised:
            getattr(vae, name)("latents", return_dict=False)
        assert (raised.value.name, raised.value.method, raised.value.value) == ("vae", name, "latents")
    with pytest.raises(Handoff, match=r"vae\.forward"):
        vae(sample="latents")
    assert vae.to(device="cpu").dtype is torch.bfloat16
    assert vae.to(dtype=torch.float32).dtype is torch.float32
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in stand_in.parameters()} == {torch.bfloat16}
