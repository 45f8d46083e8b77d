"""A few queries over many keys at nearly the speed of memory, by C that the machine compiles once (reading.c).

The C calls the same threads as PyTorch, and nothing else. Without a compiler, PyTorch reads (headwise/pieces.py).
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from headwise.writing import home, write_aside

SOURCE = Path(__file__).with_name("reading.c")
# Sums may be taken in any order; -ffast-math would flush small numbers to zero as well, in the whole process.
FLAGS = ("-std=c99", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math")
FLAGS += ("-fno-signed-zeros", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
if platform.machine() == "x86_64":
    FLAGS += ("-mprefer-vector-width=512",)
# As in reading.c: rows of queries for one KV head (PyTorch is faster at more), and channels of a head.
ROWS, WIDEST = 8, 256
# Keys of a piece at least.
LEAST = 128
# From so many tasks a thread on, none waits long for another.
MANY = 4
SECONDS = 120
_building = threading.Lock()


class _Reading(ctypes.Structure):
    """`struct reading` of reading.c."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "z")]
        + [(name, ctypes.c_long) for name in ("batch", "heads", "rows", "keys", "size", "size_v")]
        + [(f"{of}_{by}", ctypes.c_long) for of in "kv" for by in ("batch", "head", "key")]
        + [(name, ctypes.c_long) for name in ("pieces", "threads")]
        + [("scale", ctypes.c_float)]
    )


def available() -> bool:
    """Whether this machine has a compiler whose work gives what PyTorch gives; the first call compiles."""
    return _library() is not None


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `read` can read these: float32 on a CPU, few queries, nothing to differentiate, and a compiler."""
    if not (type(q) is type(k) is type(v) is Tensor and q.is_cpu and k.is_cpu and v.is_cpu):
        return False
    if not (q.dtype is k.dtype is v.dtype is torch.float32 and k.stride(3) == v.stride(3) == 1):
        return False
    if q.shape[2] > ROWS or q.shape[3] > WIDEST or v.shape[3] > WIDEST or torch.compiler.is_compiling():
        return False
    slopes = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return not slopes and available()


def read(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention over all keys: q [B, H, Q, d], k [B, H, K, d] and v [B, H, K, dv] -> z [B, H, Q, dv], float32.

    Of what `serves`: q may lie anyhow, k and v without gaps in the last axis. Raises RuntimeError at too many rows.
    """
    library = _library()
    assert library is not None
    return _call(library, q, k, v, q.shape[3] ** -0.5 if scale is None else scale)


def _call(library: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    (batch, heads, rows, size), (keys, size_v) = q.shape, v.shape[2:]
    threads = torch.get_num_threads()
    count = pieces(batch * heads, keys, threads)
    z = q.new_empty(batch, heads, rows, size_v)
    q = q.contiguous()
    given = _Reading(
        *(one.data_ptr() for one in (q, k, v, z)),
        *(batch, heads, rows, keys, size, size_v, *k.stride()[:3], *v.stride()[:3]),
        *(count, threads, scale),
    )
    if library.headwise_read(ctypes.byref(given)):
        raise RuntimeError(f"{rows} queries of {size} channels for {heads} KV heads cannot be read: see `serves`.")
    return z


def pieces(heads: int, keys: int, threads: int, least: int = LEAST) -> int:
    """In how many pieces of at least so many keys those of a head are read, so that all threads have the same work."""
    if heads >= MANY * threads:
        return 1
    return max(1, min(threads // math.gcd(heads, threads), keys // least))


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled C, once it has given what PyTorch gives; None where it cannot be had."""
    name = os.environ.get("HEADWISE_CC", "cc")
    compiler = shutil.which(name) if name else None
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    try:
        file = home() / "compiled" / f"reading-{_digest(compiler)}.so"
        with _building:
            if not file.exists():
                write_aside(file, lambda aside: _compile(compiler, aside))
        library = ctypes.CDLL(str(file))
        library.headwise_read.argtypes, library.headwise_read.restype = [ctypes.POINTER(_Reading)], ctypes.c_int
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    return library if _agrees(library) else None


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether it gives what attention is, on a few numbers of every size that has loops of its own."""
    for size in (40, 64, 128):
        about = {"dtype": torch.float32, "device": "cpu"}
        q, k, v = (torch.linspace(-9, 9, 2 * n * size, **about).sin().view(1, 2, n, size) for n in (7, 300, 300))
        expected = (q @ k.transpose(2, 3)).softmax(3) @ v
        if not torch.allclose(_call(library, q, k, v, 1.0), expected, atol=1e-5):
            return False
    return True


def _compile(compiler: str, to: Path) -> None:
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(to), "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)


def _digest(compiler: str) -> str:
    """Of everything that the compiled file depends on: a home may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    about = [one for one in info.read_text().splitlines() if one.startswith(("flags", "Features"))][:1]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=SECONDS).stdout
    told = "\n".join([SOURCE.read_text(), *FLAGS, compiler, platform.machine(), *about])
    return hashlib.sha256(told.encode() + version).hexdigest()[:16]
