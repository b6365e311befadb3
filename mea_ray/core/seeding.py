"""Seeds: every random stream of an experiment is derived from one integer and a name."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """Derive an independent seed for a named stream.

    Args:
        seed: The experiment's seed, any integer.
        *names: Name of the stream, e.g. ``"victim", "batches"``. Other names give unrelated streams.

    Returns:
        An integer in [0, 2**63 - 1], the same on every machine and Python version.
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return numpy's generator for a named stream of ``seed``."""
    return np.random.default_rng(derive(seed, *names))
