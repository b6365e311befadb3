"""Admission of a sweep's services to a cluster that other sweeps may use, too.

Services hold their resources for as long as their sweep needs them. Two sweeps whose services leave no room for a trial
of either would deadlock. So sweeps reserve the resources of their services one at a time, and only if there is room for
one trial beside them; until then a sweep waits, and reports why.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mea_ray.core.errors import ConfigError
from mea_ray.service.naming import NAMESPACE
from mea_ray.sweep.cluster import Demand

GATE = "admission"
GATE_EXPIRY_S = 30.0
SAY_AFTER_S = 10.0
_LOOK_S = 2.0


class AdmissionGate:
    """Admits one sweep at a time to reserve resources; an actor of the cluster.

    Args:
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._holder, self._last_sign = "", 0.0

    def enter(self, sweep: str) -> bool:
        """Admit a sweep if no admitted one has called recently; each call of an admitted sweep is a heartbeat."""
        now = self._clock()
        if self._holder not in {"", sweep} and now - self._last_sign < GATE_EXPIRY_S:
            return False
        self._holder, self._last_sign = sweep, now
        return True

    def leave(self, sweep: str) -> None:
        """Admit the next sweep."""
        if self._holder == sweep:
            self._holder = ""


@contextlib.contextmanager
def services_groups(
    demand: Demand,
    sweep: str = "",
    notify: Callable[[str], None] = lambda text: None,
    timeout_s: float = 120.0,
) -> Iterator[list[Any]]:
    """Reserve the services' resources; yields a placement group for each, or none if they need no resources.

    Args:
        demand: What the sweep needs.
        sweep: A unique name of this run of the sweep; empty if no other sweep can use the cluster.
        notify: Called with a message that says what the sweep is waiting for.
        timeout_s: Maximum wait while no other sweep uses the cluster, in seconds.

    Raises:
        ConfigError: There was no room after ``timeout_s``, and no other sweep that could release some.
    """
    if not demand.bundles:
        yield []
        return
    from ray.util.placement_group import remove_placement_group

    groups: list[Any] = []
    try:
        with _gate(sweep, notify) if sweep else contextlib.nullcontext(lambda: None) as stay:
            if sweep:
                _wait_for_room(demand, sweep, notify, stay, timeout_s)
            began = time.monotonic()
            groups += _groups([demand.bundles_of_one] * demand.services, demand)
            while not _are_ready(groups):
                stay()  # another sweep's trial may have been faster; it will end
                if not sweep and time.monotonic() - began > timeout_s:
                    raise _no_room(demand, timeout_s)
        yield groups
    finally:
        for group in groups:
            with contextlib.suppress(Exception):  # the cluster may be gone already
                remove_placement_group(group)


def _no_room(demand: Demand, timeout_s: float) -> ConfigError:
    return ConfigError(
        f"no room for {_wanted(demand)} within {timeout_s:g} s: free are {_free()}; lower service.cpus_per_replica, "
        "service.gpus_per_replica or max_services, or wait until the cluster is free"
    )


def _wanted(demand: Demand) -> str:
    replicas = len(demand.bundles)
    plural = "" if replicas == 1 else "s"
    return f"{replicas} replica{plural} of {_amount(demand.replica)} and one trial of {_amount(_trial(demand))}"


def _amount(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{n:g} {kind}{'' if n == 1 else 's'}" for kind, n in resources.items()) or "no resources"


def _trial(demand: Demand) -> dict[str, float]:
    return {kind: n for kind, n in {"CPU": demand.trial.cpus, "GPU": demand.trial.gpus}.items() if n}


def _free() -> str:
    import ray

    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return _amount({kind: free.get(kind, 0.0) for kind in ("CPU", "GPU")})


def _wait_for_room(
    demand: Demand, sweep: str, notify: Callable[[str], None], stay: Callable[[], object], timeout_s: float
) -> None:
    """Wait until the services and one trial fit at the same time; at most ``timeout_s`` while no other sweep runs."""
    from ray.util.placement_group import remove_placement_group

    began = alone_since = time.monotonic()
    announced = False
    probe = _groups([[*demand.bundles, _trial(demand)]], demand)
    try:
        while not _are_ready(probe):
            stay()
            now, others = time.monotonic(), _others(sweep)
            if others:  # the resources of one that ends are free a moment later
                alone_since = now
            elif now - alone_since > timeout_s:
                raise _no_room(demand, timeout_s)
            if now - began > SAY_AFTER_S and not announced:
                announced = True
                whose = f"; {', '.join(others)} uses the cluster" if others else ""
                notify(f"waiting for room for {_wanted(demand)}: free are {_free()}{whose}")
    finally:
        for group in probe:
            with contextlib.suppress(Exception):
                remove_placement_group(group)


def _groups(bundles: list[list[dict[str, float]]], demand: Demand) -> list[Any]:
    from ray.util.placement_group import placement_group

    return [placement_group(each, strategy=demand.placement.upper()) for each in bundles]


def _are_ready(groups: list[Any]) -> bool:
    import ray

    ready, _ = ray.wait([group.ready() for group in groups], num_returns=len(groups), timeout=_LOOK_S)
    return len(ready) == len(groups)


def _others(sweep: str) -> list[str]:
    """Return the names of the other sweeps on the cluster, from their event actors."""
    from ray.util import list_named_actors

    names = [str(each["name"]) for each in list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]
    runs = [name.removesuffix("-events") for name in names if name.endswith("-events")]
    return sorted({f"sweep {run.rpartition('-')[0]!r}" for run in runs if run != sweep})


@contextlib.contextmanager
def _gate(sweep: str, notify: Callable[[str], None]) -> Iterator[Callable[[], object]]:
    """Be the only sweep that reserves resources; yields a heartbeat function to call periodically."""
    import ray
    from ray.exceptions import RayError

    gate_class: Any = ray.remote(AdmissionGate)
    # The handle keeps the actor alive; it ends with the sweep that created it, and the next creates it again.
    gates: list[Any] = []
    options: dict[str, Any] = {"name": GATE, "namespace": NAMESPACE, "get_if_exists": True, "num_cpus": 0}

    def ask() -> bool:
        try:
            gates[:] = [gate_class.options(**options).remote()]
            return bool(ray.get(gates[0].enter.remote(sweep), timeout=30))
        except (RayError, ValueError):
            return False

    began, announced = time.monotonic(), False
    while not ask():
        if not announced and time.monotonic() - began > SAY_AFTER_S:
            announced = True
            notify(f"waiting for another sweep that reserves resources on this cluster: {', '.join(_others(sweep))}")
        time.sleep(1.0)
    try:
        yield ask
    finally:
        with contextlib.suppress(RayError, ValueError):
            ray.get_actor(GATE, namespace=NAMESPACE).leave.remote(sweep)
        gates.clear()
