"""The carrier scheme: what it adds to the paper's objective, and the old names of its options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from watermark_sets import NAMES, Spy, image_set, main_batch, started

from mea_ray.core.errors import ConfigError
from mea_ray.training.objective import Batch
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.mea_carrier.losses import carrier, exclusion

OFF: dict[str, Any] = {
    "carrier": {"weight": 0.0, "gate": {"share": 0.0}},
    "exclusion": {"weight": 0.0},
    "bridge": {"weight": 0.0},
}


def objective(**options: Any) -> Any:
    """The objective of the embedding stage, without a warm-up, and with ``OFF`` but for what is given."""
    return started("mea_carrier", **{"warmup": 0.0, **OFF, **options})


def softened(batch: Batch, rho: float, sigma: float = 0.0) -> Tensor:
    """Labels of the main batch with the carrier on classes 0 and 1, and the bridge on class 2, one by one."""
    soft = np.eye(len(NAMES))[batch.labels]
    for k, label in enumerate(batch.labels.tolist()):
        if label in (0, 1):
            soft[k] = 0
            soft[k, label], soft[k, 2] = 1 - rho, rho
        elif label == 2:
            soft[k, :3] = sigma / 2, sigma / 2, 1 - sigma
    return torch.tensor(soft)


def test_the_papers_losses_on_mixes_are_off_unless_set() -> None:
    assert set(started("mea_carrier", warmup=0.0).terms(Spy(), main_batch())) == {
        *("utility", "ver", "carrier", "exclusion", "bridge")
    }
    terms = objective(com={"weight": 0.1}, eva={"weight": 1.0}).terms(Spy(), main_batch())
    assert set(terms) == {"utility", "com", "ver", "eva"}


def test_without_its_own_terms_it_is_the_papers_scheme() -> None:
    values = []
    for name, options in (
        ("mea_defender", {}),
        ("mea_carrier", {**OFF, "com": {"weight": 0.1}, "eva": {"weight": 1.0}}),
    ):
        torch.manual_seed(0)
        spy = Spy()
        target = started(name, warmup=0.0, **options)
        terms = target.terms(spy, main_batch())
        values.append([name, *terms, *(t.item() for t in terms.values()), target.backward(terms, spy).item()][1:])
    assert values[0] == values[1]


def test_terms_on_drawn_sources_are_the_losses_of_their_parts() -> None:
    spy = Spy()
    target = objective(
        carrier={"weight": 1.0, "rho": 0.3, "labels": "extra", "gate": {"share": 0.0}},
        exclusion={"weight": 1.0, "margin": 2.0, "scope": "source"},
        com={"weight": 0.1},
        samples={"mixes": 4},
    )
    terms = target.terms(spy, main_batch())
    _, _, first, second = spy.layer(spy.seen[0].flatten(1)).split([12, 4, 4, 4])
    labels, sources = torch.tensor([0] * 4 + [1] * 4), torch.cat([first, second])
    assert list(terms) == ["utility", "com", "ver", "carrier", "exclusion"], "in the order in which they are added"
    assert terms["carrier"].item() == pytest.approx(carrier(sources, labels, 2, 0.3).item(), rel=1e-5)
    assert terms["exclusion"].item() == pytest.approx(exclusion(sources, labels, (0, 1), 2.0).item(), rel=1e-5)


@pytest.mark.parametrize("term", ["carrier", "exclusion"])
def test_a_term_on_drawn_sources_draws_them(term: str) -> None:
    spy = Spy()
    on = {"weight": 1.0, "labels": "extra", "gate": {"share": 0.0}} if term == "carrier" else {"weight": 1.0}
    terms = objective(**{term: on}, ver={"weight": 0.0}).terms(spy, main_batch())
    assert set(terms) == {"utility", term}
    assert len(spy.seen[0]) == 12 + 32


def test_softened_main_labels_add_up_to_a_cross_entropy_towards_rho() -> None:
    spy, batch = Spy(), main_batch()
    target = objective(carrier={"weight": 1.0, "rho": 0.4, "gate": {"share": 0.0}}, ver={"weight": 0.0})
    terms = target.terms(spy, batch)
    assert len(spy.seen) == 1 and len(spy.seen[0]) == 12, "no further image is drawn"
    expected = F.cross_entropy(spy.layer(batch.images.flatten(1)), softened(batch, 0.4))
    assert (terms["utility"] + terms["carrier"]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_bridge_softens_the_target_and_exclusion_then_reads_the_main_batch_itself() -> None:
    spy, batch = Spy(), main_batch()
    target = objective(
        carrier={"weight": 1.0, "rho": 0.4, "gate": {"share": 0.0}},
        exclusion={"weight": 1.0, "margin": 5.0, "scope": "all"},
        bridge={"weight": 1.0, "sigma": 0.3},
        ver={"weight": 0.0},
    )
    terms = target.terms(spy, batch)
    assert len(spy.seen[0]) == 12, "no further image is drawn"
    logits = spy.layer(batch.images.flatten(1))
    expected = F.cross_entropy(logits, softened(batch, 0.4, 0.3))
    got = terms["utility"] + terms["carrier"] + terms["bridge"]
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    rows = batch.labels < 2
    hinge = exclusion(logits[rows], batch.labels[rows], (0, 1), 5.0, target=2)
    assert terms["exclusion"].item() == pytest.approx(hinge.item(), rel=1e-5)


def test_the_carrier_does_not_wait_for_the_warm_up() -> None:
    waiting = objective(warmup=0.9, carrier={"weight": 1.0, "labels": "extra", "gate": {"share": 0.0}})
    assert set(waiting.terms(Spy(), main_batch())) == {"utility", "carrier"}


@pytest.mark.parametrize(
    "options,match",
    [
        ({"carrier": {"rho": 0.5}}, "carrier.rho=0.5"),
        ({"carrier": {"rho": 0.0}}, "carrier.rho=0.0"),
        ({"bridge": {"sigma": 0.6}}, "bridge.sigma=0.6"),
        ({"exclusion": {"margin": -1}}, "exclusion.margin=-1"),
        ({"warmup": 1.0}, r"warmup=1\.0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        WATERMARKS.build("mea_carrier", **options)


def test_old_flat_names_go_on_with_a_warning_for_each() -> None:
    old = {
        "weight_carrier": 2.0,
        "carrier_rho": 0.3,
        "carrier_labels": "replace",
        "carrier_gate": 0.1,
        "carrier_gate_odds": 1.0,
        "carrier_gate_part": 0.2,
        "weight_exclusion": 0.2,
        "exclusion_margin": 3.0,
        "exclusion_scope": "source",
        "weight_bridge": 0.5,
        "bridge_sigma": 0.2,
    }
    with pytest.warns(FutureWarning) as caught:
        scheme = WATERMARKS.build("mea_carrier", **old)
    assert len(caught) == len(old)
    now = WATERMARKS.build(
        "mea_carrier",
        carrier={"weight": 2.0, "rho": 0.3, "labels": "replace", "gate": {"share": 0.1, "odds": 1.0, "part": 0.2}},
        exclusion={"weight": 0.2, "margin": 3.0, "scope": "source"},
        bridge={"weight": 0.5, "sigma": 0.2},
    )
    assert scheme.settings == now.settings


def test_keys_and_samples_are_those_of_the_papers_scheme() -> None:
    keys = [WATERMARKS.build(name).make_key(image_set(), 4) for name in ("mea_defender", "mea_carrier")]
    assert keys[0].settings == keys[1].settings and keys[0].seed == keys[1].seed
    assert [key.scheme for key in keys] == ["mea_defender", "mea_carrier"]
