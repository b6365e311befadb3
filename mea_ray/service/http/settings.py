"""Settings of the HTTP service."""

from __future__ import annotations

from pydantic import Field

from mea_ray.config.components import Config
from mea_ray.config.running import ServingConfig


class HttpLimits(Config):
    """Limits of requests to the HTTP service."""

    max_request_bytes: int = Field(64 * 2**20, ge=1024, description="Maximum size of a request's body, in bytes.")
    max_json_bytes: int = Field(
        8 * 2**20, ge=1024, description="Maximum size of a JSON body, in bytes: parsed lists take many times its size."
    )
    max_image_pixels: int = Field(
        2**24, ge=1, description="Maximum size of a JPEG or PNG, in pixels; checked before decoding."
    )


class HttpConfig(HttpLimits, ServingConfig):
    """A victim's HTTP service: limits, answers, and replicas.

    By default, a request waits to be merged with others only while a pass is computed, which costs no time.
    """

    small_passes: bool = Field(
        True, description="Compute few images in a smaller pass, of a size that was verified to give the same bits."
    )
    max_wait_ms: float = Field(
        0.0, ge=0, description="Maximum wait of a request for others if no pass is being computed, in seconds."
    )
    max_replicas: int | None = Field(
        None, ge=1, le=10_000, description="Maximum number of replicas under load; null keeps it at `replicas`."
    )
    ongoing_requests: int = Field(
        16, ge=1, description="Target number of requests in flight per replica, for autoscaling."
    )
    idle_s: float = Field(600.0, ge=0, description="Seconds of lower load after which an added replica is stopped.")
    queued_requests: int = Field(1000, ge=1, description="Maximum number of queued requests; further ones get a 503.")
    drain_s: float = Field(
        60.0, ge=0, description="Maximum wait for requests in flight when a replica stops, in seconds."
    )

    @property
    def serving(self) -> ServingConfig:
        """The settings of a replica."""
        return ServingConfig.part_of(self)
