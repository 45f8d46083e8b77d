"""What the machine is, how busy it is, and how fast it multiplies matrices."""

import os
import platform
import time
from pathlib import Path

INTERESTING = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


MAKERS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}


def _fields() -> dict[str, str]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in info.splitlines() if ":" in line}


def maker() -> str:
    """Who made the processor: kernels differ by that more than by anything else."""
    return MAKERS.get(_fields().get("vendor_id", ""), "other")


def facts() -> dict:
    """Cores, processor, the flags that matter, memory, load."""
    field = _fields()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "processor": field.get("model name", platform.processor()),
        "family": field.get("cpu family", ""),
        "flags": [flag for flag in INTERESTING if flag in field.get("flags", "").split()],
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def rates(size: int = 2048, times: int = 7) -> dict[str, float]:
    """GFLOP per second of CPU time of a large square product, best of `times`: BLAS, oneDNN, bfloat16."""
    import torch
    from torch.nn import functional as F

    a, b = torch.randn(size, size), torch.randn(size, size)
    a16, b16 = a.bfloat16(), b.bfloat16()
    kinds = {
        "float32, PyTorch's own choice": lambda: F.linear(a, b),
        "float32, oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
        "bfloat16": lambda: F.linear(a16, b16),
    }
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(times):
        for name, run in kinds.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return {name: round(2 * size**3 / seconds / 1e9, 1) for name, seconds in best.items()}
