"""The Ray cluster of a sweep: started quietly, checked for size, with resources reserved for the services."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

from mea_ray.config import RoleResources
from mea_ray.core.errors import ConfigError
from mea_ray.sweep.address import find_cluster, temp_folder

# Ray and Tune read these in the driver. Most keep their reports out of the terminal.
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative data.path means the same in a trial as in the driver
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "0",  # not endlessly, and not with thirty lines each: see tasks.Tasks
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",  # trials for which Tune requests resources at the same time
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # snapshots of all trials, for Tune's own restore, which is never used
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
_LOGGERS = ("ray", "ray.tune", "ray.train", "ray.air", "ray.serve", "ray._private", "optuna")

logger = logging.getLogger(__name__)

_SLOW_START_S = 15.0
"""Seconds after which a start of Ray is reported as slow."""

_STARTS = 2
"""Attempts to start Ray on this machine: Ray gives a node 30 s, which is short on a busy machine."""

# A local Ray ignores these; its processes would also pass them on.
_OF_ANOTHER_RAY = (
    "RAY_ADDRESS",
    "RAY_NAMESPACE",
    "RAY_JOB_ID",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_REDIS_ADDRESS",
)


_GROUP_OF_ITS_OWN = threading.Event()
"""Set while Ray is started, see `_leave_the_group`."""


def _leave_the_group() -> None:
    """Give a process of Ray its own process group.

    A shell's ``kill %1``, ``timeout`` and many job schedulers send a signal to a whole process group. If it ended Ray,
    this process could not answer the requests in flight, and would wait a minute for Ray before it ended.
    """
    if _GROUP_OF_ITS_OWN.is_set():
        os.setpgid(0, 0)


os.register_at_fork(after_in_child=_leave_the_group)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Ray's, Tune's and Optuna's own output out of the terminal; a sweep reports its progress by events."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with environment({name: os.environ.get(name, value) for name, value in _QUIET.items()}):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of the environment, or remove those that are None, until the block ends."""
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def check_address(address: str | None) -> str | None:
    """Check within seconds that Ray can be used, before anything else is done.

    Args:
        address: As for ``--address``, see `address.find_cluster`. Ignored if Ray runs in this process already.

    Returns:
        The address for `ray_cluster`; None to start Ray on this machine.

    Raises:
        ConfigError: It cannot be used.
    """
    import ray

    if ray.is_initialized():
        return None
    return find_cluster(address)


def is_running() -> bool:
    """Whether this process is already connected to Ray."""
    import ray

    return bool(ray.is_initialized())


@contextlib.contextmanager
def ray_cluster(address: str | None, py_modules: Sequence[str] = ()) -> Iterator[ModuleType]:
    """Yield Ray: already connected, at ``address``, or newly started on this machine.

    Args:
        address: What `check_address` returned.
        py_modules: Folders and files with Python modules that workers have to import, see `modules.modules_to_send`.

    Raises:
        ConfigError: Ray could not be started or joined.
    """
    import ray

    if ray.is_initialized():
        with _sigterm_as_ctrl_c():
            yield ray
        return
    with environment(dict.fromkeys(_OF_ANOTHER_RAY) if address is None else {}):
        _start_or_join(address, py_modules)
        try:
            with _sigterm_as_ctrl_c():  # after Ray has set its own handler, which would end this process immediately
                yield ray
        finally:
            ray.shutdown()


def _start_or_join(address: str | None, py_modules: Sequence[str], starts: int = _STARTS) -> None:
    import ray

    waiting = "Ray to start on this machine" if address is None else f"the Ray cluster at {address}"
    try:
        _GROUP_OF_ITS_OWN.set()
        with _reported_if_slow(waiting):
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                configure_logging=True,
                runtime_env={"py_modules": list(py_modules)} if py_modules else None,
            )
    except Exception as error:  # of many types; none of them helps the user
        ray.shutdown()
        if address is None and starts > 1 and "timed out during startup" in str(error):
            _start_or_join(address, py_modules, starts - 1)
            return
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        if address is None:
            folder, _ = temp_folder()
            raise ConfigError(
                f"Ray could not be started on this machine: {reason}; its logs are in {folder}/ray/session_latest/logs"
            ) from error
        raise ConfigError(f"the Ray cluster at {address} could not be joined: {reason}") from error
    finally:
        _GROUP_OF_ITS_OWN.clear()


@contextlib.contextmanager
def _reported_if_slow(what: str) -> Iterator[None]:
    """Log a slow start: Ray itself reports nothing until it gives up."""

    def report() -> None:
        logger.warning(
            f"waiting for {what} for {_SLOW_START_S:.0f} s so far; this machine has a load of {os.getloadavg()[0]:.0f} "
            f"on {os.cpu_count()} CPUs; Ctrl-C ends it"
        )

    timer = threading.Timer(_SLOW_START_S, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, e.g. of a spot instance or a job scheduler, as Ctrl-C: save, then end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a process that a script started with &
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)  # Tune has a handler of its own

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def on_this_node() -> Any:
    """Return the scheduling strategy of actors that must run on the driver's node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@dataclass(frozen=True)
class Demand:
    """The resources that a sweep needs to make progress.

    Attributes:
        services: Number of services up at once.
        replica: Resources of the largest replica, e.g. ``{"CPU": 0.5}``; empty if it reserves none.
        replicas: Replicas of one service.
        trial: Resources of one trial.
        victim: Resources of the training of one victim.
        placement: Where the services run: ``spread`` over the nodes, or ``pack``ed on as few as hold them.
        trials: Total number of trials.
        auto: Whether ``services`` is the total over time; the number up at once then follows from the cluster.
    """

    services: int
    replica: Mapping[str, float]
    replicas: int
    trial: RoleResources
    victim: RoleResources
    placement: Literal["pack", "spread"] = "pack"
    trials: int = 1
    auto: bool = False

    def with_services(self, services: int) -> Demand:
        """Return the same with another number of services up at once."""
        return replace(self, services=services, auto=False)

    @property
    def least(self) -> Demand:
        """The least with which the sweep makes progress."""
        return self.with_services(min(1, self.services)) if self.auto else self

    def resolved(self, total: Mapping[str, float]) -> Demand:
        """Return the demand on a cluster with these resources, with the best number of services if that is open."""
        from mea_ray.sweep.schedule import best_services

        if not self.auto or self.services <= 1:
            return self.with_services(self.services)
        slots: dict[int, int] = {}
        for count in range(1, self.services + 1):
            try:
                slots[count] = check(self.with_services(count), total)
            except ConfigError:
                break
        return self.with_services(best_services(self.services, self.trials, max(1, len(slots)), slots or {1: 1}))

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Bundles of the placement groups of all services: one per replica."""
        return self.bundles_of_one * self.services

    @property
    def bundles_of_one(self) -> list[dict[str, float]]:
        """Bundles of the placement group of one service."""
        return [dict(self.replica) for _ in range(self.replicas)] if self.replica else []

    @property
    def first(self) -> list[dict[str, float]]:
        """Bundles that must fit to begin: those of the services, one trial, one training of a victim."""
        roles = [{"CPU": role.cpus, "GPU": role.gpus} for role in (self.trial, self.victim)]
        return [{kind: n for kind, n in bundle.items() if n} for bundle in [*self.bundles, *roles]]

    def set_aside(self, kind: str) -> float:
        """Return how much of ``CPU`` or ``GPU`` the services hold."""
        return sum(bundle.get(kind, 0.0) for bundle in self.bundles)


def check(demand: Demand, total: Mapping[str, float]) -> int:
    """Compare what a sweep needs with a cluster.

    Args:
        demand: What it needs.
        total: ``ray.cluster_resources()``.

    Returns:
        Trials that can run at once, at least 1.

    Raises:
        ConfigError: The services and one trial, or the training of one victim, would never fit.
    """
    at_once = []
    for kind, field, trial, victim in (
        ("CPU", "cpus", demand.trial.cpus, demand.victim.cpus),
        ("GPU", "gpus", demand.trial.gpus, demand.victim.gpus),
    ):
        has, reserved = float(total.get(kind, 0.0)), demand.set_aside(kind)
        if victim > has:
            raise ConfigError(
                f"training a victim needs {victim:g} {kind}s, the cluster has {has:g}; lower resources.victim.{field}, "
                "or give a larger cluster with --address"
            )
        if reserved + trial > has + 1e-9:
            raise ConfigError(
                f"the sweep needs {reserved + trial:g} {kind}s, the cluster has {has:g}: {demand.services} services x "
                f"{demand.replicas} replicas x {demand.replica.get(kind, 0.0):g} set aside, {trial:g} for one trial; "
                f"lower service.{field}_per_replica (fractions are allowed), service.replicas, max_services or "
                f"resources.trial.{field}, or give a larger cluster with --address"
            )
        if trial > 0:
            at_once.append(math.floor((has - reserved) / trial + 1e-9))
    return max(1, min(at_once, default=1))


def trainings_at_once(demand: Demand, total: Mapping[str, float]) -> int:
    """Return how many models can be trained at once on a cluster with these resources, at least 1."""
    wanted = {"CPU": demand.victim.cpus, "GPU": demand.victim.gpus}
    return max(1, min((math.floor(total.get(kind, 0.0) / n + 1e-9) for kind, n in wanted.items() if n), default=1))


def has_room_beside_services(demand: Demand, nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a victim can be trained beside the services, wherever they are placed.

    Args:
        demand: What the sweep needs.
        nodes: ``ray.nodes()``.
    """
    has = [node["Resources"] for node in nodes if node["Alive"]]
    wanted = {"CPU": demand.victim.cpus, "GPU": demand.victim.gpus}

    def fits(node: Mapping[str, float], beside: Callable[[str], float]) -> bool:
        return all(node.get(kind, 0.0) - beside(kind) >= n - 1e-9 for kind, n in wanted.items() if n)

    roomy = sum(fits(node, lambda kind: 0.0) for node in has)
    return roomy > len(demand.bundles) or any(fits(node, demand.set_aside) for node in has)


def resources_of(address: str) -> dict[str, float]:
    """Return the resources of a running cluster.

    Raises:
        ConfigError: It cannot be reached.
    """
    with quiet(), ray_cluster(address) as ray:
        resources: dict[str, float] = ray.cluster_resources()
    return resources


def wait_for_room(demand: Demand, ray: Any, wait_s: float, sleep: Callable[[float], None] = time.sleep) -> int:
    """Compare as ``check`` does; while the cluster is too small, request resources from its autoscaler, and wait.

    Args:
        demand: What the sweep needs.
        ray: The module, connected to the cluster.
        wait_s: Maximum wait, in seconds. A cluster without an autoscaler does not grow.
        sleep: Called with the seconds between two checks.

    Returns:
        Trials that can run at once on the current resources, at least 1.

    Raises:
        ConfigError: There was still no room after ``wait_s``.
    """
    from ray.autoscaler import sdk

    end = time.monotonic() + wait_s
    asked = False
    try:
        while True:
            try:
                return check(demand, ray.cluster_resources())
            except ConfigError:
                if time.monotonic() >= end:
                    raise
            if not asked:
                sdk.request_resources(bundles=demand.first)
                asked = True
            sleep(2.0)
    finally:
        if asked:  # the request would keep its machines for ever; from here on, pending trials request them
            sdk.request_resources(bundles=[])
