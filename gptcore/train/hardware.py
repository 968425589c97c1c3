"""The machine: devices, memory, peak speed, and the share of it that a run reaches (MFU)."""

from __future__ import annotations

import sys
import time

import torch

# Dense peaks from data sheets, TFLOP/s: bfloat16 matrix products, float32 outside the matrix units. The first name that is
# part of the device's name is taken.
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
    """Returns the device of that name; auto is a GPU if there is one.

    Raises:
        ValueError: the device is not usable here; says why.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a PyTorch built without CUDA
        raise ValueError(f"device: got {name!r}, which is not usable here ({str(error).splitlines()[0]})") from error
    return torch.device(name)


def multiplies_bf16(device: torch.device) -> bool:
    """Returns whether the hardware multiplies bfloat16; without that autocast is only slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("sve_bf16"))


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory of this process in bytes: of the GPU's tensors, or of the whole process on a CPU; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def listed_peak(name: str, dtype: torch.dtype) -> float | None:
    """Returns the dense FLOP/s in the data sheet of the GPU called `name`; None for a GPU that is not in the table."""
    peaks = next((peaks for part, peaks in _PEAKS.items() if part in name), None)
    return peaks and 1e12 * peaks[0 if dtype == torch.bfloat16 else 1]


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Measures the FLOP/s of a product of two square matrices: the best of six runs, as other processes slow some down."""
    own = torch.Generator(device).manual_seed(0)  # leaves the run's random state unchanged
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
    """Returns the peak FLOP/s of one device in `dtype`, and a text for people that says where the figure is from."""
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        if listed := listed_peak(gpu, dtype):
            return listed, f"{listed / 1e12:,.0f} {name} TFLOP/s, dense, stated for {gpu}"
    peak = measured_peak(device, dtype, 8192 if device.type == "cuda" else 2048)
    return peak, f"{peak / 1e9:,.0f} {name} GFLOP/s, measured with one matrix product"


def model_flops_utilization(flops_per_second: float, peak: float) -> float:
    """Returns ``flops_per_second / peak``: the model's operations (`Model.flops`) a second over the peak of all devices.

    Operations beyond the model's, such as recomputation, do not count.

    Source: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv 2204.02311, appendix B.
    """
    return flops_per_second / peak
