"""GPUs, the networks between them, and what they cost.

Every number is of a data sheet, published, or an assumption that is called one. None was measured by this project.
"""

from dataclasses import dataclass

GEMM_SHARE = 0.607
"""Of the peak that matrix products reach: 600 of an H100's 989 TFLOP/s. Assumed, also of the other GPUs."""
ATTENTION_SHARE = 0.16
"""Of the peak that attention reaches with heads of 72, which run as 96: 6 ms for XL/2 at 32 images. Assumed."""
MEMORY_SHARE = 0.836
"""Of the memory's bandwidth that elementwise kernels reach: 2.8 of an H100's 3.35 TB/s. Assumed."""
NETWORK_SHARE = 0.8
"""Of the network's bandwidth that collectives reach. Assumed."""
LAUNCH_S = 4.5e-6
"""To launch a kernel from eager PyTorch. Assumed."""
HOST_COPY = 20e9
"""Bytes a second from a GPU to page-locked memory, over PCIe 4.0 x16. Assumed (docs/checkpoints.md)."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, eight of which are a node.

    Attributes:
        peak: dense bf16 operations a second.
        memory: bytes.
        bandwidth: of that memory, bytes a second.
        units: streaming multiprocessors.
        bus: bytes a second of a collective within a node, as nccl-tests count its bus bandwidth.
        network: bytes a second of a node to others.
        on_demand: dollars an hour, from and to; None where no price was found.
        spot: the same of machines that may be taken away.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    units: int
    bus: float
    network: float
    on_demand: tuple[float, float] | None = None
    spot: tuple[float, float] | None = None


# Peaks, memories, bandwidths and units: NVIDIA's data sheets, dense and without sparsity. bus: 380 GB/s of an H100's
# NVLink is assumed; A100 and H800 have 600 and 400 of its 900 GB/s. network: p4d and p5 have 400 and 3,200 Gbit/s a
# node (AWS). An H800's is taken to be an H100's.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 80e9, 2.04e12, 108, 230e9, 50e9, on_demand=(1.50, 3.00)),
        Gpu("h100", 989e12, 80e9, 3.35e12, 132, 380e9, 400e9, on_demand=(3.00, 3.90), spot=(2.00, 2.50)),
        Gpu("h200", 989e12, 141e9, 4.80e12, 132, 380e9, 400e9, on_demand=(4.50, 7.00)),
        Gpu("h800", 989e12, 80e9, 3.35e12, 132, 170e9, 400e9),
    )
}
PRICES = "of 2026: H100 March (costnimbus.com), A100 and H200 May (mercatus-ai.com); second hand, check your own"
FAILURE_HOURS = 50_000.0
"""Hours between failures of one GPU: 419 in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783)."""
