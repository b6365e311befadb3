"""Local outlier factor: how sparse an image's surroundings are beside those of its nearest neighbours.

Used by the owner of an API, who answers abnormal queries otherwise (`blackbox.outliers`), and by a thief who sells the
stolen model and would notice the owner's test (`detection.queries`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ConfigError

Vectors = npt.NDArray[np.float32]


def check_outliers(neighbours: int, contamination: float | None, fitted: int) -> None:
    """Refuse settings that scikit-learn would refuse when it is too late.

    Raises:
        ConfigError: A value is out of its range.
    """
    if neighbours < 1 or fitted < 2:
        raise ConfigError(f"neighbours={neighbours} must be at least 1 and fitted={fitted} at least 2")
    if contamination is not None and not 0 < contamination <= 0.5:
        raise ConfigError(f"contamination={contamination} must lie in (0, 0.5]; null is scikit-learn's auto")


def fit_outliers(vectors: Vectors, neighbours: int, contamination: float | None) -> Any:
    """Learn what is normal.

    Args:
        vectors: Features or pixels of clean images, float32 (N, d), N >= 2.
        neighbours: Nearest neighbours that a density is estimated from; fewer if there are fewer.
        contamination: Part of ``vectors`` that lies outside, in (0, 0.5]; None is scikit-learn's ``auto``.

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
        # A tree computes each distance by itself; "brute" multiplies matrices, and then a row's last bits depend on
        # which rows came with it.
        algorithm="ball_tree",
    )
    return judge.fit(vectors)


def outside(judge: Any, vectors: Vectors) -> npt.NDArray[np.bool_]:
    """Return which vectors, float32 (N, d), are outliers: bool (N,), each by itself."""
    found: npt.NDArray[np.bool_] = judge.predict(vectors) < 0
    return found
