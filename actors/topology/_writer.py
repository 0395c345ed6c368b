"""Write topology files: one for a model, and one with some keys of another file replaced."""

from __future__ import annotations

import copy
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import tomli_w

from triptych.actors.errors import TopologyError
from triptych.actors.topology._model_source import absolute, is_repository
from triptych.actors.topology._parser import did_you_mean, load_toml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from triptych.actors.topology._model_report import ModelSummary
    from triptych.actors.topology.sections import ModelSection

_MIB: Final = 1 << 20
_MIN_POOL_BYTES: Final = 256 * _MIB
_MAX_POOL_BYTES: Final = 8192 * _MIB
_ENCODED_PROMPT_BYTES: Final = 32 * _MIB
"""Bytes of an encoded prompt: 512 tokens of 4096 floats, with and without guidance, rounded up."""
_PAYLOADS_IN_FLIGHT: Final = 4
"""Payloads that each half of a pool should have room for: two requests of two stages."""
_WEIGHTS_SHARE: Final = 0.8
"""Share of a GPU's memory that weights may take; the rest is for what is computed."""
_PATH_KEYS: Final = frozenset({"path", "path_2", "keys_file", "keys", "config"})


def for_device(summary: ModelSummary, device: Literal["auto", "cpu", "cuda"]) -> ModelSummary:
    """Return the summary for a machine whose roles compute on such devices; "cuda" is a GPU of unknown memory. Pure."""
    if device == "cpu":
        return msgspec.structs.replace(summary, gpus=())
    return summary if device == "auto" or summary.gpus else msgspec.structs.replace(summary, gpus=(0,))


def generate_topology(section: ModelSection, summary: ModelSummary) -> str:
    """Return a topology for a model, as TOML with the reasons as comments. Pure.

    Args:
        section: The model: its path, and what else the user asked for.
        summary: What is known of it and of the machine.
    """
    model = {"path": section.path, "revision": section.revision, "config": section.config or summary.config}
    if summary.gpus:
        dtype, why = "bfloat16", "the type that GPUs are fast with, at half the memory of float32"
    else:
        dtype, why = "float32", "the type that a CPU is fast with"
    pool = _size(estimate_pool_bytes(summary.defaults))
    # A table for each role, where tomli_w would write them as one inline array.
    parts = [
        _comments(_header_comments(summary)),
        _table("[model]", {key: value for key, value in model.items() if value})
        + _comments([why])
        + tomli_w.dumps({"dtype": dtype}),
        _table("[transfer]", {"pool_size": pool}, "room for some requests of the usual size between two stages"),
        *(_table("[[roles]]", keys, why) for keys, why in plan_roles(summary)),
    ]
    return "\n".join(parts)


def _table(header: str, keys: Mapping[str, object], why: str = "") -> str:
    return f"{header}\n{_comments([why] if why else [])}{tomli_w.dumps(keys)}"


def plan_roles(summary: ModelSummary) -> list[tuple[dict[str, object], str]]:
    """Return the keys of each role, and why: by the GPUs, their memory, and the weights of each stage. Pure."""
    stages = ["encoder", "denoiser", "decoder"] if summary.disaggregated else ["monolithic"]
    if not summary.gpus:
        return [({"kind": stage}, f"on the CPU: {_weights_of(summary, stage, 4)}") for stage in stages]
    main = "denoiser" if summary.disaggregated else "monolithic"
    weights = {stage: _bytes_of(summary, stage, 2) for stage in stages}
    spread = len(summary.gpus) > 1
    # The last GPU has the encoder and the decoder for itself where they do not fit beside a denoiser.
    apart = spread and summary.disaggregated and not _fits(sum(weights.values()), summary.gpus[0])
    denoisers = len(summary.gpus) - apart
    last = len(summary.gpus) - 1
    others = [stage for stage in stages if stage != main]
    resting = _offloaded(weights, others if apart else stages, summary.gpus[last if apart else 0])
    if apart and not _fits(weights[main], min(summary.gpus[:last])):
        resting.add(main)
    roles = []
    for stage in stages:
        gpu = last if apart and stage != main else 0
        keys: dict[str, object] = {"kind": stage, "device": f"cuda:{gpu}"}
        why = f"{_weights_of(summary, stage, 2)}, on a GPU of {_memory(summary.gpus[gpu])}"
        if stage == main and denoisers > 1:
            keys |= {"count": denoisers, "device": "cuda"}
            why = f"{_weights_of(summary, stage, 2)}, on {denoisers} GPUs of {_memory(min(summary.gpus[:denoisers]))}"
        if stage in resting:
            keys["offload"] = "group"
            why += "; they rest on the host, since not all fit there with room to compute"
        elif apart and stage != main:
            why += ", apart from the denoisers, beside which they would not fit"
        roles.append((keys, why))
    return roles


def _fits(nbytes: int, gpu: int) -> bool:
    """Return whether weights fit into the memory of a GPU, with room to compute; a memory of 0 is not known."""
    return not gpu or nbytes <= _WEIGHTS_SHARE * gpu


def _offloaded(weights: Mapping[str, int], stages: Sequence[str], gpu: int) -> set[str]:
    """Return the stages whose weights rest on the host, so that the others of a GPU fit: shortest runs first."""
    resting: set[str] = set()
    for stage in ("encoder", "decoder", "denoiser", "monolithic"):
        if _fits(sum(weights[each] for each in stages if each not in resting), gpu):
            break
        if stage in stages:
            resting.add(stage)
    return resting


def _bytes_of(summary: ModelSummary, stage: str, width: int) -> int:
    """Return the bytes of a stage's weights once they are loaded, with so many bytes each; 0 if they are not known."""
    if stage == "monolithic":
        return width * sum(summary.elements.values())
    return width * sum(summary.elements.get(name, 0) for name in summary.stages.get(stage, ()))


def _weights_of(summary: ModelSummary, stage: str, width: int) -> str:
    nbytes = _bytes_of(summary, stage, width)
    return f"{_memory(nbytes)} of weights" if nbytes else "weights of unknown size"


def _memory(nbytes: int) -> str:
    """Say how much memory something has or takes."""
    if not nbytes:
        return "unknown memory"
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / _MIB:.1f} MiB"


def _comments(sentences: Iterable[str]) -> str:
    return "".join(f"# {sentence}\n" for sentence in sentences)


def estimate_pool_bytes(defaults: Mapping[str, object]) -> int:
    """Return the bytes of a pool for requests of the usual size: a power of two from 256 MiB to 8 GiB. Pure."""
    frames = int(str(defaults.get("num_frames") or 1))
    width, height = (int(str(defaults.get(side) or (1024 if frames == 1 else 832))) for side in ("width", "height"))
    # Some families pass on their input image or video, and latents are never larger than its pixels.
    payload = 4 * 3 * width * height * frames + _ENCODED_PROMPT_BYTES
    needed = 1 << (_PAYLOADS_IN_FLIGHT * payload - 1).bit_length()
    return min(max(needed, _MIN_POOL_BYTES), _MAX_POOL_BYTES)


def topology_file_name(path: str) -> str:
    """Return the file name of a model's topology, such as "sdxl-turbo.toml" for "stabilityai/sdxl-turbo". Pure."""
    resolved = Path(path.rstrip("/"))
    name = resolved.stem if resolved.suffix in (".safetensors", ".gguf") else resolved.name
    return f"{re.sub(r'[^a-z0-9._-]+', '-', name.lower()).strip('-.') or 'model'}.toml"


def relative_model_path(path: str, folder: Path) -> str:
    """Return a path of the command line as a topology in `folder` has to give it: relative if it lies below it."""
    if is_repository(path) and not Path(path).exists():
        return path
    resolved = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100  links to files keep their names
    return str(resolved.relative_to(folder)) if resolved.is_relative_to(folder) else str(resolved)


def write_with_overrides(file: Path, overrides: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """Write a copy of `file` with some keys replaced to a file of the same name in `folder`, and return its path.

    Paths in it become absolute, since they are relative to the file. An `[api] port` of 0 becomes a free port. Without
    a `[state] path`, the state is kept below `folder`.

    Raises `TopologyError` for a file that cannot be read, and for a model or role that it does not have.
    """
    tables = load_toml(file)
    changed = merge(str(file), tables, overrides)
    for model in (changed.get("model", {}), *changed.get("models", [])):
        _make_model_absolute(model, file.parent, file.parent)
    for section in ("state", "api", "webhooks", "bus"):
        _make_absolute(changed.get(section, {}), file.parent)
    changed.setdefault("state", {}).setdefault("path", str(folder / "state"))
    if changed.get("api", {}).get("port") == 0:
        changed["api"]["port"] = free_port()
    written = folder / file.name
    written.write_text(tomli_w.dumps(changed), encoding="utf-8")
    return written


def merge(file: str, tables: dict[str, Any], overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the tables with the keys of `overrides` in place of theirs. Pure.

    Models and hosts are found by name, roles by name or kind; `file` is what an error calls the topology.
    """
    merged = {key: dict(table) for key, table in tables.items() if not isinstance(table, list)}
    lists = {key: rows for key, rows in tables.items() if isinstance(rows, list)}
    for section, keys in overrides.items():
        if section in ("roles", "models", "hosts"):
            lists[section] = _merge_rows(file, section, lists.get(section, []), keys)
        else:
            merged.setdefault(section, {}).update(keys)
    return merged | lists


def rebase_models(tables: Mapping[str, Any], here: Path, there: Path) -> dict[str, Any]:
    """Return a copy of the tables in which relative paths of the models, their adapters and parts lie below `there`.

    Args:
        tables: Of a topology file in the folder `here`, where a path that is there is no id of a repository.
        here: Absolute.
        there: Absolute, perhaps of another machine.
    """
    moved = copy.deepcopy(dict(tables))
    for model in (moved.get("model", {}), *moved.get("models", [])):
        _make_model_absolute(model, there, here)
    return moved


def free_port() -> int:
    """Return a TCP port of the loopback interface on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _header_comments(summary: ModelSummary) -> list[str]:
    sizes = [f"{name} {_memory(nbytes)}" for name, nbytes in summary.weights.items()]
    return [
        f"{summary.sentence}.",
        *([f"Weights on disk: {', '.join(sizes)}."] if sizes else []),
        "Every key and its default: actors/topology/sections.py.",
    ]


def _size(nbytes: int) -> str:
    return f"{nbytes // _MIB}MiB" if nbytes < 1024 * _MIB else f"{nbytes // (1024 * _MIB)}GiB"


def _merge_rows(file: str, key: str, rows: list[Any], overrides: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    named = {row.get("name") or row.get("kind"): dict(row) for row in rows}
    for name, changes in overrides.items():
        if name not in named:
            problem = f"of the overrides name {name}, which is not there"
            raise TopologyError(file, f"[[{key}]]", problem, did_you_mean(name, map(str, named)))
        row, plain = named[name], dict(changes)
        if key == "models" and "roles" in plain:
            row["roles"] = _merge_rows(file, "models.roles", row.get("roles", []), plain.pop("roles"))
        row.update(plain)
    return list(named.values())


def _make_model_absolute(model: dict[str, Any], base: Path, here: Path) -> None:
    # The id of a repository looks like a path, and is left as it is.
    ids = {
        key: model[key]
        for key in ("path", "config")
        if is_repository(str(model.get(key))) and not (here / model[key]).exists()
    }
    _make_absolute(model, base)
    if isinstance(components := model.get("components"), dict):
        model["components"] = {name: str(absolute(base, path)) for name, path in components.items()}
    model |= ids


def _make_absolute(table: dict[str, Any], base: Path) -> None:
    """Make the paths of a table, and of the tables in its lists, absolute."""
    for key, value in table.items():
        if key in _PATH_KEYS and isinstance(value, str) and value:
            table[key] = str(absolute(base, value))
        elif isinstance(value, list):
            table[key] = [dict(row) if isinstance(row, dict) else row for row in value]
            for row in table[key]:
                if isinstance(row, dict):
                    _make_absolute(row, base)
