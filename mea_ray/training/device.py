"""The device of this process: the only module that chooses or names one."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from mea_ray.core.errors import DeviceOutOfMemory

_share: dict[str, float] = {}
_CPUINFO = Path("/proc/cpuinfo")
_ALLOCATED = 0.95
"""Part of a share that tensors may fill: CUDA itself takes some memory for every process."""
_DATA = 0.5
"""Part of the memory of a GPU that data may fill; the rest is for the network and its gradients."""

# Of glibc's malloc.h: the parameters, and the largest values that glibc itself moves them to.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_USUAL_MMAP, _USUAL_TRIM = 32 * 2**20, 64 * 2**20
_KEEP_MMAP, _KEEP_TRIM = 2**30, 2**31 - 1
_holders = {"count": 0}
_lock = threading.Lock()


def use_gpus(share: float) -> None:
    """Set this process's share of GPUs, as its scheduler assigned it.

    Args:
        share: GPUs, may be a fraction, which limits the memory, too; 0 restricts the process to the CPU even where a
            GPU is visible.
    """
    _share["gpus"] = share
    if 0 < share < 1 and torch.cuda.is_available():
        # What goes beyond the share fails here, and not in a process that shares the GPU.
        torch.cuda.set_per_process_memory_fraction(_ALLOCATED * share)


def gpu_share() -> float:
    """Return this process's share of GPUs; 1 where none was set."""
    return _share.get("gpus", 1.0)


def device() -> torch.device:
    """Return the device of this process: the first visible GPU, or the CPU where there is none or none was assigned."""
    if gpu_share() > 0 and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def visible_gpus() -> int:
    """Return the number of GPUs that this process could use."""
    return torch.cuda.device_count() if device().type == "cuda" else 0


MOST_THREADS = 512


def use_threads(cpus: float) -> None:
    """Set torch's number of threads to this process's CPUs.

    Args:
        cpus: CPUs assigned to the process; a fraction is rounded down, to at least one thread. More than a machine can
            have give ``MOST_THREADS``: the library of threads would end the process for want of memory.
    """
    torch.set_num_threads(max(1, min(int(cpus), MOST_THREADS)))


@contextmanager
def threads(cpus: float) -> Iterator[None]:
    """Use as many threads as ``use_threads`` would inside the context, and as many as before afterwards."""
    before = torch.get_num_threads()
    use_threads(cpus)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """Restrict torch to one thread of the CPU.

    With several threads the rows of a batch are divided among them, so that the last bits of an image's result depend
    on its position in the batch.
    """
    return threads(1)


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Retain freed memory for the next tensor, instead of returning it to the system after every layer.

    By default glibc returns every block of 32 MiB and every large end of its heap at once, and the next layer waits for
    fresh zeroed pages. On a CPU that costs a fifth of a training step of 192 images, and nearly half of a forward
    pass of 512. The memory is returned when the last context exits. Does nothing where the C library is not glibc. May
    be nested, and used from several threads.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    with _lock:
        _holders["count"] += 1
        libc.mallopt(_MMAP_THRESHOLD, _KEEP_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, _KEEP_TRIM)
    try:
        yield
    finally:
        with _lock:
            _holders["count"] -= 1
            if not _holders["count"]:
                libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
                libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
                libc.malloc_trim(0)


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def fits(size: int, where: torch.device) -> bool:
    """Whether data of ``size`` bytes may stay on a device: at most half of the memory that this process can have."""
    if where.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(where)
    return size <= _DATA * min(free, gpu_share() * total)


def send(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device from pinned memory, without waiting for the work in progress there."""
    pinned = tensor.pin_memory() if where.type == "cuda" else tensor
    return pinned.to(where, non_blocking=True)


def free_memory() -> None:
    """Free this process's unused GPU memory, so that other processes can use it."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where this process has not used a GPU


@contextmanager
def device_memory(where: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into a typed one, and free the memory for later work of this process.

    Args:
        where: What is done inside, for the message.

    Raises:
        DeviceOutOfMemory: A GPU ran out of memory inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceOutOfMemory(f"{where} ({str(error).splitlines()[0][:200]})") from None
    finally:
        free_memory()


RandomState = tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]
"""States of torch's global streams, on the CPU and on a GPU, and of other generators."""


def random_state(where: torch.device, generators: Sequence[torch.Generator]) -> RandomState:
    """Return the state of torch's global streams, on the CPU and on ``where``, and of generators."""
    on_device = None if where.type == "cpu" else getattr(torch, where.type).get_rng_state(where)
    return torch.get_rng_state(), on_device, [generator.get_state() for generator in generators]


def set_random_state(where: torch.device, generators: Sequence[torch.Generator], state: RandomState) -> None:
    """Restore what ``random_state`` returned; a device of another kind begins with the stream that it has."""
    torch.set_rng_state(state[0])
    if state[1] is not None and where.type != "cpu":
        getattr(torch, where.type).set_rng_state(state[1], where)
    for generator, stream in zip(generators, state[2], strict=True):
        generator.set_state(stream)


def native_bfloat16(where: torch.device) -> bool:
    """Whether a device computes bfloat16 itself, so that autocast is faster than float32 there.

    Emulated bfloat16 is slower than float32: a CPU needs AVX512-BF16 or AMX (x86) or the BF16 extension (Arm), a GPU
    compute capability 8.0.
    """
    if where.type == "cuda":
        return torch.cuda.get_device_capability(where)[0] >= 8
    return where.type == "cpu" and _cpu_bfloat16()


def fast_float16(where: torch.device) -> bool:
    """Whether a device computes float16 faster than float32: a GPU with tensor cores, of compute capability 7.0."""
    return where.type == "cuda" and torch.cuda.get_device_capability(where)[0] >= 7


def begin_graphs(where: torch.device) -> None:
    """Let the next pass of a compiled network on a GPU write over what its graphs returned before."""
    if where.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


@contextmanager
def tf32(where: torch.device, *, enabled: bool) -> Iterator[None]:
    """Round the inputs of float32 matrix products on a GPU to 10 bits (TF32) inside the context."""
    if not enabled or where.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=1)
def _cpu_bfloat16() -> bool:
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:  # no Linux: nothing to read the flags from
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def aligned(model: nn.Module) -> bool:
    """Return whether the outputs of all convolutions of a model are multiples of 16 channels.

    Other models must not be trained in bfloat16 with channels last on a CPU. With torch 2.14 (oneDNN) the gradient of a
    convolution of 6, 8 or 13 channels writes beyond its memory there, for batches that are not a multiple of 32.
    """
    widths = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return all(width % 16 == 0 for width in widths)


def fused_optimizers(where: torch.device) -> bool:
    """Whether torch updates all weights in one kernel there."""
    return where.type in {"cpu", "cuda"}


@contextmanager
def exact() -> Iterator[None]:
    """Compute convolutions on a GPU in full float32, with deterministic algorithms.

    By default inputs may be rounded to 10 bits (TF32), which hides the small differences that a gradient is estimated
    from. Without determinism, an attack whose queries follow from its training could not be replayed.
    """
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def fork_devices(where: torch.device) -> list[int]:
    """Return the GPU indices whose random state ``torch.random.fork_rng`` must save for work on ``where``."""
    if where.type != "cuda":
        return []
    return [where.index if where.index is not None else torch.cuda.current_device()]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the context, and restore them afterwards."""
    with torch.random.fork_rng(fork_devices(device())):
        torch.manual_seed(seed)
        yield


def device_name() -> str:
    """Return the name of this process's device for results: the GPU's own name, or ``cpu``."""
    where = device()
    return str(torch.cuda.get_device_name(where)) if where.type == "cuda" else "cpu"
