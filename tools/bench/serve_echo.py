"""Ray Serve's echo: run by `bench http` with an interpreter that has Ray, `serve_echo.py PORT FOLDER`.

It prints "ready" once it answers, and ends when its standard input does. It imports nothing of ours, since Ray is in an
environment of its own: it needs other versions of libraries than we do.
"""

from __future__ import annotations

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_ENABLE_TASK_EVENTS"] = "0"

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse


class Echo:
    """Reads the JSON of a request, and answers 202 with it."""

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer one request."""
        return JSONResponse(await request.json(), status_code=202)


def main() -> None:
    """Serve until the standard input ends."""
    port, folder = int(sys.argv[1]), sys.argv[2]
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=128 << 20,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
    quiet = {"log_level": "ERROR"}
    options = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0}, "logging_config": quiet}
    serve.run(serve.deployment(**options)(Echo).bind(), route_prefix="/")
    print("ready", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
