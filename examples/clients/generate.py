"""An image with OpenAI's client, with partial images as they come: generate.py PROMPT FILE."""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

prompt, file = sys.argv[1], Path(sys.argv[2])
url = os.environ.get("TRIPTYCH_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("TRIPTYCH_API_KEY") or "none")

# What OpenAI's API does not have goes into extra_body: seed, num_inference_steps, guidance_scale, ...
for event in client.images.generate(prompt=prompt, stream=True, partial_images=2, extra_body={"seed": 7}):
    if event.type == "image_generation.partial_image":
        file.with_stem(f"{file.stem}.{event.partial_image_index}").write_bytes(base64.b64decode(event.b64_json))
    elif event.type == "image_generation.completed":
        file.write_bytes(base64.b64decode(event.b64_json))
