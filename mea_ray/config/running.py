"""The settings of how an experiment is run: service, tracking, machines.

They do not affect the victim, so they are not part of artifacts' names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from mea_ray.config.components import Config, PolicyChoice
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import RefusedSettings

SMALLEST_SHARE = 1e-4
"""Ray counts resources in steps of this size."""


def _share(value: float) -> float:
    if 0 < value < SMALLEST_SHARE:
        raise ValueError(f"Ray counts in steps of {SMALLEST_SHARE:g}; give at least that")
    return value


def _gpus(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("Ray gives a process a fraction of one GPU, or several whole ones; above 1, give an integer")
    return value


Cpus = Annotated[float, AfterValidator(_share)]
Gpus = Annotated[float, AfterValidator(_share), AfterValidator(_gpus)]


class RateConfig(Config):
    """Token bucket per client."""

    images_per_second: float = Field(gt=0, description="Sustained rate.")
    burst: int = Field(1000, ge=1, description="Images that can be queried at once after a pause.")


class ServingConfig(Config):
    """A victim's service: its replicas, and its answers."""

    replicas: int = Field(1, ge=1, le=10_000, description="Number of replica actors of the victim.")
    cpus_per_replica: Cpus = Field(1.0, ge=0, description="CPUs reserved for one replica, which computes on one.")
    gpus_per_replica: Gpus = Field(0.0, ge=0, description="GPUs of one replica; can be a fraction.")
    max_batch_images: int = Field(
        256, ge=1, description="Maximum number of images merged into one pass; 1 disables merging."
    )
    max_wait_ms: float = Field(
        2.0, ge=0, description="Maximum wait of a request for others to merge with, in milliseconds."
    )
    pass_images: int | None = Field(
        None, ge=1, description="Fixed number of images in a forward pass (padded); null chooses by device."
    )
    small_passes: bool = Field(
        False,
        description="Compute few images in a smaller pass, of a size that a replica verifies at its start to give "
        "the same bits: lower latency for single images.",
    )
    max_request_images: int = Field(1024, ge=1, description="Maximum number of images in one request.")
    policy: PolicyChoice = Field(
        default_factory=lambda: PolicyChoice(name="probabilities"), description="Answer policy: what an answer reveals."
    )
    rate: RateConfig | None = Field(None, description="Rate limit per client; null for no limit.")
    query_log_images: int = Field(
        2000,
        ge=0,
        description="Owner's log: number of a client's first images whose distances are judged; 0 only counts.",
    )


class ClientConfig(Config):
    """The client of a service: how the thief sends its requests."""

    request_images: int = Field(256, ge=1, description="Images per request.")
    max_in_flight: int = Field(8, ge=1, description="Maximum number of requests in flight.")
    request_timeout_s: float = Field(
        120.0, gt=0, description="Timeout for one answer before the request is repeated, in seconds."
    )
    retries: int = Field(5, ge=0, description="Maximum number of repetitions of a request after failures.")


class BlackBoxConfig(Config):
    """A query API that someone else runs."""

    url: str = Field(min_length=1, description="URL of a service of `mea-ray serve`, or of the API in `api`.")
    key: tuple[str, ...] = Field(
        (),
        description="Where to read the API key, one per account: env:NAME or file:PATH. Never the key itself, since "
        "configs are stored beside results.",
    )
    api: str | None = Field(None, description="YAML file that describes a third-party API; null means `mea-ray serve`.")

    @field_validator("url")
    @classmethod
    def _of_the_web(cls, value: str) -> str:
        scheme, separator, rest = value.partition("://")
        if scheme.lower() not in {"http", "https"} or not separator or not rest.strip("/"):
            raise ValueError("it is not an http or https URL; give one like http://127.0.0.1:8000")
        return value

    @field_validator("key")
    @classmethod
    def _by_reference(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if each.partition(":")[0] not in {"env", "file"} or not each.partition(":")[2]:
                # The value is not shown, since it may be the key.
                raise RefusedSettings(
                    ConfigError("write env:NAME or file:PATH, not the key itself: configs are stored beside results")
                )
        return value


class ServiceConfig(ClientConfig, ServingConfig):
    """The victim's service on Ray actors, and the thief's client."""

    @property
    def serving(self) -> ServingConfig:
        """The settings of the service alone: trials with equal ones can share a service."""
        return ServingConfig.part_of(self)

    @property
    def client(self) -> ClientConfig:
        """The settings of the thief's client alone."""
        return ClientConfig.part_of(self)


class TrackingConfig(Config):
    """Weights & Biases."""

    wandb: Literal["offline", "online", "disabled"] = Field("offline", description="Mode; online needs an account.")
    project: str = Field("mea_ray", description="W&B project.")
    entity: str | None = Field(None, description="W&B entity; null means the account's default.")
    live: bool = Field(
        True, description="Start a trial's W&B run with the trial, and log losses, queries and rungs while it runs."
    )
    log_models: bool = Field(True, description="Log the victim and the substitutes as linked artifacts.")
    group: Literal["victim", "seed", "setting"] = Field(
        "victim", description="How runs are grouped in W&B; `group.*` in their config has all three."
    )
    runs_per_minute: float = Field(
        60.0,
        gt=0,
        description="online: maximum number of runs started per minute and node; W&B limits an account's rate.",
    )


class RoleResources(Config):
    """Ray resources reserved for one process of a role."""

    cpus: Cpus = Field(1.0, gt=0, description="CPUs.")
    gpus: Gpus = Field(0.0, ge=0, description="GPUs; can be a fraction.")


class ResourcesConfig(Config):
    """Resources per role. Those of services are set in `service`."""

    victim: RoleResources = Field(
        default_factory=RoleResources, description="One training of a victim or a null model."
    )
    trial: RoleResources = Field(default_factory=RoleResources, description="One trial: a thief and its verification.")
    storage_patience_s: float = Field(
        300.0, ge=0, description="Seconds to wait for a full or unavailable storage before a trial fails."
    )
    snapshot_every_s: float | None = Field(
        60.0,
        ge=0,
        description="Minimum number of seconds between two snapshots of a training; a killed one continues from the "
        "last, bit for bit. Snapshots are written after an epoch. null writes none.",
    )
    py_modules: tuple[str, ...] | None = Field(
        None,
        description="Your own packages (folders, .py or .whl files) that Ray sends to its workers; null sends the "
        "packages of components named package.module:Attribute that are not installed.",
    )
    placement: Literal["pack", "spread"] = Field(
        "pack",
        description="Placement of the services' replicas: packed on as few nodes as possible, which Ray also fills "
        "with trials first; or spread over the nodes, so that the failure of a node leaves the others.",
    )
