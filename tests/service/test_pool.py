"""The victim behind Ray actors: answers, charges, refusals, merging, and deaths."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import ClientConfig, PolicyChoice, ServingConfig
from mea_ray.core.errors import (
    ArtifactError,
    BadQuery,
    ConfigError,
    OverBudget,
    RequestConflict,
    ServiceUnavailable,
    UnknownClient,
)
from mea_ray.core.types import BlackBox
from mea_ray.models.build import build_model
from mea_ray.service.naming import cause_of
from mea_ray.service.pool import VictimService
from mea_ray.training.checkpoint import load_model, save_model

SHAPE = (1, 8, 8)


def _images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = build_model("vgg_like", SHAPE, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("victim")
    save_model(path, model, {})
    return path


@pytest.fixture(scope="module")
def service(ray_session: None, folder: Path) -> Iterator[VictimService]:
    running = VictimService.start(
        folder,
        "shared",
        ServingConfig(replicas=2, cpus_per_replica=0.5, max_request_images=300, pass_images=16, max_batch_images=64),
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def expected(folder: Path) -> LocalBlackBox:
    return LocalBlackBox(load_model(folder)[0], pass_images=16)


def test_answers_charges_and_order(service: VictimService, expected: LocalBlackBox) -> None:
    service.register("order", 1000)
    client = service.client("order", ClientConfig(request_images=30, max_in_flight=3))
    assert isinstance(client, BlackBox)
    assert (client.classes, client.image_shape, client.remaining) == (10, SHAPE, 1000)
    images = _images(250)
    answers = client.query(images)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers, expected.query(images), rtol=1e-5, atol=1e-7)
    assert (service.charged("order"), client.remaining, client.asked) == (250, 750, 250)
    client.query(images[:10])
    assert service.charged("order") == 260, "asking again on purpose is charged again"
    resumed = service.client("order", ClientConfig(request_images=30), start_at=0)
    assert np.array_equal(resumed.query(images), answers)
    assert service.charged("order") == 260, "the same query, resumed, is not"


def test_client_travels_and_connects(service: VictimService) -> None:
    service.register("traveller", 100)
    client = pickle.loads(pickle.dumps(service.client("traveller")))

    def elsewhere(box: BlackBox, images: np.ndarray) -> np.ndarray:
        return box.query(images)

    images = _images(20)
    answers = ray.get(ray.remote(elsewhere).options(num_cpus=0).remote(client, images))
    again = VictimService.connect("shared", service.secret)
    assert np.array_equal(again.client("traveller", start_at=20).query(images), answers)
    assert again.charged("traveller") == 40
    with pytest.raises(ServiceUnavailable, match="no-such"):
        VictimService.connect("no-such", "secret")


def test_one_client_alone_and_many_merged_get_the_same_bits(service: VictimService) -> None:
    images = _images(96, seed=3)
    service.register("alone")
    alone = np.concatenate([service.client("alone", start_at=i).query(images[i : i + 1]) for i in range(96)])
    before = service.stats()

    def ask(index: int) -> np.ndarray:
        service.register(f"many{index}")
        client = service.client(f"many{index}", ClientConfig(request_images=1 + index % 5))
        mine = images[index::12]
        if index % 2:
            mine = mine.astype(np.float32) / np.float32(255)
        return client.query(mine)

    with ThreadPoolExecutor(12) as pool:
        for index, answers in enumerate(pool.map(ask, range(12))):
            assert np.array_equal(answers, alone[index::12])
    after = service.stats()
    assert after["images"] - before["images"] == 96
    assert after["passes"] - before["passes"] < after["requests"] - before["requests"], "nothing was merged"
    whole = service.client("alone", ClientConfig(request_images=96), start_at=96).query(images)
    assert np.array_equal(whole, alone)


NAN = np.full((1, *SHAPE), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    "images",
    [_images(2)[:, :, :4], _images(2).astype(np.float64), NAN, _images(0), _images(301), "images", None],
    ids=["shape", "dtype", "nan", "empty", "too many", "text", "nothing"],
)
def test_bad_queries_are_typed_uncharged_and_harmless(service: VictimService, images: object) -> None:
    service.register("bad", 1000)
    client = service.client("bad", ClientConfig(request_images=100))
    before = service.charged("bad")
    with pytest.raises(BadQuery) as caught:  # as the replica sees it
        client.request("some id", images)
    assert type(caught.value) is BadQuery
    if not (isinstance(images, np.ndarray) and len(images) == 301):
        with pytest.raises(BadQuery):  # as the client's own check sees it
            client.query(images)  # type: ignore[arg-type]
    assert service.charged("bad") == before
    client.query(_images(1))


def test_a_nan_does_not_reach_the_neighbours(service: VictimService, expected: LocalBlackBox) -> None:
    service.register("clean")
    service.register("dirty")
    clean, dirty = service.client("clean", ClientConfig(request_images=1)), service.client("dirty")
    stop = threading.Event()

    def spoil() -> int:
        refused = 0
        while not stop.is_set():
            with pytest.raises(BadQuery):
                dirty.request("x", NAN)
            refused += 1
        return refused

    with ThreadPoolExecutor(1) as pool:
        spoiler = pool.submit(spoil)
        answers = clean.query(_images(60, seed=5))
        stop.set()
        assert spoiler.result() > 0
    np.testing.assert_allclose(answers, expected.query(_images(60, seed=5)), rtol=1e-5, atol=1e-7)
    assert service.charged("dirty") == 0


def test_unknown_clients_and_conflicting_ids(service: VictimService) -> None:
    stranger = service.client("stranger", ClientConfig(request_images=10))
    for images in (_images(3), _images(30)):
        with pytest.raises(UnknownClient) as caught:
            stranger.query(images)
        assert type(caught.value) is UnknownClient
    with pytest.raises(UnknownClient):
        service.charged("stranger")
    service.register("conflict", 10)
    client = service.client("conflict")
    first = client.request("id", _images(3))
    assert np.array_equal(client.request("id", _images(3)), first)
    with pytest.raises(RequestConflict):
        client.request("id", _images(3, seed=1))
    assert service.charged("conflict") == 3


def test_over_budget_charges_nothing_and_keeps_what_it_has(service: VictimService) -> None:
    service.register("poor", 50)
    client = service.client("poor", ClientConfig(request_images=10, max_in_flight=2))
    first = client.query(_images(40))
    for images in (_images(11, seed=1), _images(10**4, seed=1)):
        with pytest.raises(OverBudget) as caught:
            client.query(images)
        assert type(caught.value) is OverBudget
        assert (caught.value.asked, caught.value.remaining, caught.value.budget) == (len(images), 10, 50)
    assert service.charged("poor") == 40
    assert np.array_equal(service.client("poor", ClientConfig(request_images=10)).query(_images(40)), first), (
        "what was paid for stays"
    )
    client.query(_images(10, seed=1))
    assert (service.charged("poor"), client.remaining) == (50, 0)
    with pytest.raises(ConfigError, match="below"):
        service.register("poor", 49)
    service.register("poor", 60)
    assert len(client.query(_images(10, seed=2))) == 10


def test_four_threads_on_one_client_are_charged_and_counted_exactly(service: VictimService) -> None:
    service.register("threads", 4 * 10 * 6)
    client = service.client("threads", ClientConfig(request_images=4, max_in_flight=2))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda seed: [client.query(_images(6, seed=seed)) for _ in range(10)], [0, 0, 1, 2]))
    assert client.asked == service.charged("threads") == 240 and client.remaining == 0
    assert service.query_log("threads").images == 240


@pytest.mark.parametrize("name", ["", "1" * 129, "a\x00b", "\ud800", 7])
def test_a_malformed_request_id_is_refused_and_stops_no_other(service: VictimService, name: Any) -> None:
    service.register("malformed", 10)
    with pytest.raises(BadQuery, match="a request id must"):
        service.client("malformed").request(name, _images(1))
    assert service.charged("malformed") == 0


def test_query_iter_yields_before_the_budget_ends(service: VictimService) -> None:
    """Another user of the account spends it meanwhile: what came before is kept, what follows is refused."""
    service.register("raced", 60)
    client = service.client("raced", ClientConfig(request_images=10, max_in_flight=1))
    got = []
    with pytest.raises(OverBudget):
        for answers in client.query_iter(_images(60)):
            got.append(answers)
            if len(got) == 2:
                service.client("raced", ClientConfig(request_images=40), request_prefix="other").query(
                    _images(30, seed=1)
                )
    assert 20 <= sum(map(len, got)) == client.asked <= 30
    assert service.charged("raced") <= 60


def test_two_clients_at_once_have_separate_budgets(service: VictimService) -> None:
    service.register("left", 300)
    service.register("right", 120)

    def spend(name: str) -> int:
        client = service.client(name, ClientConfig(request_images=7, max_in_flight=4))
        spent = 0
        try:
            for seed in range(100):
                spent += len(client.query(_images(30, seed=seed)))
        except OverBudget:
            return spent
        raise AssertionError("never over budget")

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(spend, ["left", "right"])) == [300, 120]
    assert (service.charged("left"), service.charged("right")) == (300, 120)


@pytest.mark.parametrize("victims", [[0], [0, 1]], ids=["one", "all"])
def test_killed_replicas_lose_and_double_nothing(service: VictimService, victims: list[int]) -> None:
    name = f"killed{len(victims)}"
    images = _images(400, seed=9)
    service.register("calm")
    calm = service.client("calm", ClientConfig(request_images=50)).query(images)
    service.register(name, 400)
    client = service.client(name, ClientConfig(request_images=4, max_in_flight=8))
    got = []
    for count, answers in enumerate(client.query_iter(images)):
        got.append(answers)
        if count == 20:
            for victim in victims:
                ray.kill(service.replicas[victim], no_restart=False)
    assert np.array_equal(np.concatenate(got), calm)
    assert service.charged(name) == 400


def test_killed_ledger_recovers_and_charges_nothing_twice(service: VictimService) -> None:
    service.register("ledger", 500)
    client = service.client("ledger", ClientConfig(request_images=4, max_in_flight=8))
    images = _images(400, seed=11)
    got = []
    for count, answers in enumerate(client.query_iter(images)):
        got.append(answers)
        if count in {10, 50}:
            ray.kill(service.ledger, no_restart=False)
    assert len(np.concatenate(got)) == 400
    assert service.charged("ledger") == 400
    assert client.remaining == 100
    with pytest.raises(OverBudget):
        client.query(_images(101))
    assert np.array_equal(service.client("ledger", ClientConfig(request_images=4)).query(images), np.concatenate(got))
    assert service.charged("ledger") == 400


def test_start_refuses_before_it_starts(service: VictimService, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        VictimService.start(tmp_path, "broken")
    with pytest.raises(ConfigError, match="is running"):
        VictimService.start(folder, "shared")
    with pytest.raises(ServiceUnavailable):
        VictimService.connect("broken", service.secret)
    with pytest.raises(ConfigError, match="request_images=301"):
        service.client("anyone", ClientConfig(request_images=301))


def test_second_service_in_a_placement_group_with_rate_policy_and_journal(
    service: VictimService, folder: Path, tmp_path: Path
) -> None:
    """Two services at once; this one is stopped, releases everything, and its journal is taken up by a third."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(VictimService.bundles(1, 0.25))
    ray.get(group.ready(), timeout=60)
    settings = ServingConfig(cpus_per_replica=0.25, policy=PolicyChoice(name="label_only"))
    limited = settings.changed(rate={"images_per_second": 20.0, "burst": 20})
    journal = tmp_path / "journal"
    free = ray.available_resources()["CPU"]
    second = VictimService.start(folder, "second", limited, ledger_path=journal, placement_group=group)
    assert ray.available_resources()["CPU"] == free, "it lives off its own group"
    second.register("thief", 100)
    client = second.client("thief", ClientConfig(request_images=10))
    start = time.monotonic()
    answers = client.query(_images(40))
    assert time.monotonic() - start > 0.9, "40 images at 20 a second after a burst of 20 take a second"
    assert set(np.unique(answers)) == {0.0, 1.0}
    second.stop()
    second.stop()
    remove_placement_group(group)
    with pytest.raises(ServiceUnavailable):
        client.query(_images(5))
    with pytest.raises(ServiceUnavailable):
        VictimService.connect("second", "secret")
    third = VictimService.start(folder, "second", settings, ledger_path=journal, detached=True)
    try:
        assert (third.clients(), third.charged("thief")) == (["thief"], 40)
        assert np.array_equal(third.client("thief", ClientConfig(request_images=10)).query(_images(40)), answers)
        assert third.charged("thief") == 40
    finally:
        third.stop()
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < free + 0.25 - 1e-6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] >= free + 0.25 - 1e-6
    assert service.client("second look").classes == 10


def test_an_actors_error_is_reported_in_one_line() -> None:
    wrapped = RayTaskError("charge_many", "File ...\nTraceback ...", OSError(28, "No space left on device"))
    assert cause_of(wrapped) == "[Errno 28] No space left on device"
    assert cause_of(ValueError("one\ntwo")) == "one" and cause_of(ValueError()) == "ValueError"
