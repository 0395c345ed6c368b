"""A version of a model's files that is computed without reading the weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final

_READ: Final = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".py"})
"""The suffixes of the files that pipelines are loaded from."""
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 1 << 14


def model_version(paths: Iterable[Path], *, by_content: bool = False) -> str:
    """Return a digest of the names, sizes and modification times of a model's files.

    Args:
        paths: The folder of the model, and the files or folders of its adapters.
        by_content: Whether to compare the bytes of the files in place of their times, which differ between the copies
            on several hosts. Of a large file that is a sample of 1 MiB, with its first and last bytes.

    Returns:
        16 hexadecimal digits.

    Raises:
        OSError: A file cannot be read. Missing paths are skipped, since loading reports them.
    """
    digest = blake2b(digest_size=8)
    for number, path in enumerate(paths):
        for name, file in sorted(_files(path)):
            found = file.stat()
            seen = _sample(file, found.st_size) if by_content else str(found.st_mtime_ns).encode()
            digest.update(f"{number}\0{name}\0{found.st_size}\0".encode() + seen + b"\n")
    return digest.hexdigest()


def _sample(path: Path, nbytes: int) -> bytes:
    """Return a digest of all bytes of a file, or of `_SAMPLES` pieces of a large one, from its start to its end."""
    digest = blake2b(digest_size=8)
    with path.open("rb", buffering=0) as file:
        if nbytes <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(_SAMPLES):
                file.seek((nbytes - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield path.name, path
    for file in path.rglob("*"):
        if file.suffix in _READ and file.is_file():
            yield str(file.relative_to(path)), file
