"""The HTTP face: OpenAI's images API and the system's own health, on Starlette and uvicorn."""
