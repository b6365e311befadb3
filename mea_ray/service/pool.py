"""A victim's service: a pool of replicas and their ledger, started, found and stopped by name."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from mea_ray.blackbox.passes import answer_size
from mea_ray.blackbox.policies import AnswerPolicy
from mea_ray.blackbox.prada import query_log_record
from mea_ray.blackbox.query_log import ClientLog
from mea_ray.config import ClientConfig, ServingConfig
from mea_ray.core.errors import ConfigError, ServiceUnavailable
from mea_ray.experiment.artifacts import Artifact
from mea_ray.results.records import QueryLogRecord
from mea_ray.service import accounts
from mea_ray.service.accounts import Account
from mea_ray.service.client import ServiceClient
from mea_ray.service.ledger_actor import LedgerActor, log_path
from mea_ray.service.naming import NAMESPACE, answer_of, exists, find, ledger_name, replica_name
from mea_ray.service.replica import Replica
from mea_ray.service.watch import Watch
from mea_ray.training.checkpoint import load_model, load_untrained


class VictimService:
    """The actors of one service. Made by `start` or `connect`.

    A service that is not detached lives as long as the object that `start` returned, or until `stop`.

    Attributes:
        name: Name of the service.
        ledger: Handle of the `LedgerActor`.
        replicas: Handles of the `Replica` actors.
        secret: The owner's secret, to open and read accounts; see `accounts`.
    """

    def __init__(
        self, name: str, ledger: Any, replicas: list[Any], description: Mapping[str, Any], secret: str
    ) -> None:
        self.name, self.ledger, self.replicas, self.secret = name, ledger, replicas, secret
        self._description = dict(description)
        self._watch: Watch | None = None

    @staticmethod
    def bundles(replicas: int, cpus_per_replica: float, gpus_per_replica: float = 0.0) -> list[dict[str, float]]:
        """Return the bundles of a service's placement group: one per replica. The ledger needs none."""
        bundle = {"CPU": cpus_per_replica, "GPU": gpus_per_replica}
        return [{key: value for key, value in bundle.items() if value > 0} for _ in range(replicas)]

    @classmethod
    def start(
        cls,
        folder: str | Path | Artifact,
        name: str,
        settings: ServingConfig = ServingConfig(),
        *,
        ledger_path: str | Path | None = None,
        placement_group: Any = None,
        detached: bool = False,
        start_timeout_s: float = 300.0,
    ) -> VictimService:
        """Start a service and wait until every replica can answer.

        Args:
            folder: Artifact folder of the victim, visible to every node that can run a replica, or the name of the
                artifact, which every replica downloads for itself. If its key marks answers (``dawn``), this service
                marks its answers.
            name: Unique in the Ray cluster.
            settings: Replicas, passes, answer policy and rate limit.
            ledger_path: Journal of the ledger, with the query log beside it; None for temporary files that `stop`
                deletes.
            placement_group: Where the replicas are placed; see `bundles`. The ledger is on the caller's node, as long
                as that exists, because its journal can be a file there.
            detached: Whether it outlives the process that starts it, until `stop`.
            start_timeout_s: Seconds to wait for the replicas.

        Raises:
            ArtifactError: The folder holds no readable victim.
            ConfigError: The policy cannot be built, or a service of this name is running.
            ServiceUnavailable: The replicas did not start in time, e.g. for lack of resources.
        """
        policy: AnswerPolicy = settings.policy.build()
        if isinstance(folder, Artifact):
            source: str | Artifact = folder
            model = load_untrained(folder.description())
        else:
            source = str(Path(folder).resolve())
            model, _ = load_model(Path(source))
        temporary = ledger_path is None
        journal = (
            Path(tempfile.gettempdir()) / f"mea_ray_ledger_{uuid.uuid4().hex}.sqlite"
            if temporary
            else Path(str(ledger_path))
        )
        names = [replica_name(name, index) for index in range(settings.replicas)]
        description = {
            "replicas": names,
            "classes": answer_size(model, policy),
            "source": policy.source,
            "image_shape": model.shape,
            "max_request_images": settings.max_request_images,
            "temporary_journal": str(journal) if temporary else None,
        }
        secret = accounts.new_secret()
        common: dict[str, Any] = {"namespace": NAMESPACE, "max_restarts": -1}
        if detached:
            common["lifetime"] = "detached"
        placed: dict[str, Any] = {}
        if placement_group is not None:
            placed["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placement_group)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        if exists(ledger_name(name)):
            raise ConfigError(f"a victim service {name!r} is running; connect to it, stop it, or choose another name")
        ledger_class: Any = ray.remote(LedgerActor)
        ledger = ledger_class.options(
            **common, name=ledger_name(name), num_cpus=0, max_task_retries=-1, scheduling_strategy=here
        ).remote(str(journal.resolve()), settings.rate, description, secret)
        # No retries by Ray here: the client uses another replica, which is already up.
        remote_replica: Any = ray.remote(Replica)
        answer_of("the ledger", ledger.describe.remote())
        handles = [
            remote_replica.options(
                **common,
                **placed,
                name=replica,
                num_cpus=settings.cpus_per_replica,
                num_gpus=settings.gpus_per_replica,
                max_task_retries=0,
            ).remote(source, name, settings, secret)
            for replica in names
        ]
        service = cls(name, ledger, handles, description, secret)
        try:
            ray.get([handle.describe.remote() for handle in [*handles, ledger]], timeout=start_timeout_s)
        except (RayError, GetTimeoutError) as error:
            service.stop()
            raise ServiceUnavailable(
                f"service {name!r} did not start within {start_timeout_s} s: {error}; check that the cluster has "
                f"{settings.replicas} x ({settings.cpus_per_replica} CPUs, {settings.gpus_per_replica} GPUs) free"
            ) from error
        return service

    @classmethod
    def connect(cls, name: str, secret: str, timeout_s: float = 60.0) -> VictimService:
        """Find a running service, from any process of the Ray cluster.

        Args:
            name: Its name.
            secret: Its secret, from the object that `start` returned.
            timeout_s: Seconds to wait for its ledger.

        Raises:
            ServiceUnavailable: There is none of this name, or its ledger does not answer within ``timeout_s``.
        """
        ledger = find(ledger_name(name))
        description = answer_of("the ledger", ledger.describe.remote(), timeout_s)
        return cls(name, ledger, [find(replica) for replica in description["replicas"]], description, secret)

    def register(self, client: str, budget: int | None = None) -> None:
        """Open an account or change its budget; earlier charges remain.

        Args:
            client: Name of the client.
            budget: Query budget in images; None for no limit.

        Raises:
            ConfigError: The budget is below the client's charges.
        """
        answer_of("the ledger", self.ledger.register.remote(self.secret, client, budget))

    def account(self, client: str) -> Account:
        """Return name and token of a client, with which it can query; `register` it first."""
        return accounts.account(self.secret, client)

    def client(
        self,
        client: str,
        settings: ClientConfig = ClientConfig(),
        *,
        start_at: int = 0,
        request_prefix: str = "",
    ) -> ServiceClient:
        """Return a registered client's black box; the arguments are those of `ServiceClient`."""
        return ServiceClient(
            self.name, self.account(client), settings, start_at=start_at, request_prefix=request_prefix
        )

    def charged(self, client: str) -> int:
        """Return the number of images charged to a client.

        Raises:
            UnknownClient: The client is not registered.
        """
        images: int = answer_of("the ledger", self.ledger.charged.remote(self.secret, client))
        return images

    def query_log(self, client: str) -> QueryLogRecord:
        """Return the owner's view of a client, see `blackbox.prada.query_log_record`."""
        named = self._description["classes"] if self._description["source"] == "probabilities" else 1
        return query_log_record(self.seen(client), named)

    def seen(self, client: str) -> ClientLog:
        """Return the owner's log of a client: its first images, and all whose answers were marked."""
        for handle in self.replicas:
            try:
                ray.get(handle.flush_log.remote())
            except RayError:  # its answers were logged, or it will be queried again
                continue
        log: ClientLog = answer_of("the ledger", self.ledger.seen.remote(self.secret, client))
        return log

    def logged(self, client: str) -> int:
        """Return the number of a client's images in the owner's log."""
        images: int = answer_of("the ledger", self.ledger.logged.remote(self.secret, client))
        return images

    def forget(self, client: str) -> None:
        """Remove a client's query log; its charges remain."""
        answer_of("the ledger", self.ledger.forget.remote(self.secret, client))

    def copy_ledger(self, path: str | Path) -> None:
        """Write a copy of the ledger's journal on the node of the ledger."""
        answer_of("the ledger", self.ledger.copy_to.remote(self.secret, str(path)))

    def watch(self, notify: Callable[[str], None]) -> Watch:
        """Report when a replica or the ledger died and is up again, see `Watch`, until `stop`."""
        actors = {f"replica {index}": handle for index, handle in enumerate(self.replicas)}
        self._watch = Watch({**actors, "the ledger": self.ledger}, notify)
        return self._watch

    def clients(self) -> list[str]:
        """Return the names of all clients."""
        names: list[str] = answer_of("the ledger", self.ledger.clients.remote(self.secret))
        return names

    def stats(self) -> dict[str, float]:
        """Return counts of requests, images, rejected requests and passes, and the mean fill, over all replicas.

        A replica that was restarted counts from its restart; one that is down does not count.
        """
        total = {"requests": 0.0, "images": 0.0, "refused": 0.0, "passes": 0.0, "mean_fill": 0.0}
        for handle in self.replicas:
            try:
                counts = ray.get(handle.stats.remote())
            except RayError:
                continue
            total["mean_fill"] += counts["passes"] * counts.pop("mean_fill")
            for key, value in counts.items():
                total[key] += value
        total["mean_fill"] /= max(1.0, total["passes"])
        return total

    def stop(self) -> None:
        """Stop all actors and release their resources and names; a temporary journal is deleted.

        Stopping twice, or after Ray was shut down, does nothing.
        """
        if self._watch is not None:
            self._watch.stop()
        if not ray.is_initialized():
            return
        for handle in [*self.replicas, self.ledger]:
            try:
                ray.kill(handle, no_restart=True)
            except (RayError, ValueError):
                continue
        names = [ledger_name(self.name), *self._description["replicas"]]
        deadline = time.monotonic() + 10
        while any(map(exists, names)) and time.monotonic() < deadline:
            time.sleep(0.02)
        journal = self._description["temporary_journal"]
        if journal is not None:
            for file in (journal, log_path(journal)):
                for suffix in ("", "-wal", "-shm", "-journal"):
                    Path(file + suffix).unlink(missing_ok=True)
