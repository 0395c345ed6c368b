"""Row `machine`: the machine, what it lacks, and two figures that bound those of the other rows."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from triptych.engines.memory.arena import available_memory
from triptych.tools.gpu_report.row_context import RowContext

LIBRARIES: Final = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
WANTED: Final = {
    "av": "video",
    "mooncake": "transfer between hosts",
    "torchao": "quantization",
    "triton": "compile on a GPU",
    "pytest": "the row of the tests",
    "uvloop": "a faster event loop",
    "flash_attn": "attention backend flash",
    "flash_attn_interface": "attention backend _flash_3",
    "sageattention": "attention backend sage",
}
"""What a machine may lack, and what goes without it."""
_FIELDS: Final = ("name", "driver_version", "memory.total", "power.limit", "pcie.link.gen.max", "pcie.link.width.max")


def machine(context: RowContext) -> None:
    """Describe the machine, then multiply and copy."""
    context.value("processor", _processor(), note=f"{os.cpu_count()} cores")
    context.value("memory", available_memory() / 2**30, "GiB", "available")
    context.value("/dev/shm", shutil.disk_usage("/dev/shm").free / 2**30, "GiB", "free")  # noqa: S108 - a question
    context.value("kernel", platform.release())
    context.value("python", platform.python_version())
    for name in LIBRARIES:
        context.value(name, _version(name))
    absent = [f"{name} ({what})" for name, what in WANTED.items() if importlib.util.find_spec(name) is None]
    context.value("not installed", ", ".join(absent) or "nothing")
    if context.cuda:
        _gpu(context)
    _ceilings(context)


def _gpu(context: RowContext) -> None:
    import torch

    properties = torch.cuda.get_device_properties(context.device)
    context.value("GPU", properties.name, note=f"{properties.multi_processor_count} multiprocessors")
    context.value("GPU memory", properties.total_memory / 2**30, "GiB")
    context.value("CUDA of torch", str(torch.version.cuda))
    found = nvidia_smi(f"--query-gpu={','.join(_FIELDS)}")
    context.value("nvidia-smi", found or "does not answer", note=", ".join(_FIELDS))


def _ceilings(context: RowContext) -> None:
    import torch

    side = 8192 if context.cuda else 256
    left, right = (torch.randn(side, side, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = context.median(lambda: left @ right, 10)
    context.value("bfloat16 matrix product", 2 * side**3 / seconds / 1e12, "TFLOP/s", f"{side} x {side}, random values")
    nbytes = min(4 << 30, torch.cuda.mem_get_info(context.device)[0] // 8) if context.cuda else 16 << 20
    source = torch.zeros(nbytes, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    seconds = context.median(lambda: target.copy_(source), 5)
    context.value("copy on the device", 2 * source.numel() / seconds / 1e9, "GB/s", "bytes read and written")


def nvidia_smi(query: str) -> str:
    """Return what `nvidia-smi` answers to a query as one line for each row of it; "" where it does not."""
    try:
        answer = subprocess.run(  # noqa: S603 - our own command
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],  # noqa: S607 - where it is differs
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
