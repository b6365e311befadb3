"""Simulates how long a planned sweep takes on a cluster, and which slots it cannot keep busy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mea_ray.sweep.broker import ServiceSpec
from mea_ray.sweep.estimate import Measured, choosing_models, trial_seconds, victim_seconds
from mea_ray.sweep.plan import Plan
from mea_ray.sweep.schedule import Node
from mea_ray.sweep.simulation import Simulated, Simulation, Workload

if TYPE_CHECKING:
    from mea_ray.sweep.cluster import Demand

START_S, OVERHEAD_S = 10.0, 3.0
"""Seconds until a service answers, and overhead of a trial in its slot, as measured on a laptop with warm caches."""
MOST_TRIALS = 3000
"""Maximum number of trials; simulating them takes a second or two."""
BUSY = 0.75
"""Utilisation of the slots above which no reason is given."""
WORTH = 0.85
"""Another number of services is suggested if it takes at most this fraction of the time."""


@dataclass(frozen=True)
class Forecast:
    """The forecast of a sweep on a cluster.

    Attributes:
        seconds: From its start to the end of its last trial, without the time for queries.
        busy: Utilisation: fraction of the slots' time spent on training, in [0, 1].
        idle: Why the rest is lost, with a remedy; empty if the loss is small.
    """

    seconds: float
    busy: float
    idle: str = ""


def forecast(plan: Plan, measured: Measured, demand: Demand, at_once: int, auto: tuple[Demand, int]) -> Forecast | None:
    """Simulate a sweep with the measured durations.

    Args:
        plan: The sweep.
        measured: The speed of its trainings.
        demand: Its demand on the cluster.
        at_once: Number of trials that run at once beside its services.
        auto: The same two with ``max_services: auto``.

    Returns:
        The forecast; None if there is none: nothing was measured, the cluster is too small, a search chooses the trials
        while it runs, or there are too many.
    """
    if plan.adaptive or at_once < 1 or not measured.seconds or not 1 <= len(plan.trials) <= MOST_TRIALS:
        return None
    work = _workload(plan, measured)
    simulated = Simulation(work, at_once, max(1, demand.services)).run()
    return Forecast(simulated.seconds, simulated.of_ideal, _idle(plan, work, simulated, at_once, demand, auto))


def _workload(plan: Plan, measured: Measured) -> Workload:
    nodes = []
    for trial in plan.trials:
        served = trial.config.thief.blackbox is None
        service = ServiceSpec(trial.victim, "", trial.config.service.serving).key if served else ""
        nodes.append(Node(trial.name, service, (trial.victim, *trial.nulls)))
    models = {
        name: victim_seconds(victim.config, measured) * (1 + choosing_models(victim.config))
        for name, victim in plan.victims.items()
    }
    models |= {name: victim_seconds(config, measured) for name, (config, _) in plan.nulls.items()}
    return Workload(nodes, trial_seconds(plan.trials, measured), models, START_S, OVERHEAD_S, service=0.0)


def _idle(
    plan: Plan, work: Workload, simulated: Simulated, at_once: int, demand: Demand, auto: tuple[Demand, int]
) -> str:
    if simulated.of_ideal >= BUSY:
        return ""
    empty = f"{at_once} slots are busy {simulated.of_ideal:.0%} of the time"
    if plan.trial_count < at_once:
        return f"{empty}: {plan.trial_count:,} trials do not fill them; add seeds, or use a smaller cluster"
    services, slots = auto[0].services, auto[1]
    if services > demand.services and slots >= 1:
        other = Simulation(work, slots, services).run()
        if other.seconds <= WORTH * simulated.seconds:
            return (
                f"{empty}, since trials of {demand.services} victims run at once; max_services=auto serves {services}, "
                f"and takes {other.seconds / simulated.seconds:.0%} of the time"
            )
    if simulated.first_trial_s > (1 - BUSY) * simulated.seconds:
        return f"{empty}: {len(work.model_s):,} models do not fill them before the first trial can begin"
    return f"{empty}: its last trials do not fill them; more trials, or a smaller cluster, would"
