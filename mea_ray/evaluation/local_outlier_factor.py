"""Local outlier factor: the density around an image relative to the densities around its nearest neighbours.

The owner of an API uses it to answer abnormal queries differently (`blackbox.outliers`). A thief who sells the stolen
model uses it to notice the owner's test (`detection.queries`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


def fit_outliers(vectors: Vectors, neighbours: int, contamination: float | None) -> Any:
    """Fit the densities of clean images.

    Args:
        vectors: Features or pixels of clean images, float32 (N, d), N >= 2.
        neighbours: Nearest neighbours that a density is estimated from; fewer if there are fewer vectors.
        contamination: Fraction of ``vectors`` that count as outliers, in (0, 0.5]; None is scikit-learn's ``auto``.

    Returns:
        A fitted ``sklearn.neighbors.LocalOutlierFactor``.

    References:
        Breunig et al., LOF, SIGMOD 2000.
    """
    from sklearn.neighbors import LocalOutlierFactor

    judge = LocalOutlierFactor(
        n_neighbors=min(neighbours, max(1, len(vectors) - 1)),
        novelty=True,
        contamination="auto" if contamination is None else contamination,
        # "brute" multiplies matrices, so that the last bits of a row depend on the other rows of the batch. A tree
        # computes each distance by itself.
        algorithm="ball_tree",
    )
    return judge.fit(vectors)


def outside(judge: Any, vectors: Vectors) -> npt.NDArray[np.bool_]:
    """Return which vectors, float32 (N, d), are outliers: bool (N,). Each is judged by itself."""
    outliers: npt.NDArray[np.bool_] = judge.predict(vectors) < 0
    return outliers
