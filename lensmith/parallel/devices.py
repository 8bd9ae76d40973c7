"""Devices and links that a scaling plan knows, with what their makers state (docs/scaling.md names the sources)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lensmith.core.errors import ConfigError

Number = Literal["float32", "bfloat16", "float16"]
GIB, GB, TERA = 1 << 30, 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """One device of a node. Rates are per second and as stated; `*_share` is what good code gets of them."""

    name: str
    peak: Mapping[Number, float]
    """FLOPs of dense matrix products."""
    memory_bytes: int
    bandwidth: float
    """Bytes to and from its memory."""
    link: float
    """Bytes that it sends to the others of its node, in one direction."""
    network: float
    """Bytes that it sends to other nodes, in one direction."""
    per_node: int = 8
    launch_seconds: float = 5e-6
    """From one operation to the next, where each is started by the host."""
    peak_share: float = 0.7
    bandwidth_share: float = 0.8
    link_share: float = 0.8
    hop_seconds: float = 5e-6
    """From one rank to the next, however little is sent."""
    overlaps: bool = True
    """Whether it computes while it sends."""


DEVICES: dict[str, Device] = {
    "h100": Device("NVIDIA H100 SXM", {"float32": 67 * TERA, "bfloat16": 989 * TERA, "float16": 989 * TERA},
                   80 * GIB, 3350 * GB, 450 * GB, 50 * GB),
    "h200": Device("NVIDIA H200 SXM", {"float32": 67 * TERA, "bfloat16": 989 * TERA, "float16": 989 * TERA},
                   round(141 * GB), 4800 * GB, 450 * GB, 50 * GB),
    "a100": Device("NVIDIA A100 SXM 80 GB", {"float32": 19.5 * TERA, "bfloat16": 312 * TERA, "float16": 312 * TERA},
                   80 * GIB, 2039 * GB, 300 * GB, 25 * GB),
    "l40s": Device("NVIDIA L40S", {"float32": 91.6 * TERA, "bfloat16": 362 * TERA, "float16": 362 * TERA},
                   48 * GIB, 864 * GB, 32 * GB, 25 * GB),
    "4090": Device("NVIDIA RTX 4090", {"float32": 82.6 * TERA, "bfloat16": 165.2 * TERA, "float16": 165.2 * TERA},
                   24 * GIB, 1008 * GB, 16 * GB, 3.125 * GB),
}  # fmt: skip
"""The 4090's link: PCIe without peer access, so through the host's memory."""
CPU = "cpu"
"""This machine, whose figures are measured when they are asked for."""


def device(name: str) -> Device:
    """Raises `ConfigError` DEVICE."""
    if name not in DEVICES:
        known = ", ".join([*DEVICES, CPU])
        raise ConfigError("DEVICE", f"no figures are known of a device {name!r}", remedy=f"known: {known}")
    return DEVICES[name]
