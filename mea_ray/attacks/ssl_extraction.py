"""Extraction by images chosen in self-supervised features: a walk that spreads over them and avoids outliers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from sklearn.neighbors import NearestNeighbors
from torch import nn

from mea_ray.attacks.base import MakeModel
from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief
from mea_ray.config import PretextChoice
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.training.engine import train

Count = Annotated[int, Field(ge=1)]
Rows = npt.NDArray[np.float32]
REFERENCES = 2000
"""Most images among which neighbours are searched for."""


class SslExtraction(QueryAttack):
    """Learn features of the pool without labels, and query along a greedy random walk that spreads over them.

    Choose it for few queries against a mark that lies on unusual images.

    An encoder of the substitute's kind is trained on the pool by ``pretext``; this sends no query. In its features,
    scaled to length 1, each step of the walk draws ``proposals`` images of the pool and goes to the one that lies
    farthest from all that were visited. The images with the largest mean distance to their ``neighbours`` nearest, a
    share ``outliers``, come last: what looks like no other image may be a watermark. Substitutes start from the
    encoder's weights, with a fresh head, unless ``warm_start`` is off.

    Only the paper's abstract was at hand. It states features of self-supervised learning, a greedy random walk that
    makes a well-dispersed set of queries, and that watermark patterns are outliers there. How the walk proposes, the
    measure of an outlier and the warm start are this project's.

    Args:
        pretext: How the features are learnt.
        pretext_epochs: Epochs of it; null takes those of ``thief.training``.
        proposals: Images that a step of the walk chooses from; 1 is a random order.
        neighbours: Nearest images that an outlier is far from.
        outliers: Share of the pool that is queried last.
        warm_start: Whether substitutes start from the encoder.
        query_chunk: Images in a query; the answers of one are on the disk before the next is sent.

    References:
        Luan et al., Dataset Reduction and Watermark Removal via Self-supervised Learning for Model Extraction Attack,
        NDSS (abstract), https://www.ndss-symposium.org/ndss-paper/
        dataset-reduction-and-watermark-removal-via-self-supervised-learning-for-model-extraction-attack.
    """

    needs_features = True

    def __init__(
        self,
        *,
        pretext: PretextChoice = PretextChoice(name="simclr"),
        pretext_epochs: Count | None = None,
        proposals: Count = 32,
        neighbours: Count = 10,
        outliers: Annotated[float, Field(ge=0, lt=1)] = 0.05,
        warm_start: bool = True,
        query_chunk: Count = 1024,
    ) -> None:
        self.pretext, self.pretext_epochs, self.warm_start = pretext, pretext_epochs, warm_start
        self.proposals, self.neighbours, self.outliers = proposals, neighbours, outliers
        self.query_chunk = query_chunk

    def queries(self, thief: Thief) -> Queries:
        """Query the pool along the walk; nothing depends on the answers."""
        encoder = self._encoder(thief)
        features = unit(metrics.features(encoder, thief.pool))
        if self.warm_start:
            thief.make_model = partial(_started, thief.make_model, encoder)
        last = most_isolated(features, self.neighbours, self.outliers, derive(thief.seed, "references"))
        order = walk(features, last, self.proposals, derive(thief.seed, "walk"))
        while chunk := [position for position, _ in zip(order, range(self.query_chunk), strict=False)]:
            yield np.array(chunk, np.int64)

    def _encoder(self, thief: Thief) -> ImageModel:
        encoder = thief.new_model("encoder")
        assert isinstance(encoder, ImageModel)
        changes: dict[str, Any] = {"augment": (), "early_stop_patience": None}
        if self.pretext_epochs is not None:
            changes["epochs"] = self.pretext_epochs
        train(
            encoder,
            thief.pool,
            None,
            self.pretext.build(),
            thief.training.changed(**changes),
            seed=derive(thief.seed, "encoder"),
            snapshots=thief.snapshots("encoder"),
        )
        return encoder


def _started(make: MakeModel, encoder: ImageModel) -> nn.Module:
    """Build a substitute with the encoder's weights and a head of its own."""
    model = make()
    assert isinstance(model, ImageModel)
    head = {id(parameter) for parameter in model.head.parameters()}
    learnt = dict([*encoder.named_parameters(), *encoder.named_buffers()])
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if id(value) not in head:
                value.copy_(learnt[name])
    return model


def unit(features: Rows) -> Rows:
    """Scale rows to length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    scaled: Rows = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled


def most_isolated(features: Rows, neighbours: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return which images are outliers, bool (N,): those with the largest mean distance to their nearest.

    Args:
        features: (N, d).
        neighbours: How many nearest images count; fewer if there are fewer.
        share: Of the images, rounded down.
        seed: Seed of the ``REFERENCES`` images among which neighbours are looked for, if there are more.
    """
    drawn = numpy_generator(seed, "drawn").permutation(len(features))[:REFERENCES]
    count = min(neighbours + 1, len(drawn))
    distances, nearest = NearestNeighbors(n_neighbors=count).fit(features[drawn]).kneighbors(features)
    itself = drawn[nearest] == np.arange(len(features))[:, None]
    # An image that is no reference itself has one neighbour too many: its farthest is left out.
    itself[~itself.any(1), -1] = True
    means = np.where(itself, 0.0, distances).sum(1) / max(1, count - 1)
    isolated = np.zeros(len(features), np.bool_)
    isolated[np.argsort(-means, kind="stable")[: int(share * len(features))]] = True
    return isolated


def walk(features: Rows, last: npt.NDArray[np.bool_], proposals: int, seed: int) -> Iterator[int]:
    """Visit every image once, and yield its position: first those that are not ``last``.

    Each step draws ``proposals`` unvisited images, or all if there are fewer, and visits the one whose nearest visited
    image is farthest; of equals the one that was drawn first.
    """
    generator = numpy_generator(seed, "steps")
    nearest = np.full(len(features), np.inf)
    for part in (np.flatnonzero(~last), np.flatnonzero(last)):
        left = generator.permutation(part)
        while len(left):
            drawn = generator.choice(len(left), size=min(proposals, len(left)), replace=False)
            chosen = drawn[int(nearest[left[drawn]].argmax())]
            position = int(left[chosen])
            yield position
            # The last one takes its place: all that is left is drawn from anyway.
            left[chosen] = left[-1]
            left = left[:-1]
            nearest = np.minimum(nearest, ((features - features[position]) ** 2).sum(1))
