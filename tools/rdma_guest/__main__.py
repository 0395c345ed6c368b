"""Run a command in a QEMU guest that has a Soft-RoCE device, `rxe0`, and sees this host's files, read-only.

The guest runs Debian's kernel, since Soft-RoCE is a module of it (rdma-link(8)). It is emulated: not every virtual
machine has KVM. Kernel and drivers are downloaded with apt and unpacked, not installed. Writes go to its memory.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
MODULES: Final = ("virtio_pci", "virtio_net", "9pnet_virtio", "9p", "overlay", "crc32_generic", "rdma_rxe")
"""Kernel modules of the guest, without those that they need."""
PROGRAMS: Final = {"qemu-system-x86_64": "qemu-system-x86", "apt-get": "apt", "dpkg-deb": "dpkg", "rdma": "iproute2"}
"""Programs of the host that this needs, and the Debian package of each."""
EXAMPLE: Final = """\
example:
  python -m triptych.tools.rdma_guest rdma link
  python -m triptych.tools.rdma_guest .venv/bin/python -m pytest -m rdma tests/engines/transfer
"""


def main() -> int:
    """Parse the arguments, run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m triptych.tools.rdma_guest",
        description="Run a command in a QEMU guest that has a Soft-RoCE device.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", default="4G", help="memory of the guest (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="processors of the guest (default: all)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which it is ended (default: 900)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, in this folder")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("give a command to run in the guest")
    if missing := sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None}):
        print(f"Missing system packages. Type:  sudo apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "triptych" / "rdma-guest"
    kernel, initrd = boot_files(cache)
    return run(kernel, initrd, arguments.command, arguments.memory, arguments.cpus, arguments.timeout)


def boot_files(cache: Path) -> tuple[Path, Path]:
    """Return a kernel and an initial RAM disk, made in `cache` unless they are there."""
    package = newest_kernel()
    folder = cache / package
    kernel, initrd = folder / "vmlinuz", folder / "initrd"
    script = HERE / "init.sh"
    if not initrd.exists() or initrd.stat().st_mtime < script.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Unpacking {package} into {folder}.", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _make_boot_files(Path(scratch), package, kernel, initrd)
    return kernel, initrd


def newest_kernel() -> str:
    """Return the name of the package of Debian's newest kernel."""
    shown = _run("apt-cache", "depends", "linux-image-amd64")
    return next(line.split()[-1] for line in shown.decode().splitlines() if "Depends: linux-image-" in line)


def _make_boot_files(scratch: Path, package: str, kernel: Path, initrd: Path) -> None:
    packages = (package, "ibverbs-providers", "busybox-static")
    _run("apt-get", "download", "-qq", *packages, folder=scratch)
    unpacked, root = scratch / "unpacked", scratch / "root"
    for deb in scratch.glob("*.deb"):
        _run("dpkg-deb", "-x", deb, unpacked)
    (root / "bin").mkdir(parents=True)
    busybox = root / "bin" / "busybox"
    shutil.copy2(unpacked / "bin" / "busybox", busybox)
    shutil.copy2(HERE / "init.sh", root / "init")
    (root / "init").chmod(0o755)
    libraries = Path("usr/lib/x86_64-linux-gnu/libibverbs")
    drivers = Path("etc/libibverbs.d")
    for part in (libraries, drivers):
        shutil.copytree(unpacked / part, root / "upper" / part)
    version = package.removeprefix("linux-image-")
    _copy_modules(busybox, unpacked, root, version)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = _run(busybox, "cpio", "-o", "-H", "newc", folder=root, stdin=names.encode())
    shutil.copy2(unpacked / "boot" / f"vmlinuz-{version}", kernel)
    unfinished = initrd.with_suffix(".unfinished")
    unfinished.write_bytes(archive)
    unfinished.rename(initrd)


def _copy_modules(busybox: Path, unpacked: Path, root: Path, version: str) -> None:
    """Copy the modules of the guest, and those that they need."""
    _run(busybox, "depmod", "-b", unpacked, version)
    folder = Path("lib/modules") / version
    needs = dict(line.split(":", 1) for line in (unpacked / folder / "modules.dep").read_text().splitlines())
    paths = {Path(path).name.removesuffix(".ko"): path for path in needs}
    wanted, waiting = set[str](), [paths[name] for name in MODULES]
    while waiting:
        path = waiting.pop()
        if path not in wanted:
            wanted.add(path)
            waiting += needs[path].split()
    for path in wanted:
        (root / folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(unpacked / folder / path, root / folder / path)
    for index in (unpacked / folder).glob("modules.*"):
        shutil.copy2(index, root / folder)
    _run(busybox, "depmod", "-b", root, version)


def _run(*command: str | Path, folder: Path | None = None, stdin: bytes | None = None) -> bytes:
    """Run a program of this host; returns its output, raises subprocess.CalledProcessError if it fails."""
    return subprocess.run(command, cwd=folder, input=stdin, stdout=subprocess.PIPE, check=True).stdout  # noqa: S603 - no shell, own arguments


def run(kernel: Path, initrd: Path, command: Sequence[str], memory: str, cpus: int, timeout_s: float) -> int:
    """Boot the guest, run the command in the current folder, and return its exit status.

    Raises:
        subprocess.TimeoutExpired: The guest was ended after `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as share:
        path = f"export PATH={shlex.quote(os.environ['PATH'])} HOME=/tmp\n"
        (Path(share) / "command").write_text(f"{path}cd {shlex.quote(str(Path.cwd()))}\nexec {shlex.join(command)}\n")
        shared = "local,mount_tag={},path={},security_model=none"
        qemu = [
            "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", str(cpus), "-m", memory,
            "-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1",
            "-virtfs", shared.format("host", "/") + ",readonly=on,multidevs=remap",
            "-virtfs", shared.format("share", share),
            "-nic", "user,restrict=on,model=virtio", "-nographic", "-no-reboot",
        ]  # fmt: skip
        subprocess.run(qemu, stdin=subprocess.DEVNULL, check=True, timeout=timeout_s)  # noqa: S603 - the command runs inside
        status = Path(share) / "status"
        if not status.exists():
            print("The guest has ended before the command.", file=sys.stderr)
            return 1
        return int(status.read_text())


if __name__ == "__main__":
    sys.exit(main())
