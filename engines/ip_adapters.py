"""Load the IP adapters that lie beside a model: `ip_adapter/*.safetensors`, in the layout that they are published in.

No index speaks of them. Once one is loaded each request has to show it a picture, so that is done for the tasks that
are about one: those with a block that requires `ip_adapter_image`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from triptych.engines.panels import ModelError
from triptych.engines.split import Split

FOLDER: Final = "ip_adapter"
_PICTURE: Final = "ip_adapter_image"


def load_ip_adapters(pipeline: Any, split: Split, loaded: Collection[str]) -> None:
    """Load all adapters of a model, in the order of their names, where the task is about one.

    Args:
        pipeline: Of some panels.
        split: The model.
        loaded: Names of the components that are loaded; where the UNet is not among them, there is nothing to do.

    Raises:
        ModelError: There is no adapter, or it does not fit.
    """
    if not any(declared.name == _PICTURE and declared.required for declared in split.blocks.inputs):
        return
    files = sorted(path.name for path in (split.model / FOLDER).glob("*.safetensors"))
    if not files:
        raise ModelError(f"The model {split.model} has no IP adapter: its task needs {FOLDER}/*.safetensors in it.")
    if getattr(pipeline, "unet_name", "unet") not in loaded:
        return
    try:
        pipeline.load_ip_adapter(str(split.model), subfolder=FOLDER, weight_name=files, local_files_only=True)
    except Exception as error:  # Whatever a broken file makes the library raise, the user gets one sentence.
        raise ModelError(f"The IP adapter in {split.model / FOLDER} cannot be loaded: {error}") from error
