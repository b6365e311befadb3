"""Steal watermarked models through their query API, on Ray, and see whether the owner can still prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mea_ray.api import (
        BlackBox,
        Results,
        Served,
        Stolen,
        Verdict,
        Victim,
        load_results,
        nulls,
        open_blackbox,
        run,
        run_sweep,
        serve,
        steal,
        verify,
        watermark,
    )

__version__ = "0.1.0"
__all__ = [
    "BlackBox",
    "Results",
    "Served",
    "Stolen",
    "Verdict",
    "Victim",
    "__version__",
    "load_results",
    "nulls",
    "open_blackbox",
    "run",
    "run_sweep",
    "serve",
    "steal",
    "verify",
    "watermark",
]


def __getattr__(name: str) -> object:
    """Import what is public only when it is used, so that ``mea-ray --help`` stays fast."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    export: object = getattr(import_module("mea_ray.api"), name)
    return export
