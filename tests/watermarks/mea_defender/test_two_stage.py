"""The authors' procedure: composition of both stages, contrastive term, the sum of the losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax
from watermark_sets import NAMES, Spy, coded_set, context, image_set, main_batch

from mea_ray.core.errors import ConfigError
from mea_ray.training.objective import Batch
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.mea_defender.losses import contrastive
from mea_ray.watermarks.mea_defender.two_stage import balanced


def stages(train: Any = None, first: Any = None, second: Any = None, **options: Any) -> Any:
    few = {"fixed_samples": 6}
    scheme = WATERMARKS.build(
        "mea_defender_two_stage", first={**few, **(first or {})}, second={**few, **(second or {})}, **options
    )
    train = train or image_set()
    made = scheme.stages(scheme.make_key(train, 0), train)
    for stage in made:
        stage.objective.start(context())
        stage.objective.start_epoch(0)
    return made


def by_loop(logits: Any, labels: Any, classes: Any, margin: Any = 1.0) -> Any:
    remaining = [(z, y) for z, y in zip(logits.tolist(), labels.tolist(), strict=True) if y in classes]
    total, pairs = 0.0, len(remaining) - 1
    for (a, y), (b, t) in zip(remaining, remaining[1:], strict=False):
        squared = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        total += 0.5 * squared if y == t else 0.5 * max(0.0, margin - np.sqrt(squared + 1e-9)) ** 2
    return total / pairs / pairs


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_contrastive_term_is_divided_by_the_pairs_twice(scale: Any) -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(scale * rng.standard_normal((30, 6)), dtype=torch.float64)
    labels = torch.tensor(rng.integers(0, 6, 30))
    assert contrastive(logits, labels, (0, 1, 2)).item() == pytest.approx(by_loop(logits, labels, {0, 1, 2}), rel=1e-5)


@pytest.mark.parametrize("labels", [[5, 5, 5], [5, 0, 5]])
def test_contrastive_term_without_a_pair_is_0_and_has_a_gradient(labels: Any) -> None:
    logits = torch.randn(3, 6, requires_grad=True)
    value = contrastive(logits, torch.tensor(labels), (0, 1, 2))
    assert value.item() == 0
    assert (torch.autograd.grad(value, logits)[0] == 0).all()


def test_stages_have_the_authors_constants() -> None:
    embed, secure = stages(image_set(600))
    assert (embed.name, secure.name) == ("embed", "secure")
    shared = {"optimizer": "adam", "schedule": "step", "step_epochs": 10, "step_factor": 0.5, "accumulate_steps": 2}
    for stage, rate in ((embed, 1e-3), (secure, 1e-4)):
        assert stage.overrides.items() >= {**shared, "learning_rate": rate, "augment": ("flip",)}.items()
        assert "epochs" not in stage.overrides
    # 50,000 items in stage 1; 22,500 + 10,000 + 4,000 in stage 2, of 50,000.
    assert len(embed.train) == 600 and len(secure.train) == round(600 * 36500 / 50000)
    assert np.bincount(embed.train.labels).tolist() == [100] * 6
    assert stages(first={"epochs": 3}, second={"epochs": 4})[1].overrides["epochs"] == 4


def test_normals_are_class_balanced_and_use_the_data_rate() -> None:
    train = coded_set(60)
    uneven = train.take(np.r_[0:60, [0] * 30])
    half = balanced(uneven, 0.5, 240, 0)
    assert np.bincount(half.labels).tolist() == [40] * 6
    colours, counts = np.unique(half.images[:, 0, 0, 0], return_counts=True)
    of_class_1 = counts[np.isin(colours, train.of_class(1)[:, 0, 0, 0])]
    assert len(of_class_1) == 5 and set(of_class_1.tolist()) == {8}
    assert np.bincount(balanced(train, 1.0, 8, 0).labels).tolist() == [2, 2, 1, 1, 1, 1]


def big_batch(train: Any, count: Any = 3000) -> Any:
    index = np.arange(count) % len(train)
    return Batch(
        torch.from_numpy(train.images[index]).float() / 255,
        torch.from_numpy(train.labels[index]),
        torch.from_numpy(index),
    )


def kind(image: Any, labels: Any) -> Any:
    """(what, classes) of an image of a coded set: normal, or a mix of two images."""
    colours = [int(c) for c in np.unique((image * 255).round().int()) if c]
    return "normal" if len(colours) == 1 else "mix", sorted(labels[c] for c in colours)


def test_stage_1_puts_one_watermark_sample_in_a_hundred() -> None:
    train = coded_set()
    labels = {int(c): int(k) for c, k in zip(train.images[:, 0, 0, 0], train.labels, strict=True)}
    batch = big_batch(train)
    images, targets = stages(train)[0].objective.compose(batch)
    mixes = 0
    for image, target, own, main in zip(images, targets.tolist(), batch.labels.tolist(), batch.images, strict=True):
        what, classes = kind(image, labels)
        if what == "mix":
            assert classes == [0, 1] and target == 2
            mixes += 1
        else:
            assert target == own and torch.equal(image, main)
    assert 12 <= mixes <= 54, "1 % of 3000: 30, within 4.4 standard deviations"


def test_stage_2_has_the_authors_composition() -> None:
    train = coded_set()
    labels = {int(c): int(k) for c, k in zip(train.images[:, 0, 0, 0], train.labels, strict=True)}
    images, targets = stages(train)[1].objective.compose(big_batch(train))
    rows = [(kind(i, labels)[0], t) for i, t in zip(images, targets.tolist(), strict=True)]
    counts = {t: sum(r == ("mix", t) for r in rows) for t in range(6)}
    total = 36500
    for label, expected in {2: 10000 / total, 0: 2000 / total, 1: 2000 / total}.items():
        spread = np.sqrt(3000 * expected * (1 - expected))
        assert abs(counts[label] - 3000 * expected) < 4 * spread, (label, counts)
    assert counts[3] == counts[4] == counts[5] == 0
    # Watermarks are cut across, the others never are.
    for image, (what, target) in zip(images, rows, strict=True):
        if what == "mix" and target == 2:
            assert (image[0] == image[0, :, :1]).all() and not torch.equal(image[0, 0], image[0, -1])
    evasive = torch.stack([i for i, (w, t) in zip(images, rows, strict=True) if w == "mix" and t != 2])[:, 0]
    left_right = (evasive == evasive[:, :1]).flatten(1).all(1).float().mean().item()
    assert left_right == pytest.approx(2 / 5, abs=0.1), "left/right is two of the authors' five"


def test_evasion_samples_come_from_their_own_small_pool() -> None:
    train = coded_set(600 // 6 * 2)
    secure = stages(train, evasion_pool=0.1)[1].objective
    first, second = secure.evasion_sources.draw(200)
    assert len(first.flatten(1)[:, 0].unique()) == len(second.flatten(1)[:, 0].unique()) == round(0.1 * 34)


def test_terms_and_total_are_the_authors_sum() -> None:
    objective = stages(first={"mixes": 0.2})[0].objective
    torch.manual_seed(0)
    spy = Spy()
    terms = objective.terms(spy, main_batch())
    images, clean, mixes = spy.seen
    logits = spy.layer(clean.flatten(1)).detach().double().numpy()
    c = softmax(spy.layer(mixes.flatten(1)).detach().double().numpy(), axis=1)
    a, b = softmax(logits[:6], axis=1), softmax(logits[6:], axis=1)
    expected = np.mean(rel_entr(c, a).sum(1)) + np.mean(rel_entr(c, b).sum(1))
    assert terms["distill"].item() == pytest.approx(expected, rel=1e-4)

    parameters = list(spy.parameters())

    def gradient(term: Any) -> Any:
        return torch.cat([g.flatten() for g in torch.autograd.grad(term, parameters, retain_graph=True)]).double()

    first, second = terms["task"], terms["contrastive"] + terms["distill"]
    g1, g2, gd = gradient(first), gradient(second), gradient(terms["distill"])
    n1 = g1 / (min(first.item() * g1.norm().item(), 10) + 1e-5)
    n2 = g2 / (min(second.item() * g2.norm().item(), 10) + 1e-5)
    v11, v12, v22 = (n1 @ n1).item(), (n1 @ n2).item(), (n2 @ n2).item()
    gamma = 0.999 if v12 >= v11 else 0.001 if v12 >= v22 else (v22 - v12) / (v11 + v22 - 2 * v12)
    value = objective.backward(terms, spy)
    assert value.item() == pytest.approx((first + (1 - gamma) * second + 2 * terms["distill"]).item(), rel=1e-4)
    got = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()
    torch.testing.assert_close(got, g1 + (1 - gamma) * g2 + 2 * gd, atol=1e-5, rtol=1e-3)


def test_divergences_move_the_mixes_only() -> None:
    objective = stages()[0].objective
    spy = Spy()
    grads = torch.autograd.grad(objective.terms(spy, main_batch())["distill"], spy.layer.weight)[0]
    _, clean, mixes = spy.seen
    fixed = spy.layer(clean.flatten(1)).detach()
    z = spy.layer(mixes.flatten(1))
    sides = [
        (F.softmax(z, 1) * (F.log_softmax(z, 1) - F.log_softmax(side, 1))).sum(1).mean() for side in fixed.chunk(2)
    ]
    by_hand = sides[0] + sides[1]
    torch.testing.assert_close(grads, torch.autograd.grad(by_hand, spy.layer.weight)[0], atol=1e-6, rtol=1e-4)


def test_fixed_samples_stay_fixed_and_can_be_drawn_from() -> None:
    objective = stages()[0].objective
    spy = Spy()
    objective.terms(spy, main_batch())
    objective.terms(spy, main_batch())
    assert torch.equal(spy.seen[1], spy.seen[4]) and torch.equal(spy.seen[2], spy.seen[5])
    spy = Spy()
    stages(loss={"fixed_batch": 2})[0].objective.terms(spy, main_batch())
    assert [len(x) for x in spy.seen] == [12, 4, 2]


def test_divergences_weigh_12_in_every_tenth_epoch_and_2_else() -> None:
    objective = stages()[0].objective
    got = []
    for epoch in range(20):
        objective.start_epoch(epoch)
        got.append(objective.distill_weight)
    assert got == ([2] * 9 + [12]) * 2


@pytest.mark.parametrize(
    "options",
    [
        {"first": {"data_rate": 0}},
        {"second": {"data_rate": 1.5}},
        {"first": {"normals": 0}},
        {"second": {"mixes": -0.1}},
        {"first": {"fixed_samples": 0}},
        {"first": {"epochs": 0}},
        {"second": {"learning_rate": 0}},
        {"loss": {"fixed_batch": 0}},
        {"loss": {"distill_pulse": -1}},
        {"loss": {"distill_period": 0}},
    ],
)
def test_impossible_constants_are_refused(options: Any) -> None:
    ((group, setting),) = options.items()
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"{group}.{name}={value}"):
        WATERMARKS.build("mea_defender_two_stage", **options)


def test_old_flat_names_go_on_with_a_warning_for_each() -> None:
    old = {
        "stage1_epochs": 3,
        "stage2_learning_rate": 2e-4,
        "stage2_evasion": 0.1,
        "step_epochs": 5,
        "augment": ("crop",),
        "contrastive_margin": 2.0,
        "gradient_normalisation": "l2",
    }
    with pytest.warns(FutureWarning) as caught:
        scheme = WATERMARKS.build("mea_defender_two_stage", **old)
    assert len(caught) == len(old)
    assert (scheme.first.epochs, scheme.second.learning_rate, scheme.second.evasion) == (3, 2e-4, 0.1)
    assert (scheme.update.step_epochs, scheme.update.augment) == (5, ("crop",))
    assert (scheme.loss.contrastive_margin, scheme.loss.normalisation) == (2.0, "l2")
    assert scheme.first.mixes == 0.01, "what is not named keeps its default"


def test_both_stages_train_with_the_engine_and_follow_their_seed() -> None:
    from keyword_training import train

    from mea_ray.models.build import build_model

    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build_model("vgg_like", (1, 16, 16), len(NAMES), {"width": 0.1})
        for stage in stages(first={"epochs": 2}, second={"epochs": 1}):
            report = train(
                model, stage.train.images, stage.train.labels, stage.objective, seed=3, batch_size=16, **stage.overrides
            )
            assert report.epochs == stage.overrides["epochs"]
            assert {"task", "contrastive", "distill"} <= report.history[-1].keys()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
