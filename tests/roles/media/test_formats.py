from __future__ import annotations

import subprocess
import sys

from triptych.roles.media.formats import FORMAT_OF_ENDING, FORMATS, REQUESTED_FORMATS, formats_for


def test_each_format_is_of_some_medium_and_each_medium_has_one_that_suits_it() -> None:
    media = ("image", "video", "audio")
    assert {name for medium in media for name in formats_for(medium)} == set(FORMATS) - {"safetensors"}
    assert [formats_for(medium)[0] for medium in media] == ["png", "mp4", "wav"]
    assert "jpeg" not in formats_for("video", 2)
    assert "jpeg" in formats_for("video", 1), "one frame is an image"


def test_a_file_is_named_by_its_format() -> None:
    assert {name: FORMAT_OF_ENDING[name] for name in REQUESTED_FORMATS} == {name: name for name in REQUESTED_FORMATS}
    assert FORMAT_OF_ENDING["jpg"] == "jpeg"
    assert "safetensors" not in FORMAT_OF_ENDING, "latents are asked for with output_type"


def test_the_table_imports_nothing_that_could_write() -> None:
    program = (
        "import sys, triptych.roles.media.formats; sys.exit(bool(sys.modules.keys() & {'torch', 'PIL', 'numpy', 'av'}))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
