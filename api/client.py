"""A small client of the HTTP API, for the command and for `launch`."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from triptych.roles.media.formats import FORMAT_OF_ENDING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from PIL.Image import Image

GENERATE_TIMEOUT_S: Final = 3600.0
KEY_VARIABLE: Final = "TRIPTYCH_API_KEY"
_CONNECT_TIMEOUT_S: Final = 5.0
_READ_TIMEOUT_S: Final = 10.0


class ClientError(Exception):
    """The API cannot be reached, or it answered with an error; `str()` is a sentence."""


_MAGIC: Final = {"PNG": b"\x89PNG", "JPEG": b"\xff\xd8\xff"}
"""First bytes of what a notebook shows by itself."""


@dataclass(frozen=True, repr=False)
class GeneratedImage:
    """One image that the API has made, or what the model makes instead."""

    data: bytes
    """The encoded file, a PNG unless the model makes something else."""
    request_id: str
    """Id of the request, as the logs of every process name it."""
    nsfw_content_detected: bool | None = None
    """True: the safety checker of the model has made it black; None where the model has none."""

    def __repr__(self) -> str:
        return f"<GeneratedImage of {len(self.data)} bytes, request {self.request_id}>"

    def _repr_png_(self) -> bytes | None:
        return self.data if self.data.startswith(_MAGIC["PNG"]) else None

    def _repr_jpeg_(self) -> bytes | None:
        return self.data if self.data.startswith(_MAGIC["JPEG"]) else None

    def save(self, path: Path | str) -> Path:
        """Write the file as it came."""
        file = Path(path)
        file.write_bytes(self.data)
        return file

    def image(self) -> Image:
        """Decode it with Pillow."""
        import io

        from PIL import Image

        return Image.open(io.BytesIO(self.data))


def request_body(
    prompt: str | None,
    *,
    size: str | None,
    steps: int | None,
    seed: int | Sequence[int] | None,
    extra: Mapping[str, object],
    n: int | None = None,
) -> dict[str, object]:
    """Make the JSON body of `POST /v1/images/generations`; what is None is left to the model's defaults.

    A path or bytes among `extra`, or a list of those, is an image; raises OSError when it cannot be read.
    """
    several = None if seed is None or isinstance(seed, int) else list(seed)
    images = {name: _encoded(value) for name, value in extra.items()}
    given = {
        "prompt": prompt,
        "size": size,
        "num_inference_steps": steps,
        "seed": seed if several is None else several,
        **images,
    }
    body: dict[str, object] = {"n": n or len(several or (0,)), "response_format": "b64_json"}
    return body | {key: value for key, value in given.items() if value is not None}


def _encoded(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, Path):
        value = value.read_bytes()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def format_of(path: Path) -> str | None:
    """Return the output format that the ending of a file's name asks for; None where it asks for none."""
    return FORMAT_OF_ENDING.get(path.suffix.lower().removeprefix("."))


def read_images(response: httpx.Response, n: int) -> list[GeneratedImage]:
    """Return the `n` images of an answer to `POST /v1/images/generations`; raises `ClientError`."""
    answer = read_json(response)
    request_id = str(answer.get("id", ""))
    try:
        rows = [answer["data"][index] for index in range(n)]
        data = [base64.b64decode(row["b64_json"], validate=True) for row in rows]
    except (KeyError, IndexError, TypeError, binascii.Error) as error:
        raise ClientError(f"{response.url} answered without an image ({error!r})") from error
    return [
        GeneratedImage(one, request_id, row.get("nsfw_content_detected")) for one, row in zip(data, rows, strict=True)
    ]


def read_json(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of an answer; raises `ClientError` with the server's own message when it is an error."""
    try:
        answer = response.json()
    except ValueError as error:
        raise ClientError(f"{response.url} answered {response.status_code} and no JSON: is it Triptych?") from error
    if response.is_success and isinstance(answer, dict):
        return answer
    raise ClientError(_message(answer) or f"{response.url} answered {response.status_code}")


def summarize_causes(causes: Iterable[str]) -> str:
    """Return the causes of a failure in one line: of each its last line, since a traceback may come before it."""
    return "; ".join(dict.fromkeys(cause.strip().splitlines()[-1] for cause in causes if cause.strip()))


def authorization(key: str) -> dict[str, str]:
    """Return the header of requests with an API key; nothing without a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def timeout(read_s: float = _READ_TIMEOUT_S) -> httpx.Timeout:
    """Return a timeout: short for connecting, `read_s` seconds for the answer."""
    return httpx.Timeout(read_s, connect=_CONNECT_TIMEOUT_S)


def unreachable(url: str, error: httpx.HTTPError) -> ClientError:
    """Make the error of an API that cannot be reached."""
    if isinstance(error, httpx.TimeoutException):
        return ClientError(f"{url} does not answer in time")
    return ClientError(f"{url} cannot be reached ({error or type(error).__name__}): is `triptych up` running?")


def _message(answer: object) -> str:
    if not isinstance(answer, dict) or not isinstance(answer.get("error"), dict):
        return ""
    return str(answer["error"].get("message", ""))  # it names the field
