"""Where the stores of a system keep their files, and whether a component has them at hand."""

from __future__ import annotations

from triptych.actors import Component, Topology
from triptych.actors.topology import parse_size
from triptych.actors.topology.sections import S3_SCHEME
from triptych.roles.media.files import Files, LocalFiles
from triptych.roles.media.retention import StoreBounds
from triptych.roles.media.s3 import S3Files

UPLOAD_TO_SUBMIT_S = 60.0
"""Most seconds from when an image is kept to when its request is accepted."""


def store_files(topology: Topology, name: str) -> Files:
    """Return what keeps the files of a store, for those that `reaches_store`.

    Args:
        topology: Of the system.
        name: Of the store: `ARTIFACTS` or `UPLOADS`.
    """
    if topology.store.url.startswith(S3_SCHEME):
        return S3Files(f"{topology.store.url.rstrip('/')}/{name}")
    if folder := topology.store.folder:
        return LocalFiles(folder / name, shared=True)
    return LocalFiles(topology.state_dir / name)


def reaches_store(component: Component, topology: Topology) -> bool:
    """Return whether a component reads and writes the stores itself; else it asks the API's process."""
    return bool(topology.store.url) or component.host == topology.head_host


def has_store(component: Component, topology: Topology) -> bool:
    """Return whether the stores are folders of this host alone, so that reading them needs no network."""
    return not topology.store.url and component.host == topology.head_host


def upload_bounds(topology: Topology) -> tuple[StoreBounds, float]:
    """Return the bounds of an upload store, and for how many seconds a request may need an upload."""
    state = topology.state
    # A request is submitted right after its images, and has ended once its time is over.
    needed_s = topology.head.request_timeout_s + UPLOAD_TO_SUBMIT_S
    limits = StoreBounds(needed_s + state.keep_uploads_s, state.max_uploads, parse_size(state.max_uploads_size))
    return limits, needed_s
