"""Which requests the head accepts, and what it says of those that it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ClassVar

import msgspec
import pytest

from tests.roles.factories import make_scheduler, registration, single_model
from tests.roles.head.head_harness import BOUND_S, SIGNATURE, HeadHarness, run_scenario, running_head
from triptych.actors import Actor, AddressBook, Incarnation, Topology
from triptych.actors.runtime.bus_keys import make_bus_keys
from triptych.actors.runtime.runtime import Runtime
from triptych.actors.runtime.system_messages import (
    ChildReport,
    SupervisorQuery,
    SupervisorReport,
)
from triptych.bus import RemoteError
from triptych.engines.parameters.lora import PARAMETERS
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.engines.parameters.validation import ParameterError
from triptych.roles.head.admission import AdmissionLimits, digest, make_request, seeds_of
from triptych.roles.messages import requests
from triptych.roles.messages.common import (
    MAX_SEED,
    Images,
    Numbers,
    Output,
    Upload,
)
from triptych.roles.messages.weights import Reloading, ReloadModel

IMAGE = Upload("a.png", 8)
VIDEO = Signature(
    (Parameter("frame_rate", ParameterKind.NUMBER), Parameter("prompt", ParameterKind.TEXT)), medium="video", fps=24.0
)


def test_what_is_not_accepted_says_why(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology("max_pending = 2")) as harness:
            await harness.register("encoder-0")
            rejected = await harness.submit("a", height=100)
            assert (rejected.code, rejected.param) == ("invalid", "height")
            rejected = await harness.submit("a", hieght=64)
            assert (rejected.code, rejected.param) == ("invalid", "hieght")
            rejected = await harness.submit("../etc/passwd")
            assert (rejected.code, rejected.param) == ("invalid", "request_id")
            assert (await harness.submit("a", key="k")).request_id == "a"
            assert (await harness.submit("b", key="k")).request_id == "a"
            assert (await harness.submit("b", key="k", height=64)).code == "conflict"
            last_seed = requests.SubmitRequest("c", {"prompt": "x"}, MAX_SEED, 2)
            rejected = await harness.head.ask(last_seed, requests.RequestRejected, timeout_s=BOUND_S)
            assert (rejected.code, rejected.param) == ("invalid", "seed")
            rejected = await harness.submit("c", n=2)
            assert rejected.code == "full"
            assert rejected.retry_after_s > 0
            with pytest.raises(RemoteError, match="there is no request c"):
                await harness.view("c")

    run_scenario(scenario())


def test_inputs_are_checked_by_what_the_pipeline_takes(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            # Nobody knows yet whether there is such a parameter: the encoder will.
            assert isinstance(await harness.submit("early", negative_prompt="grey"), requests.RequestAccepted)
            assert (await harness.submit("early2", mask_image="ship.png")).param == "mask_image"
            needs = msgspec.structs.replace(SIGNATURE.parameters[1], name="image", required=True)
            await harness.register("encoder-0", signature=Signature((*SIGNATURE.parameters, needs)))
            for inputs, param in (
                ({"negative_prompt": "grey"}, "negative_prompt"),
                ({"mask_image": "ship.png"}, "mask_image"),
                ({"mask_image": Images((IMAGE, IMAGE))}, "mask_image"),
                ({"sigmas": 0.5}, "sigmas"),
                ({"height": Images((IMAGE,))}, "height"),
                ({}, "image"),
            ):
                rejected = await harness.submit("late", **({"image": Images((IMAGE,))} if inputs else {}), **inputs)
                assert (rejected.code, rejected.param) == ("invalid", param)
            inputs = {"image": Images((IMAGE,)), "sigmas": Numbers((1.0, 0.5))}
            assert isinstance(await harness.submit("late", **inputs), requests.RequestAccepted)
            assert (await harness.view("late")).inputs == {"prompt": "x", "height": 96, **inputs}

    run_scenario(scenario())


def test_images_that_do_not_fit_a_pool_are_refused_where_they_pass_through_the_encoder(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            images = [Parameter(name, ParameterKind.IMAGES) for name in ("control_image", "image", "mask_image")]
            signature = Signature((*SIGNATURE.parameters, *images), passes_through=("image", "mask_image"))
            await harness.register("encoder-0", signature=signature)
            largest = 128 << 20  # of the default of 256 MiB

            def image(*pixels: int) -> Images:
                return Images(tuple(Upload("a.png", 8, count) for count in pixels))

            for name, value, most in (
                ("image", image(largest // 3 + 1), "at most 44739242 pixels: "),
                ("image", image(40_000_000, 5_000_000), "at most 44739242 pixels together: "),
                ("mask_image", image(largest + 1), "at most 134217728 pixels: "),
            ):
                rejected = await harness.submit("large", **{name: value})
                assert (rejected.code, rejected.param) == ("invalid", name)
                assert most in rejected.message
                assert "134217728 bytes of a pool" in rejected.message
            for inputs in ({"control_image": image(64_000_000)}, {"image": image(largest // 3)}):
                assert isinstance(await harness.submit(*inputs, **inputs), requests.RequestAccepted)

    run_scenario(scenario())


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        loras = "".join(f'[[model.lora]]\nname = "{name}"\npath = "x"\n' for name in ("ink", "clay"))
        async with running_head(topology(lora=loras)) as harness:
            for known in (False, True):  # before an instance has said what it takes, and after
                if known:
                    signature = Signature(tuple(sorted((*SIGNATURE.parameters, *PARAMETERS), key=lambda p: p.name)))
                    await harness.register("encoder-0", signature=signature)
                for inputs, param, sentence in (
                    ({"lora": "chalk"}, "lora", "must be one of clay, ink: there is no adapter 'chalk'."),
                    ({"lora": "ink", "lora_scale": 5}, "lora_scale", "must be -4 to 4."),
                    ({"lora": 1}, "lora", "must be a text, or a list of texts."),
                ):
                    rejected = await harness.submit(f"bad{known}", **inputs)
                    assert (rejected.code, rejected.param, rejected.message) == ("invalid", param, sentence)
                accepted = await harness.submit(f"r{known:d}", lora="ink", lora_scale=1)
                assert isinstance(accepted, requests.RequestAccepted)
                assert (await harness.view(f"r{known:d}")).inputs["lora"] == "ink"

    run_scenario(scenario())


def test_without_adapters_there_is_no_such_parameter(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            for known in (False, True):
                if known:
                    await harness.register("encoder-0")
                rejected = await harness.submit(f"r{known:d}", lora="ink")
                assert (rejected.code, rejected.param) == ("invalid", "lora")
                assert "is not a parameter of tiny" in rejected.message

    run_scenario(scenario())


def test_the_output_is_resolved_when_the_request_is_accepted(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.submit("early", output=Output("mp4"))
            assert (await harness.view("early")).output == Output("mp4", metadata=True), "nobody knows yet what is made"
            await harness.register("encoder-0", signature=VIDEO)
            rejected = await harness.submit("a", output=Output("wav"))
            assert (rejected.code, rejected.param) == ("invalid", "output_format")
            rejected = await harness.submit("a", frame_rate=500.0)
            assert (rejected.code, rejected.param) == ("invalid", "frame_rate")
            await harness.submit("a", output=Output("mp4"))
            assert (await harness.view("a")).output == Output("mp4", 24.0, metadata=True)
            await harness.submit("b", output=Output(), frame_rate=30)
            assert (await harness.view("b")).output == Output("", 30.0, metadata=True)

    run_scenario(scenario())


def test_the_serving_config_goes_before_the_pipeline_for_the_frame_rate(
    topology: Callable[..., Topology],
) -> None:
    made_topology = topology()
    (made_topology.models[0].path / "triptych.json").write_text('{"defaults": {"frame_rate": 30.0}}')

    async def scenario() -> None:
        async with running_head(made_topology) as harness:
            await harness.register("encoder-0", signature=VIDEO)
            said = await harness.head.ask(requests.DescribeModel(), requests.ModelDescription, timeout_s=BOUND_S)
            await harness.submit("a")
            assert said.fps == (await harness.view("a")).output.fps == 30.0

    run_scenario(scenario())


def test_a_model_is_described_with_its_parameters_defaults_and_ranges(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:

            async def described() -> requests.ModelDescription:
                return await harness.head.ask(requests.DescribeModel(), requests.ModelDescription, timeout_s=BOUND_S)

            assert (await described()).parameters == ()
            await harness.register("encoder-0")
            said = await described()
            assert [item.name for item in said.parameters] == ["height", "mask_image", "prompt", "sigmas"]
            assert said.parameters[0].default == 96, "that of the serving config, before the pipeline's"
            assert said.ranges == {"height": (64.0, 128.0, 8.0)}, "and nothing of what may be any number"

    run_scenario(scenario())


def test_answers_to_a_request_carry_the_version_of_the_description(topology: Callable[..., Topology]) -> None:
    async def described(harness: HeadHarness) -> str:
        message = requests.DescribeModel()
        return (await harness.head.ask(message, requests.ModelDescription, timeout_s=BOUND_S)).version

    async def scenario() -> None:
        async with running_head(topology()) as harness:
            unknown = await described(harness)
            assert (await harness.submit("early")).description_version == unknown
            await harness.register("encoder-0")
            known = await described(harness)
            assert known not in ("", unknown), "the instance has said what the pipeline takes"
            await harness.register("encoder-0", generation=2)
            assert (await harness.submit("late")).description_version == known, "it has said nothing new"
            rejected = await harness.submit("late", height=100)
            assert (rejected.code, rejected.description_version) == ("invalid", known)
            serving_config = harness.topology.models[0].path / "triptych.json"
            serving_config.write_text(serving_config.read_text().replace('"height": 96', '"height": 128'))
            await harness.head.ask(ReloadModel(), Reloading, timeout_s=BOUND_S)
            changed = await described(harness)
            assert (await harness.submit("last")).description_version == changed not in (known, unknown)
        async with running_head(topology(), generation=2) as harness:
            await harness.register("encoder-0")
            assert await described(harness) == changed, "a head that comes back describes the same model"

    run_scenario(scenario())


def test_no_request_is_accepted_while_a_role_has_no_instance_left(topology: Callable[..., Topology]) -> None:
    class Supervisor(Actor):
        states: ClassVar[dict[str, str]] = {"denoiser-0": "gave_up"}

        async def report(self, _: SupervisorQuery) -> SupervisorReport:
            rows = self.states.items()
            return SupervisorReport(tuple(ChildReport(n, "", 0, 1, state, 5, "it died", 0.0) for n, state in rows))

    async def scenario() -> None:
        made_topology = topology(supervision="")
        make_bus_keys(made_topology)
        async with (
            Runtime([Supervisor("supervisor")], Incarnation(AddressBook(made_topology), 1)),
            running_head(made_topology) as harness,
            asyncio.timeout(BOUND_S),
        ):
            rejected, number = await harness.submit("0"), 0
            while isinstance(rejected, requests.RequestAccepted):  # until the head has looked
                number += 1
                rejected = await harness.submit(str(number))
            assert rejected.code == "unavailable"
            assert "no denoiser is started any more (denoiser-0: it died)" in rejected.message
            assert rejected.retry_after_s > 0
            for name in harness.workers:
                await harness.register(name)
            while not isinstance(await harness.submit("back"), requests.RequestAccepted):
                pass

    run_scenario(scenario())


def test_seeds_follow_each_other_or_are_given_for_each() -> None:
    assert seeds_of(5, 3) == [5, 6, 7]
    assert seeds_of((5, 3), 2) == [5, 3]
    for seed, n in (((5, 3), 3), (MAX_SEED, 2)):
        with pytest.raises(ParameterError, match="seed must be"):
            seeds_of(seed, n)


def test_a_request_has_what_it_is_scheduled_by() -> None:
    (served,) = single_model(make_scheduler()).all
    served.scheduler.register(registration("denoiser-0"), 0.0)
    limits = AdmissionLimits(max_pending=9, timeout_s=60.0, largest_payload=0)

    def made(**inputs: int) -> tuple[int, float, int]:
        message = requests.SubmitRequest("r", {"prompt": "x", **inputs}, priority=3, deadline_s=9.0)
        request = make_request(message, served, limits, 0.0)
        return request.priority, request.deadline_s, request.steps

    assert made(num_inference_steps=7) == (3, 9.0, 7)
    assert made() == (3, 9.0, 0), "the pipeline has no default"
    served.serving_config = msgspec.structs.replace(served.serving_config, defaults={"num_inference_steps": 28})
    assert made() == (3, 9.0, 28)


def test_a_file_says_what_it_is_made_from_unless_the_request_or_the_topology_says_otherwise() -> None:
    (served,) = single_model(make_scheduler()).all
    served.scheduler.register(registration("denoiser-0"), 0.0)

    def made(default: bool, asked: bool | None) -> bool | None:
        message = requests.SubmitRequest("r", {"prompt": "x"}, output=Output(metadata=asked))
        return make_request(message, served, AdmissionLimits(9, 60.0, 0, default), 0.0).output.metadata

    assert [made(*each) for each in ((True, None), (False, None), (True, False), (False, True))] == [
        True, False, False, True,
    ]  # fmt: skip


def test_a_retry_has_the_digest_of_the_release_that_accepted_it() -> None:
    message = requests.SubmitRequest("r", {"prompt": "x"}, 7, 2, Output("webp", 24.0, 90))
    assert digest(message) == "0a8268679b9134ffc275eb0fb20b3b7834aaa73db02527c05293c82a5bcef488"
    other = msgspec.structs.replace(message, output=Output("webp", 24.0, 90, metadata=False))
    assert digest(other) != digest(message)
