"""Where tensors live: the only place of the package that chooses or names a device."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import torch

_share: dict[str, float] = {}
_CPUINFO = Path("/proc/cpuinfo")


def use_gpus(share: float) -> None:
    """Tell this process its share of GPUs, as its scheduler assigned it.

    Args:
        share: GPUs, may be a fraction; 0 keeps the process on the CPU even where a GPU is visible.
    """
    _share["gpus"] = share


def device() -> torch.device:
    """Return the device of this process: the first visible GPU, or the CPU where there is none or none was assigned."""
    if _share.get("gpus", 1.0) > 0 and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def use_threads(cpus: float) -> None:
    """Let torch use as many threads as this process has CPUs.

    Args:
        cpus: CPUs assigned to the process; a fraction is rounded down, to at least one thread.
    """
    torch.set_num_threads(max(1, int(cpus)))


def native_bfloat16(where: torch.device) -> bool:
    """Whether a device computes bfloat16 itself, so that autocast is faster than float32 there.

    Emulated bfloat16 is slower than float32: a CPU needs AVX512-BF16 or AMX (x86) or the BF16 extension (Arm), a GPU
    compute capability 8.0.
    """
    if where.type == "cuda":
        return torch.cuda.get_device_capability(where)[0] >= 8
    return where.type == "cpu" and _cpu_bfloat16()


@lru_cache(maxsize=1)
def _cpu_bfloat16() -> bool:
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:  # no Linux: nothing to read the flags from
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def fused_optimizers(where: torch.device) -> bool:
    """Whether torch updates all weights in one kernel there."""
    return where.type in {"cpu", "cuda"}


def fork_devices(where: torch.device) -> list[int]:
    """Return the GPU indices whose random state ``torch.random.fork_rng`` must save for work on ``where``."""
    if where.type != "cuda":
        return []
    return [where.index if where.index is not None else torch.cuda.current_device()]


def device_name() -> str:
    """Return the name of this process's device for results: the GPU's own name, or ``cpu``."""
    where = device()
    return str(torch.cuda.get_device_name(where)) if where.type == "cuda" else "cpu"
