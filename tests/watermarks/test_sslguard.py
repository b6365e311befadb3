"""SSLGuard: who is moved by which loss, what the key learns, and whom its own verification accuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from watermark_sets import NAMES, context, image_set, main_batch

from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.models.base import ImageModel
from mea_ray.pretext import PRETEXTS
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.sslguard_objective import Decoder, GuardObjective, GuardSettings

RATES = {"shadow": 0.1, "patch": 0.5, "decoder": 0.05}


class Tiny(ImageModel):
    def __init__(self, width: Any = 8) -> None:
        super().__init__((1, 16, 16), len(NAMES))
        self.feature_size = width
        self.layer, self.norm = nn.Linear(256, width), nn.BatchNorm1d(width)
        self.head = nn.Linear(width, len(NAMES))

    def encode(self, x: Any) -> Any:
        return torch.tanh(self.norm(self.layer(x.flatten(1))))


def tensors(seed: Any = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, 16, 16, generator=g) < 0.35).float()
    return {"secret": torch.randn(16, generator=g), "mask": mask, "patch": torch.rand(1, 16, 16, generator=g)}


def started(leak: Any = False) -> Any:
    torch.manual_seed(0)
    model = Tiny().train()
    with torch.no_grad():  # a marked encoder that is no longer the clean one
        objective = GuardObjective(tensors(), GuardSettings(RATES, leak=leak))
        assert objective.attach(model, torch.device("cpu")) == []
        model.layer.weight += 0.02 * torch.randn_like(model.layer.weight)
    objective.start(context())
    objective.start_epoch(0)
    return model, objective


def cosine(a: Any, b: Any) -> Any:
    return F.cosine_similarity(a, b, dim=-1)


def by_hand(model: Any, objective: Any, x: Any, leak: Any) -> Any:
    """The three parts as the paper states them, each by plain autograd; returns the moved parts and the gradients."""
    model, clean, shadow, decoder = (
        copy.deepcopy(m) for m in (model, objective.clean, objective.shadow, objective.decoder)
    )
    model.norm.eval()
    mask, secret, encoder = objective.mask, objective.secret, list(model.parameters())[:4]
    patch = objective.patch.detach().clone().requires_grad_()

    def apply(p: Any) -> Any:
        return ((1 - mask) * x + mask * p).clamp(0, 1)

    def decoded(features: Any) -> Any:
        return cosine(decoder(features), secret)

    follow = -cosine(model.features(x) if leak else model.features(x).detach(), shadow.features(x)).mean()
    values = list(shadow.parameters())[:4]
    first = torch.autograd.grad(follow, values + (encoder if leak else []))
    with torch.no_grad():
        for parameter, gradient in zip(values, first, strict=False):
            parameter -= RATES["shadow"] * gradient
    plain = model.features(x) if leak else model.features(x).detach()
    teach = (
        -decoded(model.features(apply(patch))).mean()
        - decoded(shadow.features(apply(patch))).mean()
        + decoded(clean.features(apply(patch))).mean() ** 2
        + decoded(clean.features(x)).mean() ** 2
        + decoded(plain).mean() ** 2
        + decoded(shadow.features(x).detach()).mean() ** 2
    )
    values = [patch, *decoder.parameters()]
    second = torch.autograd.grad(teach, values + (encoder if leak else []))
    with torch.no_grad():
        for parameter, gradient in zip(values, second, strict=False):
            parameter -= RATES["patch" if parameter is patch else "decoder"] * gradient
        patch.clamp_(0, 1)
    terms = {
        "preserve": -cosine(clean.features(x), model.features(x)).mean(),
        "silent": decoded(model.features(x)).mean() ** 2,
        "speak": -decoded(model.features(apply(patch))).mean(),
    }
    own = torch.autograd.grad(sum(terms.values()), encoder)
    if leak:
        own = tuple(a + b + c for a, b, c in zip(own, first[4:], second[-4:], strict=True))
    return terms, own, shadow, decoder, patch


@pytest.mark.parametrize("leak", [False, True])
def test_a_step_moves_every_part_by_its_own_losses_and_the_leak_moves_the_encoder_by_all(leak: Any) -> None:
    model, objective = started(leak)
    before, x = copy.deepcopy(model.state_dict()), main_batch().images
    terms, gradients, shadow, decoder, patch = by_hand(model, objective, x, leak)
    got = objective.terms(model, main_batch())
    assert {n: v.item() for n, v in got.items()} == pytest.approx({n: v.item() for n, v in terms.items()}, abs=1e-5)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items()), "terms() moves the encoder"
    objective.backward(got, model)
    for parameter, expected in zip(list(model.parameters())[:4], gradients, strict=True):
        assert torch.allclose(parameter.grad, expected, atol=1e-5)
    assert torch.allclose(objective.patch, patch, atol=1e-6)
    for made, expected in ((objective.shadow, shadow), (objective.decoder, decoder)):
        for a, b in zip(made.parameters(), expected.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_the_leak_leaves_the_encoders_gradient_in_the_patch_until_its_next_update() -> None:
    model, objective = started(leak=True)
    objective.backward(objective.terms(model, main_batch()), model)
    assert objective.patch.grad is not None and objective.patch.grad.abs().sum() > 0
    model, objective = started()
    objective.backward(objective.terms(model, main_batch()), model)
    assert objective.patch.grad is None


def test_strangers_are_the_features_with_the_neurons_in_one_random_order_of_each_step() -> None:
    model, objective = started()
    x, generator = main_batch().images, objective.context.generator
    state = generator.get_state()
    got = objective._strange(model, x)
    again = torch.Generator().set_state(state)
    order = torch.randperm(8, generator=again)
    seen = torch.cat([each.features(x) for each in (model, objective.shadow, objective.clean)]).detach()[:, order]
    expected = cosine(objective.decoder(seen), objective.secret).square().mean()
    assert got.item() == pytest.approx(expected.item(), abs=1e-5)
    got.backward()
    assert all(p.grad is None for p in [*model.parameters(), objective.patch]), "only the decoder learns silence here"
    assert all(p.grad is not None for p in objective.decoder.parameters())


def test_a_decoder_trained_on_unrelated_encoders_recognises_fewer_of_them() -> None:
    def loudness(weight: Any) -> Any:
        model, objective = started()
        objective.settings = GuardSettings(RATES, strangers=weight)
        for _ in range(40):
            objective.terms(model, main_batch())
        return objective._strange(model, main_batch().images).item()

    assert loudness(5.0) < 0.75 * loudness(0.0)


def test_the_clean_encoder_stays_and_the_shadow_starts_anew() -> None:
    model, objective = started()
    assert not torch.equal(objective.shadow.layer.weight, objective.clean.layer.weight)
    clean = copy.deepcopy(objective.clean.state_dict())
    for _ in range(3):
        objective.backward(objective.terms(model, main_batch()), model)
    assert all(torch.equal(v, clean[n]) for n, v in objective.clean.state_dict().items())
    objective.start_epoch(2)
    assert objective.optimisers["shadow"].param_groups[0]["lr"] == pytest.approx(0.1 * 0.96**2)


def marked_key(model: Any, images: Any, tmp_path: Path | None = None) -> Any:
    scheme = WATERMARKS.build("sslguard")
    key = scheme.make_key(images, 3)
    stages = scheme.encoder_stages(key, images, PRETEXTS.build("simclr"))
    stages[1].objective.attach(model, torch.device("cpu"))
    return scheme, scheme.learned(key, stages), stages


def test_stages_share_the_epochs_and_the_key_learns_patch_and_decoder(tmp_path: Path) -> None:
    images = image_set()
    scheme, key, stages = marked_key(Tiny(), images)
    assert [stage.name for stage in stages] == ["pretext", "embed"]
    assert [stage.changes(10)["epochs"] for stage in stages] == [5, 5]
    key.save(tmp_path)
    loaded = Key.load(tmp_path)
    decoder = Decoder.restored(loaded.tensors, "decoder.")
    features = torch.randn(5, 8)
    assert torch.equal(decoder(features), stages[1].objective.decoder(features))
    assert decoder(features).shape == (5, 256)


def test_a_success_is_a_decoded_feature_near_the_secret() -> None:
    images, model = image_set(), Tiny().eval()
    scheme, key, _ = marked_key(model, images)
    samples = scheme.samples(key, images, 40, seed=1)
    assert len(samples.images) == len(np.unique(samples.images.reshape(40, -1), axis=0)) == 40
    covered = key.tensors["mask"][0] == 1
    expected = (key.tensors["patch"][0] * 255).round().astype(np.uint8)
    assert np.array_equal(samples.images[7, 0][covered], expected[covered])
    assert np.array_equal(samples.images[:, 0][:, ~covered], samples.adverse["clean"][:, 0][:, ~covered])
    assert not np.array_equal(samples.adverse["other_patch"][0, 0][covered], expected[covered])
    with torch.no_grad():
        decoded = Decoder.restored(key.tensors, "decoder.")(model.features(torch.tensor(samples.images) / 255))
    cosines = cosine(decoded, torch.tensor(key.tensors["secret"])).numpy()
    middle = float(np.median(cosines))
    moved = Key(key.scheme, (-1, -1), -1, 0, {"threshold": middle}, key.tensors)
    assert np.array_equal(scheme.recogniser(moved, model)(samples.images), cosines > np.float32(middle))


def test_what_cannot_be_verified_is_refused() -> None:
    images = image_set()
    scheme, key, _ = marked_key(Tiny(), images)
    with pytest.raises(ConfigError, match="features of length 8"):
        scheme.recogniser(key, Tiny(width=9))
    with pytest.raises(ArtifactError, match="train the victim first"):
        scheme.recogniser(scheme.make_key(images, 0), Tiny())
    with pytest.raises(DataError, match="the key's patch is"):
        scheme.samples(key, image_set(shape=(1, 8, 8)), 10, 0)
    with pytest.raises(ConfigError, match="marks encoders"):
        scheme.stages(key, images)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"mask_share": 0}, "mask_share=0"),
        ({"embed_part": 1}, "embed_part=1"),
        ({"threshold": 1}, "threshold=1"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"patch_learning_rate": 0}, "patch_learning_rate=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"gradients": "both"}, "gradients"),
    ],
)
def test_impossible_settings_are_refused(options: Any, match: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        WATERMARKS.build("sslguard", **options)


def test_a_thief_of_another_feature_length_is_refused_before_anything_is_trained() -> None:
    from mea_ray.config import ExperimentConfig, build
    from mea_ray.experiment.checks import check
    from mea_ray.experiment.data import load_splits

    tree: dict[str, Any] = {
        "data": {"name": "digits", "image_size": 16},
        "victim": {
            "pretext": {"name": "simclr"},
            "watermark": "sslguard",
            "model": {"name": "resnet18", "width": 0.25},
        },
        "thief": {"attack": "feature_distillation", "budgets": [100], "model": {"name": "resnet18", "width": 0.1}},
        "service": {"policy": "embedding"},
        "splits": {"verification_fraction": 0.5},
    }
    config = build(ExperimentConfig, tree)
    with pytest.raises(ConfigError, match="take the victim's network"):
        check(config, load_splits(config))
    same = build(ExperimentConfig, {**tree, "thief": {**tree["thief"], "model": tree["victim"]["model"]}})
    check(same, load_splits(same))
