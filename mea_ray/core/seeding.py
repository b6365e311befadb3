"""Seeds: every random stream of an experiment is derived from one integer and a name."""

from __future__ import annotations

import hashlib
import secrets

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """Derive an independent seed for a named stream.

    Args:
        seed: The experiment's seed, any integer.
        *names: Name of the stream, e.g. ``"victim", "batches"``. Different names give independent streams.

    Returns:
        An integer in [0, 2**63 - 1], the same on every machine and Python version.
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return numpy's generator for a named stream of ``seed``."""
    return np.random.default_rng(derive(seed, *names))


SEED_BITS = 63
"""Maximum number of bits of a seed from ``derive``."""
SYSTEM_BITS = 256
"""Number of bits of a seed from the system."""


def system_seed() -> int:
    """Draw a seed of 256 bits from the system's randomness. It cannot be guessed or repeated."""
    return secrets.randbits(SYSTEM_BITS) | 1 << SYSTEM_BITS - 1


def secret_bytes(seed: int, count: int, *names: str | int) -> bytes:
    """Return the bytes of a named secret.

    Args:
        seed: A seed of ``system_seed``, all bits of which are used, or a small one of a config.
        count: Number of bytes.
        *names: Name of the secret.
    """
    if seed.bit_length() <= SEED_BITS:
        return numpy_generator(seed, *names).bytes(count)
    # numpy's generators take only 63 bits, which can be found by brute force.
    return hashlib.shake_256("/".join([str(seed), *map(str, names)]).encode()).digest(count)
