"""Make a request with its jobs from a client's submission, or refuse it and name the input at fault. Pure."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast

import msgspec
from msgspec.structs import replace

from triptych.actors import Topology
from triptych.engines.parameters.lora import check_lora
from triptych.engines.parameters.schema import MASKS, Signature
from triptych.engines.parameters.serving_config import STEPS, ParameterError
from triptych.roles.head.job import Job, Request
from triptych.roles.head.output import resolve_output
from triptych.roles.head.served_models import ServedModel
from triptych.roles.messages.common import MAX_SEED, Images, Input, Tensors
from triptych.roles.messages.requests import SubmitRequest

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The limits of a topology for a request."""

    max_pending: int
    """Most active jobs."""
    timeout_s: float
    """Seconds that a request has from its acceptance to its end."""
    largest_payload: int
    """Most bytes that one stage can pass to the next; 0 where there are no pools."""
    metadata: bool = True
    """Whether files say what they are made from, unless the request says otherwise."""


def limits_of(topology: Topology) -> AdmissionLimits:
    """Return the limits of a topology."""
    has_pools = any(component.kind == "pool" for component in topology.components)
    largest = topology.largest_payload if has_pools else 0
    return AdmissionLimits(topology.head.max_pending, topology.head.request_timeout_s, largest, topology.head.metadata)


def make_request(message: SubmitRequest, served: ServedModel, limits: AdmissionLimits, now: float) -> Request:
    """Make the request that a client submits, with the defaults of its model filled in.

    Args:
        message: The client's submission; the caller has checked that its id is new.
        served: The model that it names.
        limits: The limits of the topology.
        now: Unix seconds.

    Raises:
        ParameterError: An input cannot be served; `param` is its name.
    """
    if not _ID.fullmatch(message.request_id):
        raise request_id_error()
    if not 1 <= message.n <= limits.max_pending:
        raise ParameterError("n", f"must be from 1 to {limits.max_pending}")
    signature, serving_config = served.signature, served.serving_config
    # Until the first instance has registered, the names that the pipeline takes are unknown: the encoder checks them.
    inputs = cast(dict[str, Input], serving_config.apply(message.inputs, served.parameters, signature.tasks))
    serving_config.check_total(inputs, message.n)
    if limits.largest_payload:
        _check_payload(inputs, signature, limits.largest_payload)
    output = resolve_output(message.output, signature, message.inputs, inputs)
    if output.metadata is None:
        output = replace(output, metadata=limits.metadata)
    check_lora(inputs, served.lora_names, served.name)
    seeds = seeds_of(secrets.randbits(32) if message.seed is None else message.seed, message.n)
    id_ = message.request_id
    return Request(
        id=id_,
        inputs=inputs,
        output=output,
        created_at=now,
        times_out_at=now + limits.timeout_s,
        jobs=[Job(f"{id_}/{k}", id_, k, seed, limits.timeout_s) for k, seed in enumerate(seeds)],
        idempotency_key=idempotency_key(message),
        digest=digest(message),
        owner=message.owner,
        served=served.identity,
        model=served.key,
        priority=message.priority,
        deadline_s=message.deadline_s,
        steps=steps_of(inputs, served),
        partial_images=message.partial_images,
        remixed_from=message.remixed_from,
        webhook_url=message.webhook_url,
    )


def steps_of(inputs: Mapping[str, Input], served: ServedModel) -> int:
    """Return the denoising steps of a request with these inputs, 0 if that is not known."""
    default = next((p.default for p in served.signature.parameters if p.name == STEPS), None)
    steps = inputs.get(STEPS, default)
    return steps if isinstance(steps, int) else 0


def request_id_error() -> ParameterError:
    """Return the error for an id that is malformed, or in use."""
    return ParameterError("request_id", "must be new, and of at most 64 letters, digits, - and _")


def seeds_of(seed: int | tuple[int, ...], n: int) -> list[int]:
    """Return the seed of each of `n` images; raises ParameterError."""
    if isinstance(seed, tuple):
        if len(seed) != n:
            raise ParameterError("seed", f"must be {n} seeds, one for each of n, not {len(seed)}.")
        return list(seed)
    if seed + n - 1 > MAX_SEED:
        raise ParameterError("seed", f"must be at most {MAX_SEED} for the last image, whose seed is seed + n - 1.")
    return [seed + k for k in range(n)]


def idempotency_key(message: SubmitRequest) -> str:
    """Return the idempotency key, "" without one; keys of different owners differ, as names have no slash."""
    key = message.idempotency_key
    return f"{message.owner}/{key}" if key and message.owner else key


def digest(message: SubmitRequest) -> str:
    """Return the digest of the body, which is equal for a retry."""
    output = message.output
    how = (output.format, output.fps, output.quality)
    body: tuple[object, ...] = (sorted(message.inputs.items()), message.seed, message.n, how)
    if output.metadata is not None:
        body += ("metadata", output.metadata)
    if message.model:
        body += (message.model,)
    if message.partial_images:
        body += (message.partial_images,)
    if message.remixed_from:
        body += (message.remixed_from,)
    if message.priority or message.deadline_s:
        body += (message.priority, message.deadline_s)
    if message.webhook_url:
        body += (message.webhook_url,)
    return hashlib.sha256(msgspec.json.encode(body)).hexdigest()


def _check_payload(inputs: Mapping[str, Input], signature: Signature, largest: int) -> None:
    """Raise ParameterError for images that pass from stage to stage and never fit a block of a pool."""
    for name in signature.passes_through:
        images = inputs.get(name)
        pixel_bytes = 1 if name in MASKS else 3
        if isinstance(images, Images) and sum(file.pixels for file in images.files) * pixel_bytes > largest:
            together = " together" if len(images.files) > 1 else ""
            limit = f"must have at most {largest // pixel_bytes} pixels{together}"
            raise ParameterError(
                name, f"{limit}: one stage passes them to the next, in at most {largest} bytes of a pool"
            )
    for name, value in inputs.items():
        if isinstance(value, Tensors) and value.file.nbytes > largest:
            raise ParameterError(name, f"must be at most {largest} bytes: one stage passes them to the next in a pool")
