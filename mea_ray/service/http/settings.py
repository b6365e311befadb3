"""Settings of the HTTP service."""

from __future__ import annotations

from pydantic import Field

from mea_ray.config.components import Config
from mea_ray.config.running import ServingConfig


class HttpLimits(Config):
    """What the HTTP service accepts."""

    max_request_bytes: int = Field(64 * 2**20, ge=1024, description="Largest body of a request, in bytes.")
    max_json_bytes: int = Field(8 * 2**20, ge=1024, description="Largest JSON body: lists take many times its memory.")
    max_image_pixels: int = Field(2**24, ge=1, description="Largest JPEG or PNG, in pixels; read before it is decoded.")


class HttpConfig(HttpLimits, ServingConfig):
    """A victim's HTTP service: what it accepts, what it answers, and its replicas.

    A request waits for others to merge with only while a pass is computed: then waiting costs it nothing.
    """

    small_passes: bool = Field(
        True, description="Compute few images in a smaller pass, of sizes that were found to give the same bits."
    )
    max_wait_ms: float = Field(0.0, ge=0, description="Longest wait of a request for others, if no pass is under way.")
    max_replicas: int | None = Field(
        None, ge=1, le=10_000, description="Replicas under load at most; null never adds any to `replicas`."
    )
    ongoing_requests: int = Field(
        16, ge=1, description="Requests under way in a replica that the number of replicas is chosen for."
    )
    idle_s: float = Field(600.0, ge=0, description="Seconds of less load after which an added replica ends.")
    queued_requests: int = Field(1000, ge=1, description="Requests that wait for a replica; further ones get a 503.")
    drain_s: float = Field(60.0, ge=0, description="Longest wait for requests under way when a replica stops, seconds.")

    @property
    def serving(self) -> ServingConfig:
        """The settings of a replica."""
        return ServingConfig.part_of(self)
