"""Images per second through the victim service, against the bare forward pass and against a service that never merges.

Everything is measured in one run, in turns (A, B, A, B, ...), and compared by medians: a machine that is busy for a
while slows all of it.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mea_ray.blackbox.passes import default_pass_images
from mea_ray.config import ClientConfig, ServingConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Images
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.service.client import ServiceClient
from mea_ray.service.pool import VictimService
from mea_ray.sweep import cluster
from mea_ray.training.checkpoint import load_model, save_model
from mea_ray.training.device import device, use_gpus, use_threads


def bench_service(
    *,
    model: str = "vgg_like",
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    request_images: int = 256,
    max_in_flight: int = 8,
    clients: int = 32,
    bulk_clients: int = 4,
    images: int = 2048,
    single_images: int = 512,
    repeats: int = 5,
    replicas: int = 1,
    cpus_per_replica: float = 0.25,
    gpus_per_replica: float = 0.0,
    pass_images: int | None = None,
    max_wait_ms: float = 2.0,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure the service, in the Ray of this process or in one started for it: three services of ``replicas`` each.

    The network has random weights: its speed does not depend on them. The bare forward pass converts uint8 images to
    float32 and computes logits in this process with as many threads as all replicas have, at the batch size that is
    fastest of the pass size and ``request_images``.

    Args:
        model: Name in the table of models.
        shape: (channels, height, width) of one image.
        classes: Number of classes.
        request_images: Images in a request of the bulk measurement.
        max_in_flight: Requests under way at once there.
        clients: Clients that ask one image at a time, each waiting for its answer.
        bulk_clients: Clients that share the images of the bulk measurement, all at once, against one that asks all.
        images: Images per repeat of the bulk measurement.
        single_images: Images per repeat of the single-image measurement with merging; without, fewer are asked.
        repeats: Turns; medians are compared.
        replicas: Replicas of each service.
        cpus_per_replica: CPUs that a replica reserves. It computes on one thread however many; the three services are
            measured in turn, so that little is enough, and a small machine holds them all.
        gpus_per_replica: GPUs of a replica.
        pass_images: Images in every pass; None chooses by device.
        max_wait_ms: Longest wait of an idle replica for more requests to fill a pass.
        on_progress: Called with the measurement after each turn.

    Returns:
        Images per second (medians): ``bare``, ``service`` (one client), ``service_many`` (``bulk_clients`` clients in
        all), ``merged``, ``unmerged`` (the same passes, one request each) and ``unmerged_small`` (passes of one image,
        one request each: other bits, but the least work for a single image); the ratios ``service_to_bare``,
        ``many_to_one``, ``merged_to_unmerged``, ``merged_to_unmerged_small``; ``bare_batch``, the batch size of
        ``bare``; ``mean_fill`` of the passes of ``merged``; and the settings.

    Raises:
        ConfigError: Ray has too few CPUs or GPUs for the three services.
    """
    use_gpus(gpus_per_replica * replicas)
    size = default_pass_images(device()) if pass_images is None else pass_images
    g = np.random.default_rng(0)
    bulk = g.integers(0, 256, (images, *shape), dtype=np.uint8)
    threads = torch.get_num_threads()
    common = ServingConfig(
        replicas=replicas,
        cpus_per_replica=cpus_per_replica,
        gpus_per_replica=gpus_per_replica,
        max_wait_ms=max_wait_ms,
        max_request_images=max(request_images, 1024),
    )
    variants: dict[str, dict[str, Any]] = {
        "merged": {"pass_images": size, "max_batch_images": max(256, size)},
        "unmerged": {"pass_images": size, "max_batch_images": 1},
        "unmerged_small": {"pass_images": 1, "max_batch_images": 1},
    }
    services: dict[str, VictimService] = {}
    with (
        cluster.quiet(),
        cluster.ray_cluster(None) as ray,
        tempfile.TemporaryDirectory(prefix="mea_ray_bench_") as folder,
    ):
        _check_room(ray.cluster_resources(), len(variants) * replicas, cpus_per_replica, gpus_per_replica)
        try:
            save_model(Path(folder), build_model(model, shape, classes), {})
            tag = f"bench-{time.time_ns()}"
            for name, settings in variants.items():
                services[name] = VictimService.start(folder, f"{tag}-{name}", common.changed(**settings))
                services[name].register("bulk")
            # After the services started: starting them must not find this process's threads.
            use_threads(replicas)
            bare, _ = load_model(Path(folder))
            # The replicas' memory format, which is the fastest: the comparison is of the service alone.
            bare = bare.to(device()).to(memory_format=torch.channels_last)
            flow = ClientConfig(request_images=request_images, max_in_flight=max_in_flight)
            stream = services["merged"].client("bulk", flow)
            streams = _streams(services["merged"], bulk_clients, flow)
            callers = {name: _callers(service, clients) for name, service in services.items()}
            singles = {"merged": single_images, "unmerged": max(clients, single_images // 8)}
            batches = sorted({size, request_images})
            speeds: dict[str, list[float]] = {}
            for turn in range(repeats + 1):
                measured: dict[str, float] = {}
                for batch in batches:
                    measured[f"bare_{batch}"] = _speed(images, partial(_forward, bare, bulk, batch))
                measured["service"] = _speed(images, partial(stream.query, bulk))
                measured["service_many"] = _speed(images, partial(_ask_shares, streams, bulk))
                for name, called in callers.items():
                    count = singles.get(name, single_images)
                    before = services[name].stats()
                    measured[name] = _speed(count, partial(_ask_singly, called, bulk[:count]))
                    if name == "merged":
                        measured["mean_fill"] = _fill(before, services[name].stats(), size)
                if turn == 0:  # it only warms everything up
                    continue
                for name, value in measured.items():
                    speeds.setdefault(name, []).append(value)
                if on_progress is not None:
                    on_progress("images/s: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
        finally:
            torch.set_num_threads(threads)
            for service in services.values():
                service.stop()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    bare_batch = max(batches, key=lambda batch: medians[f"bare_{batch}"])
    medians["bare"] = medians[f"bare_{bare_batch}"]
    return {
        **medians,
        "service_to_bare": medians["service"] / medians["bare"],
        "many_to_one": medians["service_many"] / medians["service"],
        "merged_to_unmerged": medians["merged"] / medians["unmerged"],
        "merged_to_unmerged_small": medians["merged"] / medians["unmerged_small"],
        "bare_batch": bare_batch,
        "model": model,
        "shape": shape,
        "pass_images": size,
        "request_images": request_images,
        "clients": clients,
        "bulk_clients": bulk_clients,
        "repeats": repeats,
        "device": device().type,
    }


def _speed(images: int, work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


def _fill(before: dict[str, float], after: dict[str, float], size: int) -> float:
    return (after["images"] - before["images"]) / max(1.0, size * (after["passes"] - before["passes"]))


def _forward(model: ImageModel, images: Images, batch: int) -> None:
    where = device()
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            model(torch.from_numpy(images[start : start + batch]).to(where).float().div_(255)).cpu()


def _callers(service: VictimService, clients: int) -> list[ServiceClient]:
    for index in range(clients):
        service.register(f"single-{index}")
    one_by_one = ClientConfig(request_images=1, max_in_flight=1)
    return [service.client(f"single-{index}", one_by_one) for index in range(clients)]


def _streams(service: VictimService, clients: int, flow: ClientConfig) -> list[ServiceClient]:
    for index in range(clients):
        service.register(f"bulk-{index}")
    return [service.client(f"bulk-{index}", flow) for index in range(clients)]


def _ask_shares(streams: list[ServiceClient], images: Images) -> None:
    """Let every client ask its share of the images, in requests as large as one client's, all clients at once."""
    _at_once(
        [
            partial(stream.query, part)
            for stream, part in zip(streams, np.array_split(images, len(streams)), strict=True)
        ]
    )


def _ask_singly(callers: list[ServiceClient], images: Images) -> None:
    """Let every client ask its share of the images, one after the other, all clients at once."""

    def ask(index: int) -> None:
        for image in range(index, len(images), len(callers)):
            callers[index].query(images[image : image + 1])

    _at_once([partial(ask, index) for index in range(len(callers))])


def _at_once(calls: list[Callable[[], Any]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _check_room(resources: Mapping[str, float], replicas: int, cpus: float, gpus: float) -> None:
    for kind, each in {"CPU": cpus, "GPU": gpus}.items():
        there = resources.get(kind, 0.0)
        if replicas * each > there:
            raise ConfigError(
                f"the benchmark holds {replicas} replicas of {each:g} {kind} each, and Ray has {there:g}; set "
                f"{kind.lower()}s_per_replica to {there / replicas:.2g} or less"
            )
