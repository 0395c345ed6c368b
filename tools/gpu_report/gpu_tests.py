"""Row `tests`: the tests that need a GPU; on the CPU, their number."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from triptych.tools.gpu_report.row_context import RowContext, RowFailedError
from triptych.tools.gpu_report.runner import ROOT

FOLDERS: Final = ("tests/gpu", "tests/engines")
MARGIN_S: Final = 10.0
"""Seconds of the row that are left for pytest to write its report when it is stopped."""


def tests(context: RowContext) -> None:
    """Run the tests; without a GPU, count them."""
    folders = [folder for folder in FOLDERS if (ROOT / folder).exists()]
    # A package that is missing here must not keep the tests of other files from running.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", *folders]
    if not context.cuda:
        found = subprocess.run(  # noqa: S603 - our own command
            [*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        print(found.stdout)
        counted = sum("::" in line for line in found.stdout.splitlines())
        context.value("tests that need a GPU", counted, note="counted, not run: this is the CPU")
        return
    if _stops_in_time():
        command.append(f"--session-timeout={max(10.0, context.left_s - 2 * MARGIN_S):.0f}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        try:
            subprocess.run(  # noqa: S603 - our own command
                [*command, f"--junitxml={file}"], cwd=ROOT, check=False, timeout=max(10.0, context.left_s - MARGIN_S)
            )
        except subprocess.TimeoutExpired as error:
            raise RowFailedError(
                f"The tests were still running after {error.timeout:.0f} s; the log says which."
            ) from None
        if not file.is_file():
            raise RowFailedError("pytest could not run; the log says why.")
        report(context, file.read_text())


def _stops_in_time() -> bool:
    """Whether pytest can stop between two tests after a time and report those before."""
    try:
        major, minor = version("pytest-timeout").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (2, 3)


def report(context: RowContext, xml: str) -> None:
    """Report what pytest says in its JUnit file; raises RowFailedError where a test failed or could not be read."""
    (suite,) = ElementTree.fromstring(xml).iter("testsuite")  # noqa: S314 - pytest has just written it
    run, failures, errors, skipped = (int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped"))
    context.value("passed", run - failures - errors - skipped, note=f"in {float(suite.get('time', '0')):.0f} s")
    context.value("failed", failures + errors)
    context.value("skipped", skipped)
    cases = [case for case in suite.iter("testcase") if {child.tag for child in case} & {"failure", "error"}]
    if cases:
        raise RowFailedError("Failed: " + ", ".join(str(case.get("name")) for case in cases))
