"""What routers and gateways ask a server about itself: SGLang's /server_info and /model_info, vLLM's /version.

They also read `/health`, `/v1/models` and the two gauges `vllm:num_requests_...` of `/metrics`.
"""

from __future__ import annotations

import importlib.metadata
from typing import Final, Literal

import msgspec

from triptych.api.operations import operation
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest
from triptych.engines.parameters.schema import IMAGE_KINDS
from triptych.roles.messages.requests import ModelDescription

VERSION: Final = importlib.metadata.version("triptych")
_MADE: Final = {"image": "I", "video": "V", "audio": "A"}


class Version(msgspec.Struct):
    """vLLM's answer."""

    version: str


class ServerInfo(msgspec.Struct):
    """SGLang's answer: which model a worker has. Of several models, the one of requests that name none."""

    model_path: str
    """The name of the model; where its files are is nobody's business."""
    served_model_name: str
    tp_size: int
    """1: to a client this is one worker, whatever it consists of."""
    dp_size: int
    version: str


class ModelInfo(msgspec.Struct):
    """SGLang's answer: what that model can do."""

    model_path: str
    is_generation: bool
    model_type: Literal["diffusion"]
    architectures: list[str] | None
    has_image_understanding: bool
    """Whether it takes images."""
    has_audio_understanding: bool
    task_type: str
    """SGLang's short name, such as T2I: from text (T), images (I) or either (TI) to image (I), video (V), sound (A)."""
    is_image_gen: bool


@operation({200: Version})
async def get_version(_: ApiRequest) -> JSONResponse:
    """Say which version this is."""
    return JSONResponse(Version(VERSION))


@operation({200: ServerInfo}, (503,))
async def get_server_info(request: ApiRequest) -> JSONResponse:
    """Describe the server as one of SGLang's workers."""
    model = await request.state["services"].head.describe("")
    return JSONResponse(ServerInfo(model.name, model.name, tp_size=1, dp_size=1, version=VERSION))


@operation({200: ModelInfo}, (503,))
async def get_model_info(request: ApiRequest) -> JSONResponse:
    """Describe the model as SGLang does."""
    return JSONResponse(model_info(await request.state["services"].head.describe("")))


def model_info(model: ModelDescription) -> ModelInfo:
    """Describe a model as SGLang does."""
    images = [parameter for parameter in model.parameters if parameter.kind in IMAGE_KINDS]
    needs_images = bool(model.tasks) and all(
        any(parameter.name in task.requires for parameter in images) for task in model.tasks
    )
    from_ = "I" if needs_images else "TI" if images else "T"
    return ModelInfo(
        model_path=model.name,
        is_generation=True,
        model_type="diffusion",
        architectures=None,
        has_image_understanding=bool(images),
        has_audio_understanding=False,
        task_type=f"{from_}2{_MADE[model.medium]}",
        is_image_gen=model.medium == "image",
    )
