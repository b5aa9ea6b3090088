# SPDX-License-Identifier: MIT
"""What the planner knows of devices: memory, bandwidth, peaks, and the wires between them.

Peaks are dense (no sparsity), from the vendors' data sheets: NVIDIA H100 and H200 Tensor Core GPU,
NVIDIA HGX B200, AMD Instinct MI350X and MI355X. Memory is what the driver leaves to programs.
Estimates of ours, to be replaced by measurements: every latency, `launch_s`, `runtime_bytes`, and
the shares of peak that good kernels reach. Of these, 0.9 of the bandwidth and 0.8 of the bf16 peak
were measured on an H200; the others are taken to be alike. Knows no models.
"""

from dataclasses import dataclass, field, replace

from tokenspeed.spmd.cost import Interconnect

GIB = 2**30
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator and how eight of them stand in a node."""

    name: str
    memory_bytes: float
    bandwidth: float  # bytes/s of memory, data sheet
    peaks: dict[str, float]  # FLOP/s by arithmetic: fp32, bf16, fp8, fp4
    link_bandwidth: float  # bytes/s out of one device into its node, all links together
    link_latency_s: float
    switched: bool = True  # False: a full mesh, each pair of devices has a link of its own
    node_size: int = 8
    network: Interconnect = field(default_factory=lambda: Interconnect(15e-6, 40e9))
    bandwidth_share: float = 0.9  # of data sheets, reached by good kernels
    compute_share: float = 0.8
    link_share: float = 0.8
    launch_s: float = 1.5e-6  # a kernel's start and end inside a captured graph
    runtime_bytes: float = 3 * GIB  # context, libraries, graphs, communication buffers
    source: str = "vendor data sheet"

    def bytes_per_s(self) -> float:
        return self.bandwidth * self.bandwidth_share

    def flops_per_s(self, arithmetic: str) -> float:
        """Reached FLOP/s; what a device lacks is computed in the next wider arithmetic it has."""
        order = ("fp4", "fp8", "bf16", "fp32")
        for name in order[order.index(arithmetic) :]:
            if name in self.peaks:
                return self.peaks[name] * self.compute_share
        raise ValueError(f"{self.name} has no peak for {arithmetic}")

    def interconnect(self, ranks: tuple[int, ...]) -> Interconnect:
        """Between the ranks of one group: the node's links, or the network between nodes."""
        if len({rank // self.node_size for rank in ranks}) > 1:
            return self.network
        peers = max(len(ranks) - 1, 1)
        links = 1.0 if self.switched else min(1.0, peers / (self.node_size - 1))
        return Interconnect(self.link_latency_s, self.link_bandwidth * links * self.link_share)


def _hopper(name: str, memory_gib: float, terabytes_per_s: float) -> Device:
    peaks = {"fp32": 67 * TERA, "bf16": 989 * TERA, "fp8": 1979 * TERA}
    return Device(name, memory_gib * GIB, terabytes_per_s * TERA, peaks, 450e9, 5e-6)


def _instinct(name: str, bf16: float) -> Device:
    """CDNA 4: fp8 is twice, fp4 four times bf16. Seven links of 76.8 GB/s, one to each peer."""
    peaks = {"fp32": 150 * TERA, "bf16": bf16, "fp8": 2 * bf16, "fp4": 4 * bf16}
    return Device(
        name,
        287.9 * GIB,
        8.0 * TERA,
        peaks,
        7 * 76.8e9,
        8e-6,
        switched=False,
        bandwidth_share=0.85,
        compute_share=0.7,
    )


DEVICES = {
    "h100": _hopper("H100 SXM", 79.1, 3.35),
    "h200": _hopper("H200 SXM", 139.8, 4.8),
    "b200": Device(
        "B200 SXM",
        178.3 * GIB,
        8.0 * TERA,
        {"fp32": 75 * TERA, "bf16": 2250 * TERA, "fp8": 4500 * TERA, "fp4": 9000 * TERA},
        900e9,
        5e-6,
    ),
    "mi350x": _instinct("MI350X", 2307 * TERA),
    "mi355x": _instinct("MI355X", 2517 * TERA),
}


def find_device(name: str, count: int = 1) -> Device:
    """A device by its short name. `ValueError` lists the names.

    `cpu` is a share of this machine, measured, as large as one of `count` processes gets.
    """
    if name == "cpu":
        from tokenspeed.planner.this_cpu import measure

        return measure(count)
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; known: {', '.join([*DEVICES, 'cpu'])}")
    return DEVICES[name]


def with_memory(device: Device, gib: float | None) -> Device:
    """The same device with other memory, for parts of a device and for what-if questions."""
    return device if gib is None else replace(device, memory_bytes=gib * GIB)
