"""The HTTP API: OpenAI's images and videos, and the state of the system, on Starlette and uvicorn."""
