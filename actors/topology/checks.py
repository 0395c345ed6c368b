"""What a topology must be to be run, beyond the types of its keys. Pure: nothing here looks at this machine."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from triptych.actors.errors import TopologyError
from triptych.actors.topology.sections import LEAST_POOL_BYTES, STAGES, cache_size, parse_rate, parse_size
from triptych.engines.backends import BACKENDS, DEFAULT, resolve_engine

if TYPE_CHECKING:
    from triptych.actors.topology.sections import ModelSection, RoleSection, Sections
    from triptych.actors.topology.topology import Component

_UNSAFE: Final = re.compile(r"[^a-z0-9_-]")
"""What the name of a component cannot have: a point in it would be taken for an actor within a process."""
_MAX_ROLE_NAME: Final = 32
"""Letters that the name of a role can have, for the path of its socket to be short enough."""
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9a-fA-F:]+")


def check_sections(file: str, sections: Sections) -> None:
    """Raise `TopologyError` for the first thing that cannot work."""
    _check_api(file, sections)
    _check_network(file, sections)
    _check_size(file, sections)
    _check_cache(file, sections)
    _check_state(file, sections)
    _check_memory(file, sections)
    _check_models(file, sections)
    for model in sections.models:
        _check_kinds(file, sections, model)
        _check_loras(file, sections, model)
    _check_names(file, sections)


def check_components(file: str, sections: Sections, components: tuple[Component, ...]) -> None:
    """Raise `TopologyError` if two components, or a component and HTTP, share a port or need one above 65535."""
    taken = {sections.api.port: "[api] port"}
    for component in components:
        if component.port > 65535:
            problem = f"leads to port {component.port} for {component.name}"
            raise TopologyError(file, "[head] port", problem, "choose a lower one")
        other = taken.setdefault(component.port, component.name)
        if other != component.name:
            problem = f"{component.port} is used twice, by {other} and by {component.name}"
            raise TopologyError(file, "port", problem, "give one of them another port")


def role_name(sections: Sections, model: ModelSection, role: RoleSection) -> str:
    """What the instances of a role are called, but for their numbers."""
    if role.name or len(sections.models) == 1:
        return role.name or role.kind
    return f"{_UNSAFE.sub('-', model.name.lower())}-{role.kind}"


def model_label(sections: Sections, model: ModelSection, key: str = "") -> str:
    """How an error calls a key of a model, or the model itself."""
    table = "[model]" if len(sections.models) == 1 else f'[[models]] "{model.name}"'
    return f"{table} {key}".strip()


def roles_label(sections: Sections, model: ModelSection) -> str:
    """How an error calls the roles of a model."""
    return "[[roles]]" if len(sections.models) == 1 else f'[[models.roles]] of "{model.name}"'


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_api(file: str, sections: Sections) -> None:
    api = sections.api
    if not is_loopback(api.host) and not api.keys_file:
        problem = f'= "{api.host}" would be open to the network, and there are no keys to keep others out'
        raise TopologyError(file, "[api] host", problem, 'use "127.0.0.1", or give clients keys with [api] keys_file')
    if api.public_url and not _is_site(api.public_url):
        problem, fix = f'= "{api.public_url}" is no URL of a site', 'write it as in "https://pictures.example.com"'
        raise TopologyError(file, "[api] public_url", problem, fix)
    for host in api.allowed_hosts:
        if not _HOST.fullmatch(host):
            fix = 'write a name alone, as in "pictures.example.com"'
            raise TopologyError(file, "[api] allowed_hosts", f'have "{host}", which is no host name', fix)
    if api.rate_limit:
        try:
            parse_rate(api.rate_limit)
        except ValueError:
            problem, fix = f'= "{api.rate_limit}" is no rate', 'write it as in "60/min", with s, min, h or day'
            raise TopologyError(file, "[api] rate_limit", problem, fix) from None


def _is_site(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and not (url.query or url.fragment)
    except ValueError:
        return False


def _check_network(file: str, sections: Sections) -> None:
    engine = resolve_engine(sections.transfer.engine)
    if BACKENDS[engine].is_open_to_network and not sections.transfer.trusted_network:
        problem = "would let everybody who reaches this host read and write the pools' memory, for it has no keys"
        fix = (
            "keep its ports behind a firewall and say trusted_network = true, as docs/security.md shows, "
            f'or use engine = "{DEFAULT}"'
        )
        raise TopologyError(file, f'[transfer] engine = "{engine}"', problem, fix)


def _check_size(file: str, sections: Sections) -> None:
    size = sections.transfer.pool_size
    try:
        nbytes = parse_size(size)
    except ValueError:
        problem = f'= "{size}" is not a size'
        raise TopologyError(file, "[transfer] pool_size", problem, 'write it as in "256MiB" or "1.5GiB"') from None
    if nbytes < LEAST_POOL_BYTES:
        problem = f'= "{size}" is less than {LEAST_POOL_BYTES} bytes'
        raise TopologyError(file, "[transfer] pool_size", problem, 'make it larger, as in "256MiB"')


def _check_state(file: str, sections: Sections) -> None:
    for key in ("max_requests_size", "max_artifacts_size", "max_uploads_size"):
        size = getattr(sections.state, key)
        try:
            parse_size(size)
        except ValueError:
            fix = 'write it as in "512MiB" or "32GiB"'
            raise TopologyError(file, f"[state] {key}", f'= "{size}" is not a size', fix) from None


def _check_memory(file: str, sections: Sections) -> None:
    for key in ("host", "card"):
        size = getattr(sections.memory, key)
        try:
            parse_size(size or "1B")
        except ValueError:
            problem, fix = f'= "{size}" is not a size', 'write it as in "24GiB", or leave it out'
            raise TopologyError(file, f"[memory] {key}", problem, fix) from None


def _check_cache(file: str, sections: Sections) -> None:
    pool_size, together = sections.transfer.pool_size, 0
    for model in sections.models:
        size, where = model.prompt_cache, model_label(sections, model, "prompt_cache")
        try:
            together += cache_size(size, parse_size(pool_size), len(sections.models))
        except ValueError:
            problem = f'= "{size}" is not a size'
            fix = 'write it as in "64MiB", or "0" for none'
            raise TopologyError(file, where, problem, fix) from None
        if together > parse_size(pool_size) // 2:
            besides = " with those before it" if len(sections.models) > 1 else ""
            problem = f'= "{size}" is{besides} more than half of [transfer] pool_size = "{pool_size}"'
            raise TopologyError(file, where, problem, "make it smaller, or the pool larger")


def _check_models(file: str, sections: Sections) -> None:
    if len(sections.models) == 1:
        return
    for number, model in enumerate(sections.models, start=1):
        if not model.name:
            fix = 'add name = "what requests are to give as model"'
            raise TopologyError(file, f"[[models]] no. {number}", "lacks the key name", fix)
    name, count = Counter(model.name for model in sections.models).most_common(1)[0]
    if count > 1:
        raise TopologyError(file, "[[models]]", f'use the name "{name}" {count} times', "give each a name of its own")


def _check_kinds(file: str, sections: Sections, model: ModelSection) -> None:
    kinds, where = {role.kind for role in model.roles}, roles_label(sections, model)
    if not kinds:
        fix = "add one for each of encoder, denoiser and decoder, or one monolithic"
        raise TopologyError(file, where, "are missing", fix)
    if "monolithic" in kinds:
        if kinds != {"monolithic"}:
            others = ", ".join(sorted(kinds - {"monolithic"}))
            fix = "keep either the stages or monolithic"
            raise TopologyError(file, where, f"mix monolithic with {others}", fix)
        return
    missing = [stage for stage in STAGES if stage not in kinds]
    if missing:
        header = "[[roles]]" if len(sections.models) == 1 else "[[models.roles]]"
        fix = f'add a {header} with kind = "{missing[0]}"'
        raise TopologyError(file, where, f"have no {' and no '.join(missing)}", fix)


def _check_names(file: str, sections: Sections) -> None:
    header = "[[roles]]" if len(sections.models) == 1 else "[[models.roles]]"
    names = [role_name(sections, model, role) for model in sections.models for role in model.roles]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise TopologyError(file, header, f"use the name {name} {count} times", "give each a name of its own with name")
    for name in names:
        if len(name) > _MAX_ROLE_NAME or not name[0].isalpha():
            problem = f"would be called {name}, which is no name of at most {_MAX_ROLE_NAME} letters, digits, - and _"
            raise TopologyError(file, header, problem, "give it a name of its own with name")


def _check_loras(file: str, sections: Sections, model: ModelSection) -> None:
    loras = Counter(("lora", "name", lora.name) for lora in model.lora)
    words = Counter(("embeddings", "token", embedding.token) for embedding in model.embeddings)
    for (section, key, name), count in (loras + words).items():
        if count > 1:
            where = f"[[model.{section}]]" if len(sections.models) == 1 else f'[[models.{section}]] of "{model.name}"'
            problem = f'use the {key} "{name}" {count} times'
            raise TopologyError(file, where, problem, f"give each a {key} of its own")
