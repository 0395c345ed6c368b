"""The topology: which processes there are, where they are found and with which options they run; read from TOML.

`sections` documents every key of the file; `paths` says where a system keeps its sockets and its state.
"""

from triptych.actors.topology._agreement import agreement
from triptych.actors.topology._demands import gpu_count, stop_bound_s
from triptych.actors.topology._hosts import bind_host, is_ip, is_loopback, is_network
from triptych.actors.topology._model_identity import ModelIdentity
from triptych.actors.topology._model_report import ModelProblem, ModelReport, ModelSummary
from triptych.actors.topology._model_source import INDEX_FILES, WEIGHT_SUFFIXES, ModelSource, find_source, snapshot
from triptych.actors.topology._parser import load_toml
from triptych.actors.topology._pools import INCOMING, largest_payload, pool_zones
from triptych.actors.topology._topology import Component, Model, Topology, load_topology
from triptych.actors.topology._writer import (
    for_device,
    free_port,
    generate_topology,
    rebase_models,
    relative_model_path,
    topology_file_name,
    write_with_overrides,
)
from triptych.actors.topology.sections import (
    DENOISING_KINDS,
    STAGES,
    ApiSection,
    EmbeddingSection,
    HeadSection,
    HostSection,
    LoraSection,
    ModelSection,
    RoleSection,
    StoreSection,
    TransferSection,
    WebhooksSection,
    parse_rate,
    parse_size,
)

__all__ = [
    "DENOISING_KINDS",
    "INCOMING",
    "INDEX_FILES",
    "STAGES",
    "WEIGHT_SUFFIXES",
    "ApiSection",
    "Component",
    "EmbeddingSection",
    "HeadSection",
    "HostSection",
    "LoraSection",
    "Model",
    "ModelIdentity",
    "ModelProblem",
    "ModelReport",
    "ModelSection",
    "ModelSource",
    "ModelSummary",
    "RoleSection",
    "StoreSection",
    "Topology",
    "TransferSection",
    "WebhooksSection",
    "agreement",
    "bind_host",
    "find_source",
    "for_device",
    "free_port",
    "generate_topology",
    "gpu_count",
    "is_ip",
    "is_loopback",
    "is_network",
    "largest_payload",
    "load_toml",
    "load_topology",
    "parse_rate",
    "parse_size",
    "pool_zones",
    "rebase_models",
    "relative_model_path",
    "snapshot",
    "stop_bound_s",
    "topology_file_name",
    "write_with_overrides",
]
