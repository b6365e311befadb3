"""The application for Ray Serve: deployed on one machine by ``mea-ray serve``, on a cluster by a config file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig

from mea_ray.config import build
from mea_ray.core.errors import ConfigError
from mea_ray.service.http.keys import KEYS, KeyRing, service_name, service_secret, state_folder
from mea_ray.service.http.ledger import HttpLedger
from mea_ray.service.http.settings import HttpConfig
from mea_ray.service.naming import NAMESPACE, ledger_name

if TYPE_CHECKING:
    from fastapi import FastAPI

LEDGER = "ledger.sqlite"
ARGUMENTS = ("victim", "state", "name", "settings")


@dataclass(frozen=True)
class Spec:
    """One service.

    Attributes:
        victim: Folder of the victim; visible on every node that can run a replica.
        state: Folder of the service: keys, ledger, query log; visible on every node.
        name: Unique in the Ray cluster.
        settings: Its settings.
    """

    victim: Path
    state: Path
    name: str
    settings: HttpConfig


def application(spec: Spec) -> serve.Application:
    """Return the application that Ray Serve runs. Each replica is a complete service except for the ledger."""

    def asgi() -> FastAPI:
        return replica_app(spec)

    settings = spec.settings
    scaled = AutoscalingConfig(
        min_replicas=settings.replicas,
        max_replicas=max(settings.replicas, settings.max_replicas or 0),
        target_ongoing_requests=settings.ongoing_requests,
        downscale_delay_s=settings.idle_s,
    )
    ingress: Any = serve.ingress(asgi)()
    deployment: Any = serve.deployment(
        ingress,
        name="victim",
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        # Twice the target: a replica stays busy until an added replica is up.
        max_ongoing_requests=2 * settings.ongoing_requests,
        max_queued_requests=settings.queued_requests,
        autoscaling_config=scaled,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
    )
    bound: serve.Application = deployment.bind()
    return bound


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """Build the application from a Serve config file: ``import_path: mea_ray.service.http.deployment:build_app``.

    Args:
        args: ``victim`` (folder), and optionally ``state`` (folder), ``name`` and ``settings`` (see `HttpConfig`).

    Raises:
        ConfigError: An argument is missing or unknown.
    """
    unknown = sorted(set(args) - set(ARGUMENTS))
    if unknown or "victim" not in args:
        raise ConfigError(f"the service takes {', '.join(ARGUMENTS)}, and needs victim; got {sorted(args)}")
    victim = Path(str(args["victim"]))
    state = Path(str(args["state"])) if "state" in args else state_folder(victim)
    name = str(args.get("name") or service_name(state))
    return application(Spec(victim, state, name, build(HttpConfig, dict(args.get("settings") or {}))))


def replica_app(spec: Spec) -> FastAPI:
    """Return the ASGI application of one replica process."""
    from mea_ray.service.http.app import Api, create_app
    from mea_ray.service.http.engine import Engine, about_victim

    logging.getLogger("mea_ray.http").setLevel(logging.INFO)
    settings = spec.settings.serving
    engine = Engine(spec.victim, spec.name, settings, service_secret(spec.state), ledger_of(spec))
    keys = KeyRing(spec.state / KEYS)
    return create_app(Api(about_victim(spec.victim), engine, keys, settings, spec.settings))


def ledger_of(spec: Spec) -> Any:
    """Return the handle of the service's ledger; the first call starts it.

    Ray restarts it after its process died, and repeats the calls in flight.
    """
    spec.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    actor: Any = ray.remote(HttpLedger)
    description, secret = {"victim": spec.victim.name}, service_secret(spec.state)
    return actor.options(
        name=ledger_name(spec.name),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
    ).remote(str((spec.state / LEDGER).resolve()), spec.settings.rate, description, secret)
