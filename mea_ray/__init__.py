"""Steal watermarked models through their query API, on Ray, and see whether the owner can still prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mea_ray.results.frames import load_results

__version__ = "0.1.0"
__all__ = ["__version__", "load_results"]


def __getattr__(name: str) -> object:
    """Import what is public only when it is used, so that ``mea-ray --help`` stays fast."""
    if name == "load_results":
        from mea_ray.results.frames import load_results

        return load_results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
