"""Load the IP adapters that lie beside a model: `ip_adapter/*.safetensors`, in the layout that they are published in.

No index speaks of them. Once one is loaded each request has to show it an image, so that is done for the tasks that
are about one: those with a block that requires `ip_adapter_image`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from triptych.engines.partition.blocks import ModularPartition
from triptych.engines.partition.stages import ModelError

FOLDER: Final = "ip_adapter"
_IMAGE: Final = "ip_adapter_image"


def load_ip_adapters(pipeline: Any, partition: ModularPartition, loaded: Collection[str]) -> None:
    """Load all adapters of a model, in the order of their names, where the task is about one.

    Args:
        pipeline: Of some stages.
        partition: The model.
        loaded: Names of the components that are loaded; where the UNet is not among them, there is nothing to do.

    Raises:
        ModelError: There is no adapter, or it does not fit.
    """
    if not any(declared.name == _IMAGE and declared.required for declared in partition.blocks.inputs):
        return
    files = sorted(path.name for path in (partition.model / FOLDER).glob("*.safetensors"))
    if not files:
        raise ModelError(f"The model {partition.model} has no IP adapter: its task needs {FOLDER}/*.safetensors in it.")
    if getattr(pipeline, "unet_name", "unet") not in loaded:
        return
    try:
        pipeline.load_ip_adapter(str(partition.model), subfolder=FOLDER, weight_name=files, local_files_only=True)
    except Exception as error:  # Whatever a broken file makes the library raise, the user gets one sentence.
        raise ModelError(f"The IP adapter in {partition.model / FOLDER} cannot be loaded: {error}") from error
