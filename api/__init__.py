"""The HTTP API: OpenAI's images and videos, and the state of the system, on Starlette and uvicorn.

Other packages use `client` and `launch`, which call the API from Python, `keys`, and `server`, the component.
The rest handles requests.
"""
