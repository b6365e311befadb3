"""The needs of a trial before it can run: its models, its service, and how they are made on the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mea_ray.core.errors import MeaRayError
from mea_ray.experiment.ports import Role
from mea_ray.sweep.broker import ServiceSpec
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.loading import Loaded
from mea_ray.sweep.plan import PlannedTrial
from mea_ray.sweep.schedule import Node
from mea_ray.sweep.sink import SinkSender
from mea_ray.sweep.tasks import Tasks
from mea_ray.sweep.trainable import TrialContext, train_model

if TYPE_CHECKING:
    from mea_ray.sweep.feeder import Feeder


class Needs:
    """The needs of trials before they can run: models, which it trains as tasks of Ray, and services.

    Args:
        folder: The sweep's folder.
        data: The loaded data.
        emit: Where the trainings' events go.
        ray: The ``ray`` module, connected.
        max_failures: Maximum number of retries of a training whose process died.
    """

    def __init__(self, folder: SweepFolder, data: Loaded, emit: SinkSender, ray: Any, max_failures: int) -> None:
        self.folder, self.data, self.emit, self.ray, self.max_failures = folder, data, emit, ray, max_failures
        self.models: dict[str, tuple[Role, PlannedTrial, int]] = {}
        self.specs: dict[str, ServiceSpec] = {}

    def node(self, name: str, trial: PlannedTrial) -> Node:
        """Return a trial's node in the graph, and register its models and its service."""
        self.models.setdefault(trial.victim, ("victim", trial, 0))
        for index, null in enumerate(trial.nulls):
            self.models.setdefault(null, ("null", trial, index))
        service = ""
        if trial.config.thief.blackbox is None:
            spec = ServiceSpec.of(trial.config, trial.victim, self.folder.storage)
            service = spec.key
            self.specs.setdefault(service, spec)
        return Node(name, service, (trial.victim, *trial.nulls))

    def train(self, tasks: Tasks, name: str) -> None:
        """Submit the training of a model, with the resources of a victim."""
        role, trial, index = self.models[name]
        reserved = trial.config.resources.victim
        task = self.ray.remote(train_model).options(
            num_cpus=reserved.cpus, num_gpus=reserved.gpus, max_retries=self.max_failures
        )
        arguments = (role, trial, index, self.data.references[trial.splits], self.folder, self.emit)
        tasks.add(name, f"training {role} {name[:8]}", partial(task.remote, *arguments))

    def of_suggestion(self, feeder: Feeder, context: TrialContext, name: str, config: Mapping[str, Any]) -> None:
        """Register the needs of a suggested point of an adaptive search with a feeder.

        Without its data in the object store, or if it cannot be planned, it needs nothing: its trial reports the
        reason.

        Args:
            feeder: The feeder of a growing schedule.
            context: The trials' common context.
            name: Name of the point.
            config: The suggestion.
        """
        node, spec = Node(name, "", ()), None
        try:
            trial = context.planned_with(config, self.data.references)
            if trial is not None and self.folder.result(trial.name) is None:
                node = self.node(name, trial)
                spec = self.specs.get(node.service)
        except MeaRayError:
            pass
        feeder.add(node, spec)
