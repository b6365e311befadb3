"""Names under which the actors of a service are found from any process of a Ray cluster."""

from __future__ import annotations

from typing import Any

import ray

from mea_ray.errors import ServiceUnavailable

NAMESPACE = "mea_ray"


def ledger_name(service: str) -> str:
    """Name of a service's ledger actor."""
    return f"{service}/ledger"


def replica_name(service: str, index: int) -> str:
    """Name of a service's replica ``index``."""
    return f"{service}/replica/{index}"


def find(name: str) -> Any:
    """Return the handle of a named actor, which may be restarting at the moment.

    Raises:
        ServiceUnavailable: There is none, or it is dead for good.
    """
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        raise ServiceUnavailable(f"no actor {name!r} in this Ray cluster; start the victim service first") from None


def exists(name: str) -> bool:
    """Whether a named actor is alive or will be again."""
    try:
        find(name)
    except ServiceUnavailable:
        return False
    return True
