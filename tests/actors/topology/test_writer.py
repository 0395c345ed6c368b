"""Topology files that are written: those of `triptych init`, and those with overrides."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from tests.actors.conftest import THREE_ROLES
from triptych.actors import TopologyError, load_topology
from triptych.actors.command import app
from triptych.actors.topology import (
    ModelSection,
    ModelSummary,
    RoleSection,
    for_device,
    generate_topology,
    relative_model_path,
    topology_file_name,
    write_with_overrides,
)
from triptych.actors.topology._writer import estimate_pool_bytes, merge

MIB = 1 << 20
FLUX = ModelSummary(pipeline="FluxPipeline", disaggregated=True, sentence="FluxPipeline, by the modular partition")


def roles_of(facts: ModelSummary, folder: Path, section: ModelSection | None = None) -> tuple[RoleSection, ...]:
    file = folder / "made.toml"
    file.write_text(generate_topology(section or ModelSection(path="m"), facts))
    (model,) = load_topology(file).models
    return model.section.roles


GIB = 1 << 30
STAGES = {"encoder": ("t5",), "denoiser": ("dit",), "decoder": ("vae",)}


def planned(gpus: tuple[int, ...], folder: Path, **gibibytes: float) -> list[tuple[str, int, str, str]]:
    """Kind, count, device and offload of each role, for weights of so many GiB in bfloat16."""
    elements = {name: int(size * GIB / 2) for name, size in gibibytes.items()}
    facts = ModelSummary(
        pipeline="",
        disaggregated=True,
        sentence="",
        elements=elements,
        stages=STAGES,
        gpus=tuple(n * GIB for n in gpus),
    )
    return [(role.kind, role.count, role.device, role.offload) for role in roles_of(facts, folder)]


def test_roles_are_those_of_the_pipeline_and_the_devices(folder: Path) -> None:
    def said(*gpus: int, disaggregated: bool = True) -> list[tuple[str, int, str]]:
        facts = ModelSummary(pipeline="", disaggregated=disaggregated, sentence="", gpus=gpus)
        return [(role.kind, role.count, role.device) for role in roles_of(facts, folder)]

    assert said() == [("encoder", 1, "cpu"), ("denoiser", 1, "cpu"), ("decoder", 1, "cpu")]
    assert said(8 * GIB) == [("encoder", 1, "cuda:0"), ("denoiser", 1, "cuda:0"), ("decoder", 1, "cuda:0")]
    assert said(*[0] * 4) == [("encoder", 1, "cuda:0"), ("denoiser", 4, "cuda"), ("decoder", 1, "cuda:0")]
    assert said(0, 0, disaggregated=False) == [("monolithic", 2, "cuda")]


def test_memory_decides_what_shares_a_gpu_and_what_rests_on_the_host(folder: Path) -> None:
    flux = {"t5": 9.3, "dit": 22.2, "vae": 0.2}
    assert planned((80,), folder, **flux) == [
        ("encoder", 1, "cuda:0", "none"), ("denoiser", 1, "cuda:0", "none"), ("decoder", 1, "cuda:0", "none"),
    ], "all fit"  # fmt: skip
    assert planned((32,), folder, **flux) == [
        ("encoder", 1, "cuda:0", "group"), ("denoiser", 1, "cuda:0", "none"), ("decoder", 1, "cuda:0", "none"),
    ], "what runs shortest rests on the host"  # fmt: skip
    assert planned((16,), folder, **flux) == [
        ("encoder", 1, "cuda:0", "group"), ("denoiser", 1, "cuda:0", "group"), ("decoder", 1, "cuda:0", "group"),
    ]  # fmt: skip
    assert planned((32, 32, 32), folder, **flux) == [
        ("encoder", 1, "cuda:2", "none"), ("denoiser", 2, "cuda", "none"), ("decoder", 1, "cuda:2", "none"),
    ], "the last GPU has what does not fit beside a denoiser"  # fmt: skip
    assert planned((16, 16), folder, **flux)[1] == ("denoiser", 1, "cuda:0", "group")


def test_the_device_may_be_chosen_for_another_machine() -> None:
    here = ModelSummary(pipeline="", disaggregated=True, sentence="", gpus=(8 * GIB,))
    assert [for_device(here, device).gpus for device in ("auto", "cuda", "cpu")] == [(8 * GIB,), (8 * GIB,), ()]
    assert [for_device(FLUX, device).gpus for device in ("auto", "cuda", "cpu")] == [(), (0,), ()]


def test_the_file_says_why(folder: Path) -> None:
    elements = {"t5": 2 * GIB, "dit": 8 * GIB, "vae": 1 << 20}
    facts = ModelSummary(pipeline="", disaggregated=True, sentence="P", elements=elements, stages=STAGES)
    on_cpu = generate_topology(ModelSection(path="m"), facts)
    assert '[[roles]]\n# on the CPU: 4.0 MiB of weights\nkind = "decoder"\n' in on_cpu
    on_gpus = generate_topology(ModelSection(path="m"), msgspec.structs.replace(facts, gpus=(16 * GIB, 16 * GIB)))
    assert "# 16.0 GiB of weights, on a GPU of 16.0 GiB; they rest on the host, since not all fit there" in on_gpus
    assert (
        "# 4.0 GiB of weights, on a GPU of 16.0 GiB, apart from the denoisers, beside which they would not" in on_gpus
    )


def test_the_file_names_the_model_asked_for_and_what_was_found(folder: Path) -> None:
    facts = ModelSummary(
        pipeline="P", disaggregated=True, sentence="P, by a route", config="a/b", weights={"unet": 5 << 30}, gpus=(0,)
    )
    text = generate_topology(ModelSection(path='x "1".safetensors', revision="v2"), facts)
    assert "# P, by a route.\n# Weights on disk: unet 5.0 GiB.\n" in text
    assert text.count("[[roles]]\n") == 3
    (folder / "made.toml").write_text(text)
    (model,) = load_topology(folder / "made.toml").models
    section = model.section
    assert (section.path, section.config, section.revision) == ('x "1".safetensors', "a/b", "v2")
    assert section.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("defaults", "mebibytes"),
    [({}, 256), ({"width": 2048, "height": 2048}, 512), ({"num_frames": 81, "width": 832, "height": 480}, 2048)],
)
def test_a_pool_holds_some_requests_of_the_usual_size(defaults: dict[str, object], mebibytes: int) -> None:
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
    shown = CliRunner().invoke(app, ["init", "people/tiny", "-o", str(file)])
    assert shown.exit_code == 1
    assert "replace it with --force" in shown.stderr
    assert file.read_text() == "mine"


def test_adapters_of_a_topology_stay_where_they_are(folder: Path) -> None:
    file = folder / "t.toml"
    entry = '[[model.lora]]\nname = "{0}"\npath = "{0}.safetensors"\nscale = 0.5\n'
    file.write_text(f'[model]\npath = "m"\n{entry.format("a")}{entry.format("b")}path_2 = "/x"\n{THREE_ROLES}')
    (folder / "out").mkdir()
    topology = load_topology(write_with_overrides(file, {"api": {"port": 9000}}, folder / "out"))
    (model,) = topology.models
    assert [(lora.name, lora.scale) for lora in model.section.lora] == [("a", 0.5), ("b", 0.5)]
    assert [model.absolute(lora.path) for lora in model.section.lora] == [
        folder / "a.safetensors",
        folder / "b.safetensors",
    ]
    assert model.section.lora[1].path_2 == "/x"
    assert model.path == folder / "m"


def test_overrides_change_keys_and_roles_by_name(folder: Path) -> None:
    file = folder / "demo.toml"
    file.write_text(
        f'[model]\npath = "models/x"\n[bus]\nkeys = "k"\n[webhooks]\nkeys_file = "w"\n[api]\nport = 8001\n{THREE_ROLES}'
    )
    changes = {"api": {"port": 0}, "head": {"max_pending": 2}, "roles": {"denoiser": {"count": 3}}}
    (folder / "out").mkdir()
    (folder / "models" / "x").mkdir(parents=True)  # what is not there could be the id of a repository
    topology = load_topology(write_with_overrides(file, changes, folder / "out"))
    assert topology.models[0].path == folder.resolve() / "models" / "x"
    assert topology.head.max_pending == 2
    assert topology.bus.keys == str(folder / "k"), "as in the folder of the file"
    assert topology.webhook_keys_path == (folder / "w").resolve()
    assert topology.api.port not in (0, 8001)
    assert [role.count for role in topology.models[0].section.roles] == [1, 3, 1]
    assert topology.state_dir == (folder / "out" / "state").resolve()
    assert file.read_text().count("count") == 0


def test_overrides_change_models_by_name_and_their_roles(folder: Path) -> None:
    file = folder / "two.toml"
    roles = THREE_ROLES.replace("[[roles]]", "[[models.roles]]")
    file.write_text("".join(f'[[models]]\nname = "{name}"\npath = "{name}"\n{roles}' for name in "ab"))
    changes = {"models": {"b": {"dtype": "float32", "roles": {"denoiser": {"count": 2}}}}}
    (folder / "out").mkdir()
    topology = load_topology(write_with_overrides(file, changes, folder / "out"))
    first, second = topology.models
    assert (first.path, second.path) == (folder.resolve() / "a", folder.resolve() / "b")
    assert (first.section.dtype, second.section.dtype) == ("bfloat16", "float32")
    assert [role.count for role in first.section.roles] == [1, 1, 1]
    assert [role.count for role in second.section.roles] == [1, 2, 1]
    with pytest.raises(TopologyError, match=r"\[\[models\]\] of the overrides name c, which is not there"):
        merge("two.toml", tomllib.loads(file.read_text()), {"models": {"c": {}}})


def test_an_override_for_a_role_that_is_not_there(folder: Path) -> None:
    tables = tomllib.loads(THREE_ROLES)
    with pytest.raises(TopologyError, match="name denoisr, which is not there: did you mean denoiser"):
        merge("demo.toml", tables, {"roles": {"denoisr": {"count": 2}}})
    with pytest.raises(TopologyError, match=r"none.toml does not exist: give the path of a topology file"):
        write_with_overrides(folder / "none.toml", {"api": {}}, folder)
