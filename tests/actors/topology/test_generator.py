"""The topology that `triptych add` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from triptych.actors import load_topology
from triptych.actors.command import app
from triptych.actors.topology import (
    ModelSection,
    ModelSummary,
    RoleSection,
    generate_topology,
    relative_model_path,
    topology_file_name,
)
from triptych.actors.topology.generator import estimate_pool_bytes

MIB = 1 << 20
FLUX = ModelSummary(pipeline="FluxPipeline", disaggregated=True, sentence="FluxPipeline, by the modular partition")


def roles_of(facts: ModelSummary, folder: Path, section: ModelSection | None = None) -> tuple[RoleSection, ...]:
    file = folder / "made.toml"
    file.write_text(generate_topology(section or ModelSection(path="m"), facts))
    (model,) = load_topology(file).models
    return model.section.roles


def test_roles_are_those_of_the_pipeline_and_the_devices(folder: Path) -> None:
    def said(gpus: int, *, disaggregated: bool = True) -> list[tuple[str, int, str]]:
        facts = ModelSummary(pipeline="", disaggregated=disaggregated, sentence="", gpus=gpus)
        return [(role.kind, role.count, role.device) for role in roles_of(facts, folder)]

    assert said(0) == [("encoder", 1, "cpu"), ("denoiser", 1, "cpu"), ("decoder", 1, "cpu")]
    assert said(1) == [("encoder", 1, "cuda:0"), ("denoiser", 1, "cuda:0"), ("decoder", 1, "cuda:0")]
    assert said(4) == [("encoder", 1, "cuda:0"), ("denoiser", 4, "cuda"), ("decoder", 1, "cuda:0")]
    assert said(2, disaggregated=False) == [("monolithic", 1, "cuda:0")]


def test_it_says_what_was_asked_for_and_what_was_found(folder: Path) -> None:
    facts = ModelSummary(
        pipeline="P", disaggregated=True, sentence="P, by a route", config="a/b", weights={"unet": 5 << 30}, gpus=1
    )
    text = generate_topology(ModelSection(path='x "1".safetensors', revision="v2"), facts)
    assert "# P, by a route.\n# Weights on the disk: unet 5.0 GiB.\n" in text
    (folder / "made.toml").write_text(text)
    (model,) = load_topology(folder / "made.toml").models
    section = model.section
    assert (section.path, section.config, section.revision) == ('x "1".safetensors', "a/b", "v2")
    assert section.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("defaults", "mebibytes"),
    [({}, 256), ({"width": 2048, "height": 2048}, 512), ({"num_frames": 81, "width": 832, "height": 480}, 2048)],
)
def test_a_pool_has_room_for_some_requests_of_the_usual_size(defaults: dict[str, object], mebibytes: int) -> None:
    assert estimate_pool_bytes(defaults) == mebibytes * MIB


def test_names_and_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert topology_file_name("stabilityai/sdxl-turbo") == "sdxl-turbo.toml"
    assert topology_file_name("/models/My Model_v2.safetensors") == "my-model_v2.toml"
    assert topology_file_name("FLUX.1-dev/") == "flux.1-dev.toml"
    monkeypatch.chdir(folder)
    assert relative_model_path("people/tiny", folder.resolve()) == "people/tiny"
    (folder / "people" / "tiny").mkdir(parents=True)
    assert relative_model_path("people/tiny", folder.resolve()) == "people/tiny"
    assert relative_model_path("people/tiny", folder.resolve() / "other") == str(folder.resolve() / "people" / "tiny")


def test_a_file_that_is_there_is_not_written_over(folder: Path) -> None:
    file = folder / "x.toml"
    file.write_text("mine")
    shown = CliRunner().invoke(app, ["add", "people/tiny", "-o", str(file)])
    assert shown.exit_code == 1
    assert "--force to write over it" in shown.stderr
    assert file.read_text() == "mine"
