"""The topology that `triptych add` writes for a model: from what the model is, and from the devices of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from triptych.actors.topology.model_source import is_repository
from triptych.actors.topology.overrides import to_toml

if TYPE_CHECKING:
    from triptych.actors.topology._model_report import ModelSummary
    from triptych.actors.topology.sections import ModelSection

_MIB: Final = 1 << 20
_LEAST_POOL: Final = 256 * _MIB
_MOST_POOL: Final = 8192 * _MIB
_ENCODED_PROMPT_BYTES: Final = 32 * _MIB
"""Bytes of the text of a request when it is encoded: 512 tokens of 4096 floats, with and without guidance, rounded."""
_PAYLOADS_IN_FLIGHT: Final = 4
"""Payloads that a pool should have room for in each of its halves: two requests of two stages."""


def generate_topology(section: ModelSection, facts: ModelSummary) -> str:
    """Write a topology for a model, as TOML. Pure.

    Args:
        section: With its path, and what else was asked for.
        facts: What it is.
    """
    model = {"path": section.path, "revision": section.revision, "config": section.config or facts.config}
    tables = {
        "model": {key: value for key, value in model.items() if value}
        | {"dtype": "bfloat16" if facts.gpus else "float32"},
        "transfer": {"pool_size": _size(estimate_pool_bytes(facts.defaults))},
        "roles": _roles(disaggregated=facts.disaggregated, gpus=facts.gpus),
    }
    return "".join(f"# {line}\n" for line in _header_comments(facts)) + "\n" + to_toml(tables)


def estimate_pool_bytes(defaults: dict[str, object]) -> int:
    """Bytes of a pool for requests of the usual size: a power of two, from 256 MiB to 8 GiB. Pure."""
    video = int(str(defaults.get("num_frames") or 1))
    width, height = (int(str(defaults.get(side) or (1024 if video == 1 else 832))) for side in ("width", "height"))
    # Some families hand on what they start from, and no latents are larger than its pixels.
    payload = 4 * 3 * width * height * video + _ENCODED_PROMPT_BYTES
    needed = 1 << (_PAYLOADS_IN_FLIGHT * payload - 1).bit_length()
    return min(max(needed, _LEAST_POOL), _MOST_POOL)


def topology_file_name(path: str) -> str:
    """Name of the topology of a model, such as "sdxl-turbo.toml" for "stabilityai/sdxl-turbo". Pure."""
    resolved = Path(path.rstrip("/"))
    name = resolved.stem if resolved.suffix in (".safetensors", ".gguf") else resolved.name
    return f"{re.sub(r'[^a-z0-9._-]+', '-', name.lower()).strip('-.') or 'model'}.toml"


def relative_model_path(path: str, folder: Path) -> str:
    """Say a path of the command line as a topology in `folder` has to: relative to it where it lies below it."""
    if is_repository(path) and not Path(path).exists():
        return path
    resolved = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - links to files keep their names
    return str(resolved.relative_to(folder)) if resolved.is_relative_to(folder) else str(resolved)


def _header_comments(facts: ModelSummary) -> list[str]:
    sizes = [f"{name} {nbytes / (1 << 30):.1f} GiB" for name, nbytes in facts.weights.items()]
    return [
        f"{facts.sentence}.",
        *([f"Weights on the disk: {', '.join(sizes)}."] if sizes else []),
        "Every key, with its default: actors/topology/sections.py.",
    ]


def _roles(*, disaggregated: bool, gpus: int) -> list[dict[str, object]]:
    first: dict[str, object] = {"device": "cuda:0"} if gpus else {}
    if not disaggregated:
        return [{"kind": "monolithic", **first}]
    denoiser: dict[str, object] = {"kind": "denoiser", **first}
    if gpus > 1:
        denoiser |= {"count": gpus, "device": "cuda"}
    return [{"kind": "encoder", **first}, denoiser, {"kind": "decoder", **first}]


def _size(nbytes: int) -> str:
    return f"{nbytes // _MIB}MiB" if nbytes < 1024 * _MIB else f"{nbytes // (1024 * _MIB)}GiB"
