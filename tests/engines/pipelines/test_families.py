"""What holds for every block set of the installed diffusers, and a few families run apart and whole."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.configuration_utils import ConfigMixin
from transformers import PreTrainedModel

from tests.engines.families import all_families
from triptych.engines.partition.blocks import cut_blocks, prune
from triptych.engines.stages import Stage
from triptych.engines.weights.stubs import COMPUTE_METHODS
from triptych.tools.families.cases import Case, cases
from triptych.tools.families.compare import Comparison, compare, difference, identical
from triptych.tools.families.report import Result, markdown, summary
from triptych.tools.families.rows import blocks_of, pipelines, rows
from triptych.tools.families.stage_processes import StageError, StageProcesses

# One each of: two experts and guiders, editing with a channels-last VAE, sound, layout of several text encoders,
# objects in the request, a private name of geometry, weights that a decoder multiplies in an odd layout.
HANDFUL = (
    "wan22:",
    "sdxl:image2image",
    "ltx2:text2video",
    "hunyuan_video1_5:image2video",
    "flux2:image_conditioned",
    "ltx2:condition",
    "cosmos3:text2video_with_sound",
    "ltx25:image2video",
)
# It would encode an image that has not been encoded, but the encoder always does that before.
RUN_IN_VAIN = {("StableDiffusionXLModularPipeline", Stage.DENOISER): {"vae"}}
ROOTS = ("components", "pipeline")


def syntax(block: type) -> Iterator[ast.AST]:
    """All nodes of a block's class and of those it is derived from, as far as they are of a family."""
    for cls in block.__mro__:
        module = cls.__module__
        if module.startswith("diffusers.modular_pipelines.") and not module.endswith(".modular_pipeline"):
            yield from ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))


def read_of(node: ast.AST) -> str | None:
    """The NAME of `components.NAME`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ROOTS:
        return node.attr
    return None


@cache
def read_and_run(block: type) -> tuple[frozenset[str], frozenset[str]]:
    """Names of what a block reads of its pipeline, and of what it runs, such as `components.vae.decode()`."""
    read, run = set(), set()
    for node in syntax(block):
        if name := read_of(node):
            read.add(name)
        if isinstance(node, ast.Call):
            method = node.func
            if isinstance(method, ast.Attribute) and method.attr in COMPUTE_METHODS:
                method = method.value
            if name := read_of(method):
                run.add(name)
    return frozenset(read), frozenset(run)


def leaves(block: Any) -> Iterator[Any]:
    yield block
    for inner in block.sub_blocks.values():
        yield from leaves(inner)


def of_part(part: Any) -> tuple[set[str], set[str]]:
    """The same of all blocks of a part."""
    found = [read_and_run(type(block)) for block in leaves(part)]
    return {name for read, _ in found for name in read}, {name for _, run in found for name in run}


def read_by_properties(found: type) -> dict[str, set[str]]:
    """Names of the attributes that each property of a pipeline's class reads."""
    return {
        name: {
            node.attr
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(item.fget))))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        }
        for cls in reversed(found.__mro__)
        if cls.__module__.startswith("diffusers.modular_pipelines.")
        for name, item in vars(cls).items()
        if isinstance(item, property) and item.fget
    }


def has_stub(spec: Any) -> bool:
    kind = spec.type_hint
    stubbed = isinstance(kind, type) and issubclass(kind, (ConfigMixin, PreTrainedModel))
    return spec.default_creation_method == "from_config" or stubbed


def parts_of(pipeline: str) -> Iterator[tuple[str, dict[Stage, Any]]]:
    whole = blocks_of(pipeline)
    for task in [*(whole._workflow_map or ()), "any"]:
        yield task, cut_blocks(prune(whole, task))


@pytest.mark.parametrize("pipeline", all_families(pipelines()))
def test_no_stage_reads_a_component_that_it_has_neither_loaded_nor_as_a_stub(pipeline: str) -> None:
    # What no block of the family declares is not there in the whole pipeline either.
    declared = set(blocks_of(pipeline).component_names)
    computed = read_by_properties(getattr(diffusers, pipeline))
    seen = 0
    for task, parts in parts_of(pipeline):
        specs = {spec.name: spec for spec in blocks_of(pipeline).expected_components}
        stubs = {name for name, spec in specs.items() if has_stub(spec)}
        for stage, part in parts.items():
            read, run = of_part(part)
            seen += len(read)
            # `components.vae_scale_factor` is a property that reads the VAE.
            read |= {name for attribute in read for name in computed.get(attribute, ())}
            undeclared = (read & declared) - set(part.component_names) - stubs
            assert not undeclared, (task, stage)
            absent = set(specs) - set(part.component_names) - RUN_IN_VAIN.get((pipeline, stage), set())
            others = run & absent
            assert not others, (task, stage, "runs what it does not have")
    assert seen > 3


def test_there_is_a_row_for_every_task_and_each_has_a_partition_strategy() -> None:
    found = rows()
    assert {row.family for row in found} == {name.removesuffix("ModularPipeline") for name in pipelines()}
    assert len({(row.family, row.task) for row in found}) == len(found) >= 100
    for row in found:
        assert row.route == "modular"
        assert bool(row.case) != bool(row.reason), "either it can be run, or it says why not"
        assert row.to_decoder, "nothing would come out"
    assert {(case.pipeline, case.task) for case in cases()} <= {
        (f"{row.family}ModularPipeline", row.task) for row in found
    }


def case_of(name: str) -> Case:
    family, _, task = name.partition(":")
    return next(case for case in cases() if case.family == family and case.task == task)


@pytest.mark.parametrize("name", all_families(HANDFUL, HANDFUL[:4]))
def test_three_processes_change_no_bit(name: str, processes: StageProcesses, tmp_path: Path) -> None:
    outcome = compare(case_of(name), tmp_path, processes)
    assert outcome.identical, outcome
    assert outcome.max_abs_diff == 0.0
    assert "latents" in outcome.crossed[1]
    assert set(outcome.outputs) >= ({"videos", "audio"} if name.startswith("ltx2") else set())


def test_a_stage_that_fails_says_why_and_its_process_goes_on(
    models: Callable[[str], Path], processes: StageProcesses, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="encoder: ModelError: There is no model folder"):
        processes.run(tmp_path / "none", {"prompt": "a ship"}, 0)
    made, _ = processes.run(
        models("flux"), {"prompt": "a ship", "num_inference_steps": 1, "height": 16, "width": 16}, 0
    )
    assert made.keys() == {"images"}


def test_a_difference_is_measured_and_makes_the_row_bad() -> None:
    ours, theirs = [np.zeros((2, 2), np.float32)], [np.full((2, 2), 0.25, np.float32)]
    assert identical(ours, [np.zeros((2, 2), np.float32)])
    assert not identical(ours, theirs)
    assert difference(ours, theirs) == 0.25
    assert difference(ours, [np.zeros((2, 3), np.float32)]) is None
    assert not identical(ours, [np.zeros((2, 2), np.float64)]), "the same numbers in other bytes"
    assert not identical([], []), "nothing is not the same as nothing"

    row = next(row for row in rows() if row.case)
    good, bad = Result(row, Comparison(True, 0.0, {})), Result(row, Comparison(False, 0.25, {}))
    failed, not_run = Result(row, failed=True), Result(row)
    assert [result.bad for result in (good, bad, failed, not_run)] == [False, True, True, False]
    assert bad.record()["max_abs_diff"] == 0.25
    assert not_run.record()["identical"] is None
    assert summary([good, bad, failed, not_run]) == "1 pipelines, 4 rows; 3 ran, 1 of those identical"
    assert "| no (0.25) |" in markdown([bad])
