"""Response bodies: JSON with class names, or the plain numbers as ``.npy``."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from mea_ray.core.types import Answers
from mea_ray.service.http.bodies import JSON, NPY
from mea_ray.service.http.problems import Refusal


class Scored(BaseModel):
    """A class with its probability."""

    label: int = Field(description="Index of the class.")
    class_name: str = Field(description="Name of the class.")
    score: float = Field(description="Its probability, as revealed by the service.")


class Prediction(BaseModel):
    """The answer to one image. Its members depend on the service's answer policy, see /v1/model."""

    label: int | None = Field(None, description="Index of the most probable class.")
    class_name: str | None = Field(None, description="Name of the most probable class.")
    scores: list[float] | None = Field(None, description="One probability per class, in the order of /v1/model.")
    top: list[Scored] | None = Field(None, description="The most probable classes, in descending order.")
    embedding: list[float] | None = Field(None, description="The features of an encoder.")


class Predictions(BaseModel):
    """The answers to a request, in the order of its images."""

    model: str = Field(description="Name of the model.")
    policy: str = Field(description="The answer policy.")
    predictions: list[Prediction]


@dataclass(frozen=True)
class Replies:
    """Formats answers according to the policy.

    Attributes:
        model: Name of the model.
        policy: Name of the answer policy.
        source: The policy's input: ``probabilities`` or ``features``.
        class_names: One name per class.
        top: Number of revealed classes; None for all.
    """

    model: str
    policy: str
    source: str
    class_names: tuple[str, ...]
    top: int | None = None

    def tree(self, answers: Answers) -> dict[str, Any]:
        """Return the JSON of answers, float32 (N, K), see `Predictions`."""
        return {"model": self.model, "policy": self.policy, "predictions": [self._row(row) for row in answers]}

    def _row(self, row: Answers) -> dict[str, Any]:
        if self.source == "features":
            return {"embedding": row.tolist()}
        label = int(row.argmax())
        named: dict[str, Any] = {"label": label, "class_name": self.class_names[label]}
        if self.policy == "label_only":
            return named
        if self.top is None:
            return {**named, "scores": row.tolist()}
        order = np.argsort(-row, kind="stable")[: self.top]
        top = [{"label": int(k), "class_name": self.class_names[k], "score": float(row[k])} for k in order]
        return {**named, "top": top}


def npy(answers: Answers) -> bytes:
    """Return answers as a ``.npy`` file, float32 (N, K)."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(answers), allow_pickle=False)
    return stream.getvalue()


def wanted(accept: str | None) -> str:
    """Return the content type of an answer for an ``Accept`` header: JSON unless only ``.npy`` is accepted.

    Raises:
        Refusal: 406, neither is accepted.
    """
    ranges = [part.partition(";")[0].strip().lower() for part in (accept or "*/*").split(",")]
    if NPY in ranges and JSON not in ranges:
        return NPY
    if {JSON, "*/*", "application/*"} & set(ranges):
        return JSON
    raise Refusal(406, "accept", f"answers are {JSON} or {NPY}; accept one of them")
