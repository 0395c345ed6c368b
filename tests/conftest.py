"""What tests of all folders share: where the actors of tests are found, and the tiny models of a run."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from tests.ports import mooncake_environment

_ROOT = str(Path(__file__).parents[1])

# For tiny tensors a second thread costs more than it computes, and what is compared is computed on as many threads.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Processes that are started import nothing from the current folder: they are told where the actors of tests are.
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (_ROOT, os.environ.get("PYTHONPATH", "")) if path)
# Engines of mooncake choose their ports by themselves, and would take those of the engines of parallel tests.
os.environ.update(mooncake_environment())

_SYSTEM = Path(__file__).parent / "system"
_S3_PYTHON = Path(os.environ.get("TRIPTYCH_S3_PYTHON", f"{_ROOT}/.venv-s3/bin/python"))
"""An interpreter that has OpenStack Swift, which `make test-s3` installs."""
S3_BUCKET = "pictures"

Models = Callable[[str], Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a tiny model by its family, made when first asked for. A test that changes it makes a copy.

    The parallel workers of a run share these folders: each model is made once, by the worker that asks first.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "models"
    folder.mkdir(exist_ok=True)
    made: set[str] = set()

    def model(family: str) -> Path:
        path = folder / family
        if family not in made:
            with (folder / f"{family}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _make(path, family)
            made.add(family)
        return path

    return model


def _make(path: Path, family: str) -> None:
    from triptych.tools.make_model import Family, make_model  # imports torch and diffusers, which few folders need

    unfinished = path.with_name(f"{family}.unfinished")
    make_model(unfinished, Family(family), progress=False)
    unfinished.rename(path)


@pytest.fixture(autouse=True)
def torch_defaults() -> Iterator[None]:
    """Start each test with gradients, which a denoise turns off on its thread, and fail one that changes the process.

    What a later test of the same process computes would differ by a bit, whenever it comes after such a test.
    """
    if torch := sys.modules.get("torch"):
        torch.set_grad_enabled(True)
    yield
    assert not (changed := _changed_settings()), f"the test has left settings of the process changed: {changed}"


def _changed_settings() -> dict[str, str]:
    """Return what computations of this process depend on and is not as libraries or this file set it."""
    settings: dict[str, tuple[object, object]] = {}
    if torch := sys.modules.get("torch"):
        settings = {
            "threads": (torch.get_num_threads(), 1),
            "default dtype": (torch.get_default_dtype(), torch.float32),
            "deterministic algorithms": (torch.are_deterministic_algorithms_enabled(), False),
            "precision of matrix products": (torch.get_float32_matmul_precision(), "highest"),
        }
    if attention := sys.modules.get("diffusers.models.attention_dispatch"):
        settings["attention backend"] = (attention._AttentionBackendRegistry._active_backend.value, "native")
    return {name: str(now) for name, (now, before) in settings.items() if now != before}


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """Take SIGINT again where a shell has started this in the background: what ignores it would pass that on."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put side by side what shares processes, and clusters first: they take longest.

    Each parallel worker begins with a part of this list, and takes from the end of another's when it has none left.
    """

    def order(item: pytest.Item) -> tuple[bool, str, bool]:
        shared = item.get_closest_marker("shared_cluster")
        system = _SYSTEM in item.path.parents
        return not system, shared.args[0] if shared else "~", "processes" not in getattr(item, "fixturenames", ())

    items.sort(key=order)
    for item in items:
        if item.get_closest_marker("shared_cluster"):  # whoever comes first starts it, with up to thirty processes
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Popen[str]]:
    """A real S3 server with an empty bucket, and the environment that leads to it."""
    from triptych.roles.media.s3 import S3Files

    if not _S3_PYTHON.exists():
        pytest.skip("needs OpenStack Swift: run `make test-s3`")
    arguments = [str(_S3_PYTHON), "-W", "ignore", str(Path(__file__).with_name("s3_server.py"))]
    with (
        Popen([*arguments, str(tmp_path_factory.mktemp("swift"))], stdin=PIPE, stdout=PIPE, text=True) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert server.stdout is not None
        patch.setenv("AWS_ENDPOINT_URL", server.stdout.readline().strip())
        for name, value in (("ACCESS_KEY_ID", "test:tester"), ("SECRET_ACCESS_KEY", "testing"), ("REGION", "local")):
            patch.setenv(f"AWS_{name}", value)
        S3Files(f"s3://{S3_BUCKET}")._s3.mkdir(S3_BUCKET)
        yield server
        server.kill()
