"""Third-party APIs as a black box: the format of their requests and answers, from a YAML file.

The file is a `ForeignApi`. A service of three classes that takes base64 PNGs and answers the two most probable ones:

    image_shape: [3, 32, 32]
    classes: [cat, dog, fox]
    path: /predict
    encoding: png_base64
    body: {instances: "{images}", top: 2}
    rows: predictions
    top: {items: labels, label: name, score: confidence}
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field, model_validator
from scipy.special import softmax

from mea_ray.blackbox.http import Described
from mea_ray.blackbox.policies import to_uint8
from mea_ray.config import build, load_tree
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import Settings
from mea_ray.core.types import Answers, FloatImages, Images

IMAGES, IMAGE, KEY = "{images}", "{image}", "{key}"  # noqa: RUF027 - places in a template
Encoding = Literal["png_base64", "jpeg_base64", "npy_base64", "lists", "png", "jpeg", "npy", "png_files"]


class TopChoice(Settings):
    """The location of the most probable classes in an answer."""

    items: str = Field("", description="Dotted path in a row to the list; empty if the row is the list.")
    label: str = Field("label", description="Member of an item with the name or the index of the class.")
    score: str = Field("score", description="Member of an item with its probability.")


class ForeignApi(Settings):
    """The format of an API's requests and answers."""

    image_shape: tuple[int, int, int] = Field(description="Channels, height and width to send.")
    classes: tuple[str, ...] = Field(min_length=2, description="Names of the classes as the API calls them, in order.")
    path: str = Field("", description="Path after the URL.")
    method: Literal["POST", "PUT"] = Field("POST", description="HTTP method.")
    headers: dict[str, str] = Field(default_factory=dict, description='Further headers; "{key}" stands for the key.')
    encoding: Encoding = Field("png_base64", description="How an image is written; png, jpeg, npy fill the whole body.")
    layout: Literal["chw", "hwc"] = Field("chw", description="Order of the axes of lists and arrays.")
    white: Literal[1, 255] = Field(255, description="Value of white in lists and arrays.")
    field: str = Field("file", description="Name of the form's field of png_files.")
    body: Any = Field(
        default_factory=lambda: {"images": IMAGES},
        description='JSON to send: "{images}" stands for the list of images, "{image}" for the only one.',
    )
    max_request_images: int = Field(1, ge=1, description="Maximum number of images per request.")
    rows: str = Field(
        "", description="Dotted path to the answers, one per image; empty if the body is the list. Dots in names: \\."
    )
    scores: str | None = Field(None, description="Dotted path in a row to one score per class: a list, or by name.")
    label: str | None = Field(None, description="Dotted path in a row to the name or the index of the class.")
    top: TopChoice | None = Field(None, description="The location of the most probable classes in a row.")
    logits: bool = Field(False, description="The scores are logits: a softmax makes them probabilities.")
    scale: float = Field(1.0, gt=0, description="Scores are divided by this: 100 for percentages.")
    idempotency_header: str | None = Field(None, description="Header for a request's id, if the API has one.")

    @model_validator(mode="after")
    def _one_way_to_read(self) -> ForeignApi:
        if sum(each is not None for each in (self.scores, self.label, self.top)) != 1:
            raise ValueError("set exactly one of scores, label and top: the location of the classes in an answer")
        if self.encoding in {"png", "jpeg"} and self.max_request_images != 1:
            raise ValueError(f"a body of encoding {self.encoding} holds one image; set max_request_images: 1")
        if self.image_shape[0] not in {1, 3} and self.encoding.startswith(("png", "jpeg")):
            raise ValueError(f"a picture has 1 or 3 channels, not {self.image_shape[0]}; choose lists or npy")
        return self


def load_api(path: Path) -> ForeignApi:
    """Read the description of an API.

    Raises:
        ConfigError: The file cannot be read, or a setting is wrong.
    """
    return build(ForeignApi, load_tree(path))


class ForeignWire:
    """The wire of an API that a `ForeignApi` describes; implements `http.Wire`.

    Args:
        api: The description.
        key: The API key, for ``headers``.
    """

    def __init__(self, api: ForeignApi, key: str | None = None) -> None:
        self.api = api
        self._headers = {name: value.replace(KEY, key or "") for name, value in api.headers.items()}
        self._places = {name: place for place, name in enumerate(api.classes)}

    def describe(self, get: Callable[[str], httpx.Response]) -> Described:
        """Return the description in the file; the API is not queried."""
        api = self.api
        return Described("foreign", len(api.classes), api.image_shape, api.max_request_images)

    def remaining(self, get: Callable[[str], httpx.Response]) -> int | None:
        """Return None: the budget of a third-party API is unknown."""
        return None

    def quote(self, requests: Sequence[tuple[str, int]]) -> tuple[str, Any] | None:
        """Return None: a third-party API gives no quotes."""
        return None

    def request(self, request_id: str, images: Images | FloatImages) -> dict[str, Any]:
        """See `http.Wire.request`."""
        api, headers = self.api, dict(self._headers)
        if api.idempotency_header is not None:
            headers[api.idempotency_header] = request_id
        call: dict[str, Any] = {"method": api.method, "url": api.path, "headers": headers}
        if api.encoding == "png_files":
            files = [_picture(image, "PNG") for image in to_uint8(images)]
            return {**call, "files": [(api.field, (f"{k}.png", file, "image/png")) for k, file in enumerate(files)]}
        if api.encoding in {"png", "jpeg"}:
            headers["Content-Type"] = f"image/{api.encoding}"
            return {**call, "content": _picture(to_uint8(images)[0], api.encoding.upper())}
        if api.encoding == "npy":
            headers["Content-Type"] = "application/x-npy"
            return {**call, "content": _npy(self._values(images))}
        return {**call, "json": _filled(api.body, self._encoded(images))}

    def answers(self, response: httpx.Response, images: int) -> Answers:
        """See `http.Wire.answers`."""
        rows = _at(response.json(), self.api.rows)
        if isinstance(rows, Mapping) and images == 1:
            rows = [rows]
        if not isinstance(rows, list) or len(rows) != images:
            raise ValueError(f"{self.api.rows or 'the body'} is not a list of {images} answers")
        return np.stack([self._row(row) for row in rows])

    def _row(self, row: Any) -> npt.NDArray[np.float32]:
        api, row_of_scores = self.api, np.zeros(len(self.api.classes), np.float32)
        if api.label is not None:
            row_of_scores[self._place(_at(row, api.label))] = 1
            return row_of_scores
        if api.top is not None:
            for item in _at(row, api.top.items):
                row_of_scores[self._place(_at(item, api.top.label))] = _at(item, api.top.score)
        else:
            scores = _at(row, api.scores or "")
            if isinstance(scores, Mapping):
                for name, score in scores.items():
                    row_of_scores[self._place(name)] = score
            elif len(scores) == len(row_of_scores):
                row_of_scores[:] = scores
            else:
                raise ValueError(f"{len(scores)} scores for {len(row_of_scores)} classes")
        if api.scale != 1:
            row_of_scores /= np.float32(api.scale)
        if api.logits:
            row_of_scores = softmax(row_of_scores.astype(np.float64)).astype(np.float32)
        return row_of_scores

    def _place(self, label: Any) -> int:
        if str(label) in self._places:  # first: an API can call its classes "1" to "10" and answer numbers
            return self._places[str(label)]
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self._places):
            return label
        raise ValueError(f"the answer names a class {str(label)[:60]!r} that `classes` does not list")

    def _encoded(self, images: Images | FloatImages) -> list[Any]:
        encoding = self.api.encoding
        if encoding == "lists":
            listed: list[Any] = self._values(images).tolist()
            return listed
        if encoding == "npy_base64":
            return [base64.b64encode(_npy(image)).decode() for image in self._values(images)]
        form = encoding.partition("_")[0].upper()
        return [base64.b64encode(_picture(image, form)).decode() for image in to_uint8(images)]

    def _values(self, images: Images | FloatImages) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = to_uint8(images)
        if self.api.white == 1:
            values = images / np.float32(255) if images.dtype == np.uint8 else images
        return values if self.api.layout == "chw" else np.ascontiguousarray(values.transpose(0, 2, 3, 1))


def _at(tree: Any, path: str) -> Any:
    r"""Return the value at a dotted path; a number is an index in a list, and ``\.`` a dot in a name.

    Raises:
        ValueError: There is no value; the message lists the existing members.
    """
    for part in re.split(r"(?<!\\)\.", path) if path else []:
        name = part.replace("\\.", ".")
        try:
            tree = tree[int(name)] if isinstance(tree, list) else tree[name]
        except (KeyError, IndexError, ValueError, TypeError):
            there = f"members {', '.join(map(str, list(tree)[:8]))}" if isinstance(tree, Mapping) else _kind(tree)
            raise ValueError(f"there is no {name!r} of {path!r} in the answer, which has {there}") from None
    return tree


def _kind(tree: Any) -> str:
    return f"a list of {len(tree)}" if isinstance(tree, list) else f"a {type(tree).__name__}"


def _filled(body: Any, images: list[Any]) -> Any:
    if body == IMAGES:
        return images
    if body == IMAGE:
        if len(images) != 1:
            raise ConfigError(f'the body has "{IMAGE}", which takes one image; set max_request_images: 1')
        return images[0]
    if isinstance(body, Mapping):
        return {name: _filled(value, images) for name, value in body.items()}
    return [_filled(each, images) for each in body] if isinstance(body, list) else body


def _picture(image: npt.NDArray[np.uint8], form: str) -> bytes:
    stream = io.BytesIO()
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    Image.fromarray(pixels).save(stream, form, **({"quality": 95} if form == "JPEG" else {}))
    return stream.getvalue()


def _npy(values: npt.NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()
