"""The wheel: one name in site-packages, and a demo that needs no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_wheel_installs_one_package_that_runs_the_demo_without_a_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, since a build leaves its files beside the sources
    ignored = shutil.ignore_patterns(".*", "out", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"triptych"}

    installed = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, wheel], check=True
    )
    demo = [sys.executable, "-P", "-m", "triptych.tools.demo"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    subprocess.run(demo, check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "out" / "demo.png").stat().st_size > 1000
    assert (installed / "triptych" / "api" / "page_files" / "index.html").is_file()
    where = "import triptych; print(triptych.__file__)"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", where], check=True, env=environment, capture_output=True, text=True
    )
    assert shown.stdout.startswith(str(installed))
