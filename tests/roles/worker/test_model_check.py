"""What `triptych check --model` finds, whole: files, classes, and one request of a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from triptych.actors import Topology
from triptych.actors.topology import ModelReport
from triptych.roles.worker import model_check
from triptych.roles.worker.model_check import check_model

MakeTopology = Callable[..., Topology]


def checked(topology: Topology, *, dry_run: bool = True) -> tuple[ModelReport, list[str]]:
    said: list[str] = []
    roles = [component for component in topology.components if component.slots]
    return check_model(topology.models[0], roles, dry_run=dry_run, say=said.append), said


def test_a_model_is_asked_for_one_tiny_request_by_each_of_its_roles(
    make_topology: MakeTopology, tiny_model: Path
) -> None:
    report, said = checked(make_topology(tiny_model))
    assert (report.ok, report.problems) == (True, ())
    assert "by the modular partition" in report.sentence
    assert "num_inference_steps=2" in report.dry_run
    assert "loading the" in report.dry_run
    assert said[-3:] == ["a dry request: encoder", "a dry request: denoiser", "a dry request: decoder"]
    assert report.seconds.keys() == {"files", "import", "classes", "pipeline", "dry run"}
    assert msgspec.json.decode(msgspec.json.encode(report), type=ModelReport) == report


def test_a_model_that_is_too_large_or_not_to_be_loaded_is_not(
    make_topology: MakeTopology, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = checked(make_topology(tiny_model), dry_run=False)
    assert (report.ok, report.dry_run) == (True, "No dry request was made.")
    monkeypatch.setattr(model_check, "available_memory", lambda: 1000)
    report, _ = checked(make_topology(tiny_model))
    assert report.ok
    assert report.dry_run.startswith("No dry request was made: the weights take")


def test_what_is_wrong_is_all_in_the_report_and_no_request_is_made(
    make_topology: MakeTopology, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    (model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs.github.com/")
    (model / "text_encoder_2" / "model.safetensors").rename(model / "text_encoder_2" / "pytorch_model.bin")
    (model / "tokenizer" / "tokenizer.json").write_text("{}")
    report, said = checked(make_topology(model))
    assert not report.ok
    assert {problem.where for problem in report.problems} == {"transformer", "text_encoder_2", "tokenizer"}
    assert report.dry_run == ""
    assert not any("dry request" in what for what in said)


def test_a_request_that_fails_is_a_finding(
    make_topology: MakeTopology, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("no such thing")

    monkeypatch.setattr("triptych.engines.pipelines.dry_run.run", fail)
    report, _ = checked(make_topology(tiny_model))
    (problem,) = report.problems
    assert (problem.where, problem.fatal) == ("dry run", True)
    assert problem.problem.endswith("TypeError: no such thing")


def test_a_step_cache_has_to_reuse_something(
    make_topology: MakeTopology, tiny_model: Path, tmp_path: Path, models: Callable[[str], Path]
) -> None:
    report, said = checked(make_topology(tiny_model, cache="taylorseer"))
    assert (report.ok, report.problems) == (True, ())
    assert said[-1] == "a dry request: the step cache"
    # A model of one step has nothing to reuse.
    model = Path(shutil.copytree(tiny_model, tmp_path / "distilled"))
    (model / "triptych.json").write_text('{"ranges": {"num_inference_steps": [1, 1]}}')
    report, _ = checked(make_topology(model, cache="taylorseer"))
    (problem,) = report.problems
    assert (problem.where, problem.fatal) == ("cache", True)
    assert problem.problem == 'cache = "taylorseer" reuses nothing with this model in a request of 1 step(s).'
    # What a model cannot do is said without its weights.
    report, _ = checked(make_topology(models("sd3"), cache="first_block:0.1"), dry_run=False)
    (problem,) = report.problems
    assert (problem.where, problem.fatal) == ("cache", True)
    assert "its first and its last block do not return the same. It may take magcache, taylor" in problem.problem
