"""Several models in one system: one head, a scheduler for each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.roles.head.head_harness import BOUND_S, PNG, SIGNATURE, HeadHarness, run_scenario, running_head
from triptych.actors import Topology, load_topology
from triptych.bus import RemoteError
from triptych.roles.head.request_store import OTHER_MODEL
from triptych.roles.messages import requests, stages
from triptych.roles.messages.weights import Reloading, ReloadModel

Two = Callable[..., Topology]


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Two:
    """Make a topology of the models called; each is in a folder of that name, unless another is given."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    for name, kind in (("a", "FluxPipeline"), ("b", "StableDiffusion3Pipeline")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
        (folder / "triptych.json").write_text('{"name": "tiny"}')

    def make(**models: str) -> Topology:
        entries = []
        for name, folder in models.items():
            roles = "".join(f'[[models.roles]]\nkind = "{kind}"\n' for kind in ("encoder", "denoiser", "decoder"))
            entries.append(f'[[models]]\nname = "{name}"\npath = "{folder}"\n{roles}')
        path = tmp_path / "two.toml"
        path.write_text("".join(entries) + '[state]\npath = "state"\n[head]\nmax_pending = 3\n')
        return load_topology(path)

    return make


async def submit(harness: HeadHarness, id_: str, model: str, **more: Any) -> Any:
    message = requests.SubmitRequest(id_, {"prompt": "x"}, 7, 1, PNG, model=model, **more)
    return await harness.head.ask(message, requests.RequestAccepted, requests.RequestRejected, timeout_s=BOUND_S)


async def registration(harness: HeadHarness, name: str, version: str = "") -> None:
    kind = name.split("-")[-2]
    message = stages.RegisterInstance(name, kind, 1, 1, 2, 2, 0, "pool", SIGNATURE, (), model=version)
    await harness.head.ask(message, stages.InstanceRegistered, timeout_s=BOUND_S)


def test_a_request_goes_to_the_instances_of_the_model_that_it_names(two: Two) -> None:
    async def scenario() -> None:
        async with running_head(two(a="a", b="b")) as harness:
            await registration(harness, "b-encoder-0", "version of b")
            await registration(harness, "a-encoder-0", "version of a")
            for id_, model in (("first", ""), ("second", "b")):
                assert isinstance(await submit(harness, id_, model), requests.RequestAccepted)
            assert (await harness.next_attempt("a-encoder-0")).job_id == "first/0"
            assert (await harness.next_attempt("b-encoder-0")).job_id == "second/0"
            assert [(await harness.view(id_)).model for id_ in ("first", "second")] == ["a", "b"]
            rejected = await submit(harness, "third", "c")
            assert (rejected.code, rejected.param) == ("model_not_found", "model")
            assert "'a' and 'b' are" in rejected.message
            with pytest.raises(RemoteError, match="'c' is not served here"):
                await harness.head.ask(requests.DescribeModel("c"), requests.ModelDescription, timeout_s=BOUND_S)
            listed = await harness.head.ask(requests.ListModels(), requests.ModelDescriptions, timeout_s=BOUND_S)
            assert [model.name for model in listed.models] == ["a", "b"]
            assert isinstance(await submit(harness, "third", "a"), requests.RequestAccepted)
            assert (await submit(harness, "fourth", "b")).code == "full", "max_pending is that of the system"
            view = await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            assert "no decoder of b is ready" in view.reasons
            assert view.states == {"ENCODER_WAITING": 3}

    run_scenario(scenario())


def test_a_key_counts_for_one_model_alone(two: Two) -> None:
    async def scenario() -> None:
        async with running_head(two(a="a", b="b")) as harness:
            assert (await submit(harness, "r", "a", idempotency_key="k")).request_id == "r"
            assert (await submit(harness, "s", "a", idempotency_key="k")).request_id == "r"
            assert (await submit(harness, "s", "b", idempotency_key="k")).code == "conflict"

    run_scenario(scenario())


def test_after_a_restart_a_request_goes_on_with_the_model_that_it_was_accepted_for(two: Two) -> None:
    async def scenario() -> None:
        async with running_head(two(a="a", b="b")) as harness:
            for name in "ab":
                await submit(harness, f"of {name}".replace(" ", "-"), name)
        async with running_head(two(b="b", renamed="a"), generation=2) as harness:
            assert [(await harness.view(id_)).model for id_ in ("of-a", "of-b")] == ["renamed", "b"]
            for name in ("renamed", "b"):
                await registration(harness, f"{name}-encoder-0")
            assert (await harness.next_attempt("renamed-encoder-0")).job_id == "of-a/0"
            assert (await harness.next_attempt("b-encoder-0")).job_id == "of-b/0"
        async with running_head(two(b="b"), generation=3) as harness:
            gone, there = [await harness.view(id_) for id_ in ("of-a", "of-b")]
            assert (gone.state, gone.units[0].history[-1].reason) == ("FAILED", OTHER_MODEL)
            assert there.state == "ENCODER_WAITING"

    run_scenario(scenario())


def test_a_model_is_reloaded_by_its_name(two: Two) -> None:
    async def scenario() -> None:
        async with running_head(two(a="a", b="b")) as harness:
            for name in "ab":
                await registration(harness, f"{name}-encoder-0", "earlier")
            reloading = await harness.head.ask(ReloadModel("b"), Reloading, timeout_s=BOUND_S)
            assert reloading.instances == ("b-encoder-0",)
            assert harness.actor.models.all[0].scheduler.model == "earlier"
            with pytest.raises(RemoteError, match="'c' is not served here"):
                await harness.head.ask(ReloadModel("c"), Reloading, timeout_s=BOUND_S)
            everything = await harness.head.ask(ReloadModel(), Reloading, timeout_s=BOUND_S)
            assert (everything.joined, everything.total) == (0, 6)
            assert everything.instances == ("a-encoder-0", "b-encoder-0")

    run_scenario(scenario())


def test_a_misspelt_default_is_said_once_when_the_parameters_are_known(two: Two) -> None:
    async def scenario() -> None:
        topology = two(a="a", b="b")
        (topology.models[0].path / "triptych.json").write_text('{"name": "tiny", "defaults": {"hieght": 64}}')
        async with running_head(topology) as harness:
            with structlog.testing.capture_logs() as logs:
                for kind in ("encoder", "denoiser"):
                    await registration(harness, f"a-{kind}-0")
            warnings = [line["problem"] for line in logs if line["log_level"] == "warning"]
            assert [problem.endswith('have "hieght": did you mean "height"?') for problem in warnings] == [True]

    run_scenario(scenario())
