"""The sandbox of an attack's process: a minimal environment, and only program files and its own folders.

Landlock, in Linux from 5.13 on unless disabled at build time, blocks files and other processes (signals from ABI 6 on),
and a seccomp filter blocks sockets. Elsewhere only the environment is restricted.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

_PASSED = {"PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"}
_PASSED_PREFIXES = (
    *("LC_", "CUDA_", "CUBLAS_", "NVIDIA_", "ROCR_", "HIP_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "NUMEXPR_"),
    *("TORCH_", "PYTORCH_", "MALLOC_", "PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONUTF8", "PYTHONFAULTHANDLER"),
)
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH")

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_PR_SET_NO_NEW_PRIVS = 38
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_FIRST_RIGHTS = (1 << 13) - 1  # all of ABI 1: execute, read, write, list, make and remove
_MAKE_DIR, _MAKE_REG = 1 << 7, 1 << 8
_WRITE = 0b111111 | _MAKE_DIR | _MAKE_REG  # also removes; makes no device, socket, pipe or link
_REFER = 1 << 13  # handled and never granted: nothing is moved between folders
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_TCP = 0b11  # bind and connect
_SCOPES = 0b11  # abstract sockets and signals

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _DENY = 0x7FFF0000, 0x00050000 | 13  # EACCES
_MACHINES = {
    # AUDIT_ARCH, then the numbers of socket, ptrace, process_vm_readv and process_vm_writev.
    "x86_64": (0xC000003E, (41, 101, 310, 311)),
    "aarch64": (0xC00000B7, (198, 117, 270, 271)),
}
_IO_URING_SETUP, _PIDFD_GETFD = 425, 438  # the same numbers on every architecture; the first opens sockets, too
_X32 = 0x40000000  # calls of another numbering on x86_64

_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/sys", "/nix", "/opt/rocm"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/timezone", "/etc/passwd"),
    *("/etc/group", "/etc/nsswitch.conf", "/etc/alternatives", "/etc/OpenCL"),
    # Only its own entry of /proc: not every kernel's Landlock blocks the environment and memory maps of others.
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/uptime", "/proc/loadavg"),
    *("/proc/filesystems", "/proc/devices", "/proc/modules", "/proc/sys", "/proc/driver"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
_GPUS = ("nvidia*", "dri", "kfd", "nvidia-caps")


def short_environment(environ: Mapping[str, str], path: Iterable[str]) -> dict[str, str]:
    """Return the environment of an attack's process: what Python, torch and a GPU need, and no secret.

    Args:
        environ: The environment.
        path: The ``sys.path`` of the process; an empty entry stands for the working directory.
    """
    passed_on = {
        name: value
        for name, value in environ.items()
        if (name in _PASSED or name.startswith(_PASSED_PREFIXES))
        and not any(word in name.upper() for word in _SECRET_WORDS)
    }
    folders = dict.fromkeys(os.path.abspath(entry) for entry in path)
    return {**passed_on, "PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}


def readable(modules: Iterable[str]) -> list[str]:
    """Return the folders and files that a program of this Python needs to read, without importing anything.

    Args:
        modules: Names of external modules that it will import.
    """
    paths = [*_SYSTEM, sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))]
    paths += [os.path.dirname(os.__file__), str(Path(__file__).parents[2])]
    paths += [entry for entry in sys.path if os.path.basename(entry) in {"site-packages", "dist-packages"}]
    paths += [entry for name in ("LD_LIBRARY_PATH", "CUDA_HOME") for entry in os.environ.get(name, "").split(":")]
    for entry in sys.path:
        paths += _modules_in(entry)
    for module in {name.partition(".")[0] for name in modules}:  # e.g. of an editable install
        spec = importlib.util.find_spec(module)
        if spec is not None:
            paths += list(spec.submodule_search_locations or ([spec.origin] if spec.origin else []))
    return [path for path in dict.fromkeys(paths) if path and path != "/" and os.path.exists(path)]


def _modules_in(folder: str) -> list[str]:
    """Return what can be imported from a folder that can hold more than code, such as the working directory."""
    try:
        entries = list(os.scandir(folder or "."))
    except OSError:
        return [folder]  # an archive, or nothing
    return [
        os.path.abspath(entry.path)
        for entry in entries
        if entry.name.endswith((".py", ".so", ".dist-info", ".egg-info"))
        or (entry.is_dir() and os.path.exists(os.path.join(entry.path, "__init__.py")))
    ]


def version() -> int:
    """Return the version of Landlock that this system offers; 0 for none."""
    if not sys.platform.startswith("linux"):
        return 0
    asked = ctypes.c_size_t(0), ctypes.c_uint32(1)
    return max(0, int(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, *asked)))


def close_in(read: Iterable[str], write: Iterable[str]) -> int:
    """Sandbox this process and its children irrevocably, as far as this system can.

    Must be called while the process has a single thread.

    Args:
        read: Folders and files that it can read and execute.
        write: Folders that it can also change.

    Returns:
        The version of Landlock; 0 where there is none, and nothing was restricted.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc, abi = ctypes.CDLL(None), version()
    no = ctypes.c_ulong(0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), no, no, no)
    _close_sockets(libc)
    if not abi:
        return 0
    rights = _FIRST_RIGHTS | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
    handled = (ctypes.c_uint64 * 3)(rights, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = int(libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(size), ctypes.c_uint32(0)))
    if ruleset < 0:
        return 0
    try:
        for path in read:
            _allow(libc, ruleset, path, _READ & rights)
        for entry in sys.path:
            _allow(libc, ruleset, entry, _READ_DIR)  # Python lists it to find what it imports
        for path in (*write, *_DEVICES, *_gpus()):
            _allow(libc, ruleset, path, (_WRITE | _TRUNCATE) & rights)
        return 0 if libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)) else abi
    finally:
        os.close(ruleset)


def closes_sockets() -> bool:
    """Return whether ``close_in`` blocks sockets here."""
    return sys.platform.startswith("linux") and platform.machine() in _MACHINES


def _close_sockets(libc: ctypes.CDLL) -> None:
    """Block new sockets of any kind, and system calls that access another process; open sockets stay open."""
    if not closes_sockets():
        return
    architecture, calls = _MACHINES[platform.machine()]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    refused = [(equal, number) for number in (*calls, _IO_URING_SETUP, _PIDFD_GETFD)] + [(at_least, _X32)]
    program = [(load, 0, 0, 4), (equal, 0, 2 + len(refused), architecture), (load, 0, 0, 0)]
    program += [(code, len(refused) - place, 0, number) for place, (code, number) in enumerate(refused)]
    program += [(end, 0, 0, _ALLOW), (end, 0, 0, _DENY)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    described = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(text)))
    libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), described, ctypes.c_ulong(0), ctypes.c_ulong(0))


def _gpus() -> list[str]:
    return [str(path) for pattern in _GPUS for path in Path("/dev").glob(pattern)]


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Add a rule for a path and everything below it; a missing path needs none."""
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _ON_FILES
        rule = rights.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
        libc.syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    finally:
        os.close(opened)
