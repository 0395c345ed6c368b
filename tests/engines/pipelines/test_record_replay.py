"""Recordings are played back as they were made, and latents take the place of others once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from triptych.engines.pipelines.classic import ArgumentInjector, BoundaryStub, CallRecorder, StageBoundary
from triptych.engines.weights.stubs import Stub, make_stub


def test_a_recording_has_the_outermost_calls_and_the_generator_as_they_left_it() -> None:
    generator = torch.Generator().manual_seed(1)
    recorder = CallRecorder(generator)
    inner = recorder.record("inner", lambda: torch.rand(2, generator=generator))
    outer = recorder.record("outer", lambda: [inner()])
    quiet = recorder.record("quiet", lambda: None)
    assert quiet() is None
    (drawn,) = outer()
    assert quiet() is None
    assert [(call["method"], call["generator"] is None) for call in recorder.calls] == [
        ("quiet", True),
        ("outer", False),
        ("quiet", False),
    ], "what a call is given may be made of what was drawn before it"
    after = torch.rand(1, generator=generator)

    replayed = torch.Generator().manual_seed(1)
    playback = CallRecorder(replayed, recorder.calls)
    assert playback.replay("quiet", lambda: "run again")() is None
    played = playback.replay("outer", lambda: "run again")
    (again,) = played()
    assert torch.equal(again, drawn)
    assert torch.equal(torch.rand(1, generator=replayed), after)
    assert played() == "run again"
    # A state can be run again, whatever a pipeline does to what it is given.
    again.zero_()
    assert drawn.any()


def test_a_method_that_was_not_next_is_run() -> None:
    recorder = CallRecorder(torch.Generator(), [{"method": "first", "result": 1, "generator": None}])
    second = recorder.replay("second", lambda: "run")
    assert second() == "run"
    assert recorder.replay("first", lambda: "run")() == 1


def test_decoding_in_more_than_one_call_is_an_error_and_not_a_wrong_image() -> None:
    begun: list[bool] = []
    injector = ArgumentInjector("theirs", lambda: begun.append(True))
    inner = injector.inject(lambda z: f"decoded {z}")
    decode = injector.inject(lambda z, scale=1: (z, scale, inner("a part")))
    assert not injector.used
    assert decode("mine", scale=2) == ("theirs", 2, "decoded a part")
    assert (injector.used, begun) == (True, [True])
    with pytest.raises(RuntimeError, match="decodes in more than one call"):
        decode("mine")
    assert ArgumentInjector("theirs", lambda: None).inject(lambda z: z)(z="mine") == "theirs"


def test_what_is_elsewhere_is_read_and_cast_but_ends_a_run_that_computes_with_it(tmp_path: Path) -> None:
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)  # fmt: skip
    stub = make_stub("vae", AutoencoderTiny, tmp_path, torch.bfloat16, torch.device("cpu"))
    assert isinstance(stub, Stub)
    vae = BoundaryStub(stub)
    assert vae.latent_magnitude == 3
    assert {parameter.dtype for parameter in vae.parameters()} == {vae.dtype} == {torch.bfloat16}
    for name in ("encode", "decode"):
        with pytest.raises(StageBoundary, match=rf"vae\.{name}") as raised:
            getattr(vae, name)("latents", return_dict=False)
        assert (raised.value.name, raised.value.method, raised.value.value) == ("vae", name, "latents")
    with pytest.raises(StageBoundary, match=r"vae\.forward"):
        vae(sample="latents")
    assert vae.to(device="cpu").dtype is torch.bfloat16
    assert vae.to(dtype=torch.float32).dtype is torch.float32
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in stub.parameters()} == {torch.bfloat16}
