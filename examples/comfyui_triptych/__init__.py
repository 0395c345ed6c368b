"""A node of ComfyUI that has a Triptych make the images: copy this folder to ComfyUI's `custom_nodes`.

It needs nothing that ComfyUI does not have. An API key is read from the environment variable TRIPTYCH_API_KEY, so
that no workflow has it.
"""

from .nodes import TriptychGenerate

NODE_CLASS_MAPPINGS = {"TriptychGenerate": TriptychGenerate}
NODE_DISPLAY_NAME_MAPPINGS = {"TriptychGenerate": "Triptych: generate"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
