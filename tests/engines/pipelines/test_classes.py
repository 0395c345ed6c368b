"""The survey of pipeline classes: a sample of them by route, and how its rows are bounded, kept and written."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from triptych.tools.families import page, survey
from triptych.tools.families.classes import by_class
from triptych.tools.families.stage_processes import StageProcesses
from triptych.tools.families.survey import SurveyRecord, Trial

SAME, OTHER = Trial(served=True, identical=True), Trial(served=True, why="images differ by up to 3")
REFUSED = Trial(why="cannot be cut")
# By route: blocks that make other bits than the class; cut at encoders and VAE, with an image, two models of a kind, a
# video; uncut, with a prompt and without.
IN_PARTS = (
    "StableDiffusionXLPipeline",
    "StableDiffusionControlNetPipeline",
    "AnimateDiffPipeline",
    "PixArtSigmaPipeline",
    "IFPipeline",
)
UNCUT = ("AmusedPipeline", "DDPMPipeline")


@pytest.mark.families
@pytest.mark.parametrize("name", [*IN_PARTS, *UNCUT])
def test_a_class_is_served_as_it_is(name: str, processes: StageProcesses, tmp_path: Path) -> None:
    record = survey.row(by_class()[name], tmp_path, processes)
    assert not record.unbuilt
    assert record.by_one.identical, record
    assert record.by_three.identical == (name in IN_PARTS), record
    assert record.done


@pytest.mark.families
def test_every_class_has_a_sample_or_a_reason() -> None:
    found = survey.classes()
    assert len(found) > 290
    assert set(by_class()) <= set(found)
    assert not [name for name, reason in found.items() if not reason and name not in by_class()]


def test_a_row_that_crashes_or_never_ends_is_bounded() -> None:
    assert survey.bounded(lambda: b"{}", 60) == b"{}\n"
    assert survey.bounded(lambda: os._exit(3), 60) is None
    assert survey.bounded(lambda: threading.Event().wait(), 0.1) is None


def test_rows_are_chosen_by_patterns_and_kept_in_a_file(tmp_path: Path) -> None:
    assert survey.is_selected("StableDiffusionPAGPipeline", "")
    assert survey.is_selected("StableDiffusionPAGPipeline", "Flux*, *PAG*")
    assert not survey.is_selected("StableDiffusionPAGPipeline", "Flux*,StableDiffusion")
    path = tmp_path / "rows.jsonl"
    assert survey.read_records(path) == {}
    good = SurveyRecord(pipeline="APipeline", task="text → image", route="classic", cut=SAME, whole=SAME)
    survey.append_record(path, SurveyRecord(pipeline="APipeline", unbuilt="it fails"))
    survey.append_record(path, good)
    assert survey.read_records(path) == {"APipeline": good}
    assert not list(survey.run(["APipeline"], survey.read_records(path), again=True, row_s=1, total_s=1))


def test_the_totals_count_what_is_served_and_what_is_identical(tmp_path: Path) -> None:
    records = [
        SurveyRecord(pipeline="APipeline", task="text → image", route="classic", cut=SAME, whole=SAME),
        SurveyRecord(
            pipeline="BPipeline", task="text → image", route="modular", cut=OTHER, whole=OTHER, classic_cut=SAME
        ),
        SurveyRecord(pipeline="CPipeline", task="image → image", route="monolithic", cut=REFUSED, whole=SAME),
        SurveyRecord(pipeline="DPipeline", task="text → image", route="classic", cut=REFUSED, whole=OTHER),
        SurveyRecord(pipeline="EPipeline", unbuilt="needs onnx"),
    ]
    assert [record.bad for record in records] == [False, False, False, True, False]
    assert page.summary(records) == (
        "5 classes; 4 of them can be built tiny. Of those 4 (100.0%) are served and 3 (75.0%) with the bits of the"
        " class: 2 by three processes (2 of them identical), 4 by one (2 identical); 1 cannot be cut."
    )
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- classes -->\nold\n<!-- end of classes -->\nafter\n")
    page.write(path, page.CLASSES, page.classes(records))
    written = path.read_text()
    assert written.startswith("before\n<!-- classes -->\n")
    assert written.endswith("<!-- end of classes -->\nafter\n")
    assert "old" not in written
    assert "| A | text → image | classic | identical | identical |  |" in written
    assert (
        "| B | text → image | modular; classic | identical | differs | by blocks: images differ by up to 3" in written
    )
    assert "| E | needs onnx |" in written
    with pytest.raises(ValueError, match="no part between `<!-- blocks -->`"):
        page.write(path, page.BLOCKS, "")
