from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from triptych.actors.supervision.zygote import FORBIDDEN
from triptych.actors.topology.sections import EngineName
from triptych.engines.backends import AUTO, BACKENDS, DEFAULT, resolve_engine
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer import TransferSetupError, open_backend

ROOT = Path(__file__).parents[3]


def test_what_depends_on_a_backend_follows_from_the_table():
    assert get_args(EngineName) == (AUTO, *BACKENDS)
    assert set(FORBIDDEN) == {spec.package for spec in BACKENDS.values() if not spec.fork_safe}
    assert resolve_engine(AUTO) == DEFAULT
    for spec in BACKENDS.values():
        module, _, function = spec.opener.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_an_unknown_backend_is_refused_with_those_that_there_are():
    with pytest.raises(TransferSetupError, match=r'must be one of .*, not "pigeon"') as refused:
        open_backend("pigeon", arena=Arena.create(4096))
    assert all(f'"{name}"' in str(refused.value) for name in (AUTO, *BACKENDS))


def test_the_table_imports_nothing_large():
    code = "import sys, triptych.engines.backends; sys.exit(bool({'torch', 'numpy', 'mooncake'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
