"""Names of a service's actors, by which any process of a Ray cluster finds them, and reading of their answers."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from mea_ray.core.errors import MeaRayError, ServiceUnavailable, first_line

NAMESPACE = "mea_ray"


def ledger_name(service: str) -> str:
    """Name of a service's ledger actor."""
    return f"{service}/ledger"


def replica_name(service: str, index: int) -> str:
    """Name of a service's replica ``index``."""
    return f"{service}/replica/{index}"


def find(name: str) -> Any:
    """Return the handle of a named actor, which may currently be restarting.

    Raises:
        ServiceUnavailable: It does not exist, or is permanently dead.
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


def answer_of(actor: str, reference: Any, timeout_s: float | None = None) -> Any:
    """Wait for an actor's answer; an error of mea_ray is raised as itself, not wrapped in Ray's.

    Args:
        actor: Description of the actor for the message, e.g. ``"the ledger"``.
        reference: Ray's reference of the answer.
        timeout_s: Seconds to wait; None for no limit.

    Raises:
        ServiceUnavailable: The actor does not answer.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, MeaRayError):
            raise error.cause from None
        raise
    except RayError as error:
        raise ServiceUnavailable(f"{actor} does not answer: {error}; start it again") from error


def cause_of(error: Exception) -> str:
    """Return the cause of an actor's error in one line, without Ray's traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return first_line(cause, 2000) or type(cause).__name__
