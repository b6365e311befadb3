"""Without its token no account is used, and without the secret none is opened, charged or read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch

from mea_ray.blackbox.ledger import Charge
from mea_ray.config import ServingConfig
from mea_ray.core.errors import QueryError, UnknownClient, WrongToken
from mea_ray.models.build import build_model
from mea_ray.service.accounts import Account, account, check_account, new_secret
from mea_ray.service.client import ServiceClient
from mea_ray.service.pool import VictimService
from mea_ray.training.checkpoint import save_model

SHAPE = (1, 8, 8)
IMAGES = np.zeros((2, *SHAPE), np.uint8)


@pytest.fixture(scope="module")
def service(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VictimService]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("victim")
    save_model(folder, build_model("vgg_like", SHAPE, 10, {"width": 0.0625}), {})
    running = VictimService.start(folder, "guarded", ServingConfig(cpus_per_replica=0.5, pass_images=8))
    running.register("rich", 100)
    running.register("poor", 1)
    yield running
    running.stop()


def test_tokens_differ_by_client_and_by_service_and_are_not_stored() -> None:
    one, other = new_secret(), new_secret()
    assert account(one, "a") == account(one, "a")
    assert len({account(one, "a").token, account(one, "b").token, account(other, "a").token}) == 3
    assert check_account(one, account(one, "a")) == check_account(one, tuple(account(one, "a"))) == "a"


@pytest.mark.parametrize(
    "given",
    ["a", None, 7, (), ("a",), ("a", None), ("a", 1), ("a", ""), ("a", "\ud800"), ("\ud800", "x"), ("a", b"0"), [1, 2]],
)
def test_anything_but_the_token_is_refused(given: Any) -> None:
    with pytest.raises(WrongToken, match="has no valid token"):
        check_account(new_secret(), given)


def test_a_foreign_account_is_neither_used_nor_read(service: VictimService) -> None:
    poor = service.account("poor")
    for claimed in (
        Account("rich", poor.token),
        Account("rich", ""),
        Account("rich", service.account("rich").token[:-1]),
    ):
        thief = ServiceClient("guarded", claimed)
        with pytest.raises(WrongToken):
            thief.query(IMAGES)
        with pytest.raises(WrongToken):
            _ = thief.remaining
    assert service.charged("rich") == 0 and service.stats()["images"] == 0
    # The right token of a client that nobody registered opens nothing either.
    with pytest.raises(UnknownClient):
        service.client("nobody").query(IMAGES)
    assert service.clients() == ["poor", "rich"]
    assert service.client("rich").query(IMAGES).shape == (2, 10)
    assert service.charged("rich") == 2


def test_who_finds_the_actors_without_the_secret_opens_charges_and_reads_nothing(service: VictimService) -> None:
    token = service.account("poor").token
    ledger = ray.get_actor("guarded/ledger", namespace="mea_ray")
    before = service.charged("poor"), service.charged("rich"), service.query_log("rich")
    charge = Charge("rich", "r", 50, "0" * 32)
    for guess in ("", token, "0" * 64, None, 7, b"0"):
        for call, *arguments in (
            ("register", "mine", None),
            ("register", "poor", 10**6),
            ("charge_many", [charge]),
            ("note", []),
            ("charged", "rich"),
            ("seen", "rich"),
            ("clients",),
        ):
            with pytest.raises(WrongToken):
                try:
                    ray.get(getattr(ledger, call).remote(guess, *arguments))
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
    assert service.clients() == ["poor", "rich"]
    assert (service.charged("poor"), service.charged("rich"), service.query_log("rich")) == before


@pytest.mark.parametrize("images", [0, -1, -100, 1.5, True, "2", 2**60])
def test_nobody_is_charged_less_than_an_image(service: VictimService, images: Any) -> None:
    before = service.charged("rich")
    charge = Charge("rich", f"less-{images}", images, "0" * 32)
    (refusal,) = ray.get(service.ledger.charge_many.remote(service.secret, [charge]))
    assert isinstance(refusal, QueryError) and service.charged("rich") == before
