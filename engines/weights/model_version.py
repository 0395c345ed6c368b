"""A version of a model's files that is computed without reading the weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final

_READ: Final = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".py"})
"""The suffixes of the files that pipelines are loaded from."""


def model_version(paths: Iterable[Path]) -> str:
    """Return a digest of the names, sizes and modification times of a model's files.

    Args:
        paths: The folder of the model, and the files or folders of its adapters.

    Returns:
        16 hexadecimal digits.

    Raises:
        OSError: A file cannot be read. Missing paths are skipped, since loading reports them.
    """
    digest = blake2b(digest_size=8)
    for number, path in enumerate(paths):
        for name, file in sorted(_files(path)):
            found = file.stat()
            digest.update(f"{number}\0{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield path.name, path
    for file in path.rglob("*"):
        if file.suffix in _READ and file.is_file():
            yield str(file.relative_to(path)), file
