"""Additions to the generated OpenAPI description: bodies of several types, problem documents, examples."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from mea_ray.service.http.bodies import FORM, JPEG, JSON, NPY, PNG
from mea_ray.service.http.problems import CONTENT_TYPE, Problem
from mea_ray.service.http.replies import Predictions

_MEANINGS = {
    400: "The body cannot be read.",
    401: "There is no valid API key.",
    402: "The images exceed the remaining budget.",
    406: "The service does not offer any of the accepted content types.",
    409: "The Idempotency-Key was used for other images.",
    413: "The body or an image is too large.",
    415: "The type of the body is not accepted.",
    422: "The images or a header have the wrong form.",
    429: "The client exceeds its rate limit; see Retry-After.",
    500: "The service failed.",
    503: "The service cannot answer at the moment; see Retry-After.",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of responses with these codes."""
    schema = Problem.model_json_schema()
    return {
        code: {"description": _MEANINGS[code], "content": {CONTENT_TYPE: {"schema": schema}}} for code in sorted(codes)
    }


def common_responses() -> dict[int | str, dict[str, Any]]:
    """Return the responses that every route can give."""
    return refusals(500)


def predict_route(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the documentation of ``/v1/predict`` for images of a shape (channels, height, width)."""
    channels, height, width = shape
    nested: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 255}
    for side in (width, height, channels):
        nested = {"type": "array", "items": nested, "minItems": side, "maxItems": side}
    picture = base64.b64encode(_png(shape)).decode()
    json_body = {
        "type": "object",
        "required": ["images"],
        "additionalProperties": False,
        "properties": {
            "images": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "oneOf": [
                        {"type": "string", "format": "byte", "description": "A JPEG, PNG or .npy file in base64."},
                        {**nested, "description": "[channel][row][column]"},
                    ]
                },
            },
            "dtype": {
                "enum": ["uint8", "float32"],
                "default": "uint8",
                "description": "Type of nested lists: integers from 0 to 255, or numbers from 0 to 1.",
            },
        },
    }
    grey = np.full(shape, 128).tolist()
    examples = {
        "base64": {"summary": "Files in base64", "value": {"images": [picture]}},
        "lists": {"summary": "Nested lists", "value": {"images": [grey], "dtype": "uint8"}},
    }
    form = {
        "type": "object",
        "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
    }
    bodies = {
        JSON: {"schema": json_body, "examples": examples},
        JPEG: _BINARY,
        PNG: _BINARY,
        NPY: {"schema": {**_BINARY["schema"], "description": f"uint8 or float32 in [0, 1], (N, {channels}, {height}, "
              f"{width})"}},
        FORM: {"schema": form},
    }  # fmt: skip
    ok = {
        "model": Predictions,
        "description": "The answers, in the order of the images.",
        "headers": {
            "Idempotency-Key": {"description": "The id of the request.", "schema": {"type": "string"}},
        },
        "content": {
            JSON: {
                "example": {
                    "model": "flowers",
                    "policy": "probabilities",
                    "predictions": [{"label": 1, "class_name": "rose", "scores": [0.1, 0.9]}],
                },
            },
            NPY: {"schema": {"type": "string", "format": "binary"}},
        },
    }
    return {
        "responses": {200: ok, **refusals(400, 401, 402, 406, 409, 413, 415, 422, 429, 503)},
        "openapi_extra": {"requestBody": {"required": True, "content": bodies}},
        "response_model": None,
    }


def metrics_route() -> dict[str, Any]:
    """Return the documentation of ``/metrics``."""
    text = {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {"responses": {200: text, **refusals(503)}, "response_model": None}


@cache
def _png(shape: tuple[int, int, int]) -> bytes:
    """Return a grey PNG of the model's size, for the example."""
    _, height, width = shape
    stream = io.BytesIO()
    Image.new("L" if shape[0] == 1 else "RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()
