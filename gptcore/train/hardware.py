"""What the machine can do: devices, memory, and the share of its peak that a run reaches."""

from __future__ import annotations

import sys
import time

import torch

# Dense peaks of the makers' data sheets, TFLOP/s: bfloat16 matrix products, float32 outside the matrix units.
# The first name that the device's name holds counts.
_PEAKS = {
    "B200": (2250.0, 75.0),
    "GH200": (989.4, 66.9),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.5, 60.0),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "MI300X": (1307.4, 163.4),
    "MI250X": (383.0, 47.9),
}


def find_device(name: str) -> torch.device:
    """The device of that name; auto is a GPU where there is one.

    Raises:
        ValueError: a device that is not usable here; says why.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a PyTorch built without CUDA
        raise ValueError(f"device: got {name!r}, which is not usable here ({str(error).splitlines()[0]})") from error
    return torch.device(name)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products: without them autocast only costs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("sve_bf16"))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has taken at most: of the GPU's memory there, of the machine's on a CPU (0: not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def listed_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that the maker states for the GPU called `name`, dense; None for one that is not in the table."""
    peaks = next((peaks for part, peaks in _PEAKS.items() if part in name), None)
    return peaks and 1e12 * peaks[0 if dtype == torch.bfloat16 else 1]


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a product of two square matrices: the best of six, for other processes take their share of some."""
    own = torch.Generator(device).manual_seed(0)  # the run's random numbers stay where they are
    a, b = torch.randn(2, size, size, device=device, generator=own).to(dtype)
    seconds = []
    torch.mm(a[:256], b)  # starts threads and libraries
    for _ in range(6):
        start = time.perf_counter()
        product = a @ b
        float(product[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that one device can reach at most in `dtype`, and where the figure is from, for people to read."""
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        if listed := listed_peak(gpu, dtype):
            return listed, f"{listed / 1e12:,.0f} {name} TFLOP/s, dense, stated for {gpu}"
    peak = measured_peak(device, dtype, 8192 if device.type == "cuda" else 2048)
    return peak, f"{peak / 1e9:,.0f} {name} GFLOP/s, measured with one matrix product"


def model_flops_utilization(flops_per_second: float, peak: float) -> float:
    """MFU: the share of the peak that the model's own operations take, whatever else is computed.

    ``flops_per_second / peak``, with `peak` the FLOP/s of all devices together and the model's operations as `Model.flops`
    counts them.

    Source: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv 2204.02311, appendix B.
    """
    return flops_per_second / peak
