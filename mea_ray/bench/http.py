"""Images per second and latency through HTTP, against the service in Ray and against the bare forward pass.

Everything is measured in one run, in turns, and compared by medians, as in `bench.service`. Beside the service an
application of Ray Serve and FastAPI that answers a constant gets the same image: the cost of the way there and back.
"""

from __future__ import annotations

import io
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx
import numpy as np
import ray
import torch
from fastapi import FastAPI, Request, Response

from mea_ray.blackbox.http import HttpBlackBox
from mea_ray.config import ClientConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.core.versions import versions
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.service.http import proxies
from mea_ray.service.http.deployment import Spec
from mea_ray.service.http.keys import KeyStore
from mea_ray.service.http.proxies import Proxy
from mea_ray.service.http.running import Address, RunningService
from mea_ray.service.http.settings import HttpConfig
from mea_ray.service.pool import VictimService
from mea_ray.sweep import cluster
from mea_ray.training.checkpoint import load_model, save_model
from mea_ray.training.device import device, use_threads


class _Asks(Protocol):
    def query(self, images: Images | FloatImages) -> Answers: ...


def bench_http(
    *,
    model: str = "vgg_like",
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    request_images: tuple[int, ...] = (1, 32, 256),
    clients: tuple[int, ...] = (1, 32),
    images: int = 512,
    single_images: int = 64,
    lone_images: int = 100,
    repeats: int = 3,
    cpus_per_replica: float = 0.25,
    proxy: Proxy = "auto",
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure the HTTP service, in the Ray of this process or in one started for it: one replica, beside one actor.

    The network has random weights: its speed does not depend on them. All clients are threads of this process.

    Args:
        model: Name in the table of models.
        shape: (channels, height, width) of one image.
        classes: Number of classes.
        request_images: Images in a request; each is measured.
        clients: Clients at once; each is measured.
        images: Images per repeat of a measurement.
        single_images: Images per repeat where a request holds one.
        lone_images: Requests of one image, one after the other, that the latency is measured on.
        repeats: Turns; medians are compared.
        cpus_per_replica: CPUs that a replica reserves; it computes on one thread however many.
        proxy: What stands before the replica, if a Ray is started: ``haproxy``, Ray Serve's own (``ray``), or HAProxy
            where it is available (``auto``).
        on_progress: Called with the measurement after each turn.

    Returns:
        Images per second (medians) as ``http_<images>_<clients>``, ``actors_<images>_<clients>`` and ``bare_<images>``;
        ``http_to_actors_<images>_<clients>``; ``latency_<http|constant|actors|bare>_<p50|p99>_ms`` of one image, where
        ``constant`` is an application of Ray Serve that computes nothing; ratios of the medians, ``lone_to_bare``,
        ``lone_above_constant_to_bare`` and ``lone_actors_to_bare``; ``fsync_ms``, the median time of a write to the
        ledger's disk; ``load``, the machine's mean number of runnable processes in the last minute; the settings,
        processors and versions.

    Raises:
        ConfigError: Ray has too few CPUs for the replica and the actor.
    """
    bulk = np.random.default_rng(0).integers(0, 256, (max(images, max(request_images)), *shape), dtype=np.uint8)
    threads = torch.get_num_threads()
    speeds: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    before = proxies.chosen(proxy, own_ray=not ray.is_initialized())
    with _services(model, shape, classes, cpus_per_replica, before) as (bare, open_http, open_actors, constant):
        use_threads(1)
        try:
            boxes: dict[str, list[_Asks]] = {}
            for size in request_images:
                flow = ClientConfig(request_images=size, max_in_flight=1)
                for kind, opened in (("http", open_http), ("actors", open_actors)):
                    boxes[f"{kind}_{size}"] = [opened(f"{size}-{index}", flow) for index in range(max(clients))]
            lone = {kind: boxes[f"{kind}_{min(request_images)}"][0] for kind in ("http", "actors")}
            lone["constant"] = constant
            for turn in range(repeats + 1):
                measured: dict[str, float] = {}
                for size in request_images:
                    number = single_images if size == 1 else images
                    measured[f"bare_{size}"] = _speed(number, partial(_forward, bare, bulk[:number], size))
                    for count in clients:
                        for kind in ("http", "actors"):
                            work = partial(_ask_shares, boxes[f"{kind}_{size}"][:count], bulk[:number], size)
                            measured[f"{kind}_{size}_{count}"] = _speed(number, work)
                asked = {kind: box.query for kind, box in lone.items()} | {"bare": partial(_forward, bare, batch=1)}
                latencies = _latencies(asked, bulk, lone_images)
                if turn == 0:  # it only warms everything up
                    continue
                for name, value in measured.items():
                    speeds.setdefault(name, []).append(value)
                for kind, seconds in latencies.items():
                    times.setdefault(kind, []).extend(seconds)
                if on_progress is not None:
                    on_progress("images/s: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
        finally:
            torch.set_num_threads(threads)
    return _summary(speeds, times, request_images, clients) | {
        "model": model,
        "proxy": before,
        "shape": shape,
        "repeats": repeats,
        "device": device().type,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "fsync_ms": _fsync_ms(),
        "versions": versions(),
    }


def table(measured: Mapping[str, Any]) -> str:
    """Return what `bench_http` measured as Markdown: images per second, and the latency of one image."""
    lines = [
        "| images a request | clients | HTTP, images/s | Ray actors, images/s | HTTP / actors | bare pass, images/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    pairs = [name.split("_")[1:] for name in measured if name.startswith("http_") and not name.startswith("http_to")]
    for size, clients in pairs:
        pair = f"{size}_{clients}"
        speeds = [f"{measured[name]:,.0f}" for name in (f"http_{pair}", f"actors_{pair}")]
        ratio, bare = f"{measured[f'http_to_actors_{pair}']:.2f}", f"{measured[f'bare_{size}']:,.0f}"
        lines.append(f"| {size} | {clients} | {' | '.join([*speeds, ratio, bare])} |")
    lines += ["", "| one image | p50, ms | p99, ms |", "| --- | ---: | ---: |"]
    for kind, words in {
        "http": "HTTP",
        "constant": "Ray Serve and FastAPI, answering a constant",
        "actors": "Ray actors",
        "bare": "bare pass",
    }.items():
        if f"latency_{kind}_p50_ms" not in measured:  # an older record
            continue
        p50, p99 = (f"{measured[f'latency_{kind}_p{percent}_ms']:.1f}" for percent in (50, 99))
        lines.append(f"| {words} | {p50} | {p99} |")
    return "\n".join(lines)


def _fsync_ms() -> float:
    """Return the median milliseconds of a small write to the disk of temporary files."""
    seconds = []
    with tempfile.NamedTemporaryFile(prefix="mea_ray_bench_") as file:
        for _ in range(50):
            file.write(bytes(4096))
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _summary(
    speeds: dict[str, list[float]], times: dict[str, list[float]], sizes: Sequence[int], clients: Sequence[int]
) -> dict[str, Any]:
    summary: dict[str, Any] = {name: statistics.median(values) for name, values in speeds.items()}
    for size in sizes:
        for count in clients:
            pair = f"{size}_{count}"
            summary[f"http_to_actors_{pair}"] = summary[f"http_{pair}"] / summary[f"actors_{pair}"]
    for kind, seconds in times.items():
        for percent in (50, 99):
            summary[f"latency_{kind}_p{percent}_ms"] = 1000 * float(np.percentile(seconds, percent))
    kinds = ("http", "actors", "constant", "bare")
    http, actors, constant, bare = (summary[f"latency_{kind}_p50_ms"] for kind in kinds)
    summary |= {
        "lone_to_bare": http / bare,
        "lone_above_constant_to_bare": (http - constant) / bare,
        "lone_actors_to_bare": actors / bare,
    }
    return summary


Opener = Callable[[str, ClientConfig], _Asks]


@contextmanager
def _services(
    model: str, shape: tuple[int, int, int], classes: int, cpus: float, proxy: Literal["haproxy", "ray"]
) -> Iterator[tuple[ImageModel, Opener, Opener, _Asks]]:
    """Start both services of one victim; give it, what opens a client of either, and what is answered a constant."""
    with ExitStack() as stack:
        stack.enter_context(cluster.quiet())
        stack.enter_context(cluster.environment(stack.enter_context(proxies.environment(proxy))))
        ray = stack.enter_context(cluster.ray_cluster(None))
        if ray.cluster_resources().get("CPU", 0) < 2 * cpus:
            raise ConfigError(f"the benchmark needs {2 * cpus:g} CPUs; lower cpus_per_replica")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mea_ray_bench_")))
        save_model(folder / "victim", build_model(model, shape, classes), {})
        settings = build(HttpConfig, {"cpus_per_replica": cpus, "ongoing_requests": 64})
        spec = Spec(folder / "victim", folder / "state", f"bench-{time.time_ns()}", settings)
        http = RunningService(spec, Address(port=_free_port()))
        stack.callback(http.stop)
        http.start()
        # The same passes and waits, so that only the way differs.
        actors = VictimService.start(folder / "victim", f"{spec.name}-actors", settings.serving)
        stack.callback(actors.stop)
        keys = KeyStore(spec.state)

        def open_http(name: str, flow: ClientConfig) -> _Asks:
            return HttpBlackBox(http.address.url, keys.add(name), flow)

        def open_actors(name: str, flow: ClientConfig) -> _Asks:
            actors.register(name)
            return actors.client(name, flow)

        bare, _ = load_model(folder / "victim")
        with _constant(http.address.url, classes) as constant:
            yield bare.to(device()).to(memory_format=torch.channels_last), open_http, open_actors, constant


class _Constant:
    """Asks an application that answers a constant, as `HttpBlackBox` asks the service."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url)

    def query(self, images: Images | FloatImages) -> Answers:
        body = io.BytesIO()
        np.save(body, images, allow_pickle=False)
        answer = self._http.post(
            "/constant/answer", content=body.getvalue(), headers={"Content-Type": "application/x-npy"}
        )
        answer.raise_for_status()
        answers: Answers = np.load(io.BytesIO(answer.content), allow_pickle=False)
        return answers


def _constant_app(classes: int) -> FastAPI:
    app, row = FastAPI(), io.BytesIO()
    np.save(row, np.zeros((1, classes), np.float32), allow_pickle=False)

    @app.post("/answer")
    async def answer(request: Request) -> Response:
        await request.body()
        return Response(row.getvalue(), media_type="application/x-npy")

    return app


@contextmanager
def _constant(url: str, classes: int) -> Iterator[_Asks]:
    """Serve a constant beside the services: the least that Ray Serve and FastAPI take for one image."""
    from ray import serve

    def asgi() -> FastAPI:
        return _constant_app(classes)

    ingress: Any = serve.ingress(asgi)()
    deployment: Any = serve.deployment(ingress, name="constant", ray_actor_options={"num_cpus": 0})
    serve.run(deployment.bind(), name="bench-constant", route_prefix="/constant")
    try:
        yield _Constant(url)
    finally:
        serve.delete("bench-constant", _blocking=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _speed(images: int, work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


def _latencies(asked: Mapping[str, Callable[[Images], Any]], bulk: Images, number: int) -> dict[str, list[float]]:
    """Return the seconds that each takes for one image; all are asked the same image before the next one.

    Asked in a row, a pass would find the processor's caches full of its weights, as no lone image does.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in asked}
    for index in range(number):
        image = bulk[index % len(bulk) : index % len(bulk) + 1]
        for kind, ask in asked.items():
            start = time.perf_counter()
            ask(image)
            seconds[kind].append(time.perf_counter() - start)
    return seconds


def _forward(model: ImageModel, images: Images, batch: int) -> None:
    where = device()
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            model(torch.from_numpy(images[start : start + batch]).to(where).float().div_(255)).cpu()


def _ask_shares(boxes: Sequence[_Asks], images: Images, size: int) -> None:
    """Let clients ask their shares in requests of a size, all at once."""
    parts = [images[start : start + size] for start in range(0, len(images), size)]

    def ask(index: int) -> None:
        for part in parts[index :: len(boxes)]:
            boxes[index].query(part)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(min(len(boxes), len(parts)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
