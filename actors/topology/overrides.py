"""A topology file with some keys changed, written anew."""

from __future__ import annotations

import json
import socket
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.actors.errors import TopologyError
from triptych.actors.topology._parser import did_you_mean
from triptych.actors.topology.model_source import absolute, is_repository

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def write_with_overrides(file: Path, overrides: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """Write `file`, changed, to a file of the same name in `folder`; raises `TopologyError`.

    Paths in it become absolute, since they are relative to the file. An `[api] port` of 0 becomes a free one. State
    without a configured place goes below `folder`.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TopologyError(str(file), "", f"cannot be read ({error})", "give a topology file") from error
    changed = merge(str(file), tables, overrides)
    for model in (changed.get("model", {}), *changed.get("models", [])):
        _make_model_absolute(model, file.parent)
    _make_absolute(changed.get("state", {}), file.parent)
    _make_absolute(changed.get("api", {}), file.parent)
    changed.setdefault("state", {}).setdefault("path", str(folder / "state"))
    if changed.get("api", {}).get("port") == 0:
        changed["api"]["port"] = free_port()
    written = folder / file.name
    written.write_text(to_toml(changed), encoding="utf-8")
    return written


def merge(file: str, tables: dict[str, Any], overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tables with the keys of `overrides` put over theirs. Pure.

    Models are found by name, roles by name or kind.
    """
    merged = {key: dict(table) for key, table in tables.items() if not isinstance(table, list)}
    lists = {key: rows for key, rows in tables.items() if isinstance(rows, list)}
    for section, keys in overrides.items():
        if section in ("roles", "models"):
            lists[section] = _merge_rows(file, section, lists.get(section, []), keys)
        else:
            merged.setdefault(section, {}).update(keys)
    return merged | lists


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


def to_toml(tables: Mapping[str, Any]) -> str:
    """TOML of tables of scalars, of lists of these, and of lists of such tables, which is all that a topology has."""
    return "\n".join(_lines(tables, "")).replace("\x7f", "\\u007f")


def _lines(tables: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in tables.items():
        rows, header = (value, f"[[{prefix}{name}]]") if isinstance(value, list) else ([value], f"[{prefix}{name}]")
        for row in rows:
            yield header
            inner = {key: item for key, item in row.items() if _is_table(item)}
            # The scalars of JSON, and lists of them, are those of TOML; only the escape for DEL differs.
            yield from (
                f"{key} = {json.dumps(item, ensure_ascii=False)}" for key, item in row.items() if key not in inner
            )
            yield ""
            yield from _lines(inner, f"{prefix}{name}.")


def _is_table(item: object) -> bool:
    return isinstance(item, dict) or (isinstance(item, list) and any(isinstance(row, dict) for row in item))


def _make_model_absolute(model: dict[str, Any], base: Path) -> None:
    # The id of a repository looks as a path does, and stays one.
    ids = {
        key: model[key]
        for key in ("path", "config")
        if is_repository(str(model.get(key))) and not (base / model[key]).exists()
    }
    _make_absolute(model, base)
    if isinstance(components := model.get("components"), dict):
        model["components"] = {name: str(absolute(base, path)) for name, path in components.items()}
    model |= ids


def _make_absolute(table: dict[str, Any], base: Path) -> None:
    """Resolve the paths of a table, and of those in it."""
    for key, value in table.items():
        if key in ("path", "path_2", "keys_file", "config") and isinstance(value, str) and value:
            table[key] = str(absolute(base, value))
        elif isinstance(value, list):
            table[key] = [dict(row) if isinstance(row, dict) else row for row in value]
            for row in table[key]:
                if isinstance(row, dict):
                    _make_absolute(row, base)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
