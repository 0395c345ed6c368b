"""Read a TOML file into typed sections; an error names the file, the key and the fix."""

from __future__ import annotations

import difflib
import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn, TypeVar, get_args, get_origin

import msgspec
import structlog
from msgspec import NODEFAULT

from triptych.actors.errors import TopologyError
from triptych.actors.topology.sections import HostSection, ModelSection, RoleSection, Section, Sections

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

S = TypeVar("S", bound=Section)

_log = structlog.stdlib.get_logger("actors")
_WORDS: Final = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}


def parse_topology_file(file: Path) -> Sections:
    """Read a topology file; raises `TopologyError`."""
    tables = load_toml(file)
    name = str(file)
    fields = {field.name: field.type for field in msgspec.structs.fields(Sections)}
    for key in tables:
        if key not in (known := ("model", "roles", *fields)):
            raise TopologyError(name, f"[{key}]", "is not a section of a topology", did_you_mean(key, known))
    models = _models(name, tables)
    hosts = _decode_all(name, "hosts", tables.pop("hosts", []), HostSection, "host")
    decoded = {key: _decode(name, f"[{key}]", table, fields[key]) for key, table in tables.items()}
    return Sections(models=models, hosts=hosts, **decoded)


def _models(file: str, tables: dict[str, Any]) -> tuple[ModelSection, ...]:
    """Remove the models, with their roles, from the tables, and decode them."""
    if "models" in tables:
        for key in ("model", "roles"):
            if key in tables:
                written = "[model]" if key == "model" else "[[roles]]"
                fix = "write each model as a [[models]] with [[models.roles]] below it"
                raise TopologyError(file, written, "stands beside [[models]]", fix)
        models = _decode_all(file, "models", tables.pop("models"), ModelSection, "model")
        if models:
            return models
    if "model" not in tables:
        raise TopologyError(file, "", "has no [model] section", 'add [model] with path = "the folder of a model"')
    model = _decode(file, "[model]", tables.pop("model"), ModelSection)
    roles = _decode_all(file, "roles", tables.pop("roles", []), RoleSection, "kind")
    return (msgspec.structs.replace(model, roles=(*model.roles, *roles)),)


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """Return the fix for a misspelt word: the nearest known one, else all of them."""
    names = list(known)
    alike = [name for name in names if _digits(name) == _digits(key)]  # another number is another name, not a slip
    near = difflib.get_close_matches(key, alike, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}"


def _digits(word: str) -> str:
    return "".join(filter(str.isdigit, word))


def load_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file; raises `TopologyError`."""
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        raise TopologyError(str(file), "", "does not exist", "give the path of a topology file") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise TopologyError(str(file), "", f"cannot be read ({reason})", "give a readable file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TopologyError(str(file), "", f"is not TOML ({error})", "correct it there") from error


def _decode_all(file: str, key: str, tables: object, section: type[S], each: str, within: str = "") -> tuple[S, ...]:
    if not isinstance(tables, list):
        raise TopologyError(file, f"[{key}]", "is written as one table", f"write [[{key}]], once for each {each}")
    return tuple(
        _decode(file, f"[[{key}]] no. {number}{within}", table, section) for number, table in enumerate(tables, start=1)
    )


def _decode(file: str, where: str, table: object, section: type[S]) -> S:
    if not isinstance(table, dict):
        raise TopologyError(file, where, "is not a table", f"write the line {where} and its keys below it")
    table = _rename_old_keys(file, where, table, section)
    fields = {field.name: field for field in msgspec.structs.fields(section)}
    for key in table:
        if key not in fields:
            raise TopologyError(file, where, f"has no key called {key}", did_you_mean(key, fields))
    values = {}
    for key, field in fields.items():
        if key in table and (inner := _section_of(field.type)):
            outer = where.partition("]")[0].strip("[")
            within = f" of {where}" if where.startswith("[[") else ""
            values[key] = _decode_all(file, f"{outer}.{key}", table[key], inner, "one", within)
        elif key in table:
            values[key] = _convert(file, f"{where} {key}", table[key], field.type)
        elif field.default is NODEFAULT and field.default_factory is NODEFAULT:
            raise TopologyError(file, where, f"lacks the key {key}", f"add {key} = {_expected(field.type)}")
    return section(**values)


def _rename_old_keys(file: str, where: str, table: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    renamed = dict(table)
    for old, new in section.earlier_names.items():
        if old not in table:
            continue
        if new in table:
            raise TopologyError(file, where, f"has both {new} and {old}, its earlier name", f"remove {old}")
        _log.warning("a key of the topology has a new name", file=file, section=where, key=old, write=new)
        renamed[new] = renamed.pop(old)
    return renamed


def _section_of(kind: Any) -> type[Section] | None:
    """Return the section that a key is a list of, None if it is no list of tables."""
    inner = get_args(kind)[0] if get_origin(kind) is tuple else None
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None


def _convert(file: str, key: str, value: object, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        _raise_misfit(file, key, value, kind)


def _raise_misfit(file: str, key: str, value: object, kind: Any) -> NoReturn:
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    if choices and isinstance(value, str):
        raise TopologyError(file, key, f'= "{value}" is not known', did_you_mean(value, choices))
    raise TopologyError(file, key, f"= {_toml(value)} does not fit", f"give it {_expected(kind)}")


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(kind))
    if get_origin(kind) is Annotated:
        return str(next(meta.description for meta in get_args(kind)[1:] if meta.description))
    return _WORDS[kind]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
