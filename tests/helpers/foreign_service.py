"""An API that is not of mea_ray: pictures in JSON, names of classes in the answers, and its description."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fastapi import FastAPI, HTTPException, Request
from PIL import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class ForeignService:
    """A grey network of ten classes behind somebody else's API.

    Args:
        model: The network, images in [0, 1] to logits.
        top: Classes in an answer; 1 answers with the label alone.
        order: Names of the classes in the order of its answers.
    """

    def __init__(self, model: torch.nn.Module, *, top: int, order: tuple[str, ...] = NAMES) -> None:
        self.model, self.top, self.order, self.asked = model.eval(), top, order, 0
        self.app = FastAPI()
        self.app.post("/v2/classify")(self.classify)

    async def classify(self, request: Request) -> dict[str, Any]:
        """Answer pictures with names, the most probable first."""
        if request.headers.get("x-api-key") != "secret":
            raise HTTPException(401)
        pictures = (await request.json())["inputs"]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in pictures])
        self.asked += len(pictures)
        with torch.no_grad():
            rows = torch.softmax(self.model(torch.from_numpy(pixels[:, None]).float() / 255), dim=1)
        results = []
        for row in rows:
            scores, places = row.topk(self.top)
            tags = [{"tag": NAMES[k], "p": float(p)} for k, p in zip(places.tolist(), scores.tolist(), strict=True)]
            results.append({"tags": tags} if self.top > 1 else {"tag": tags[0]["tag"]})
        return {"results": results}

    def describe(self, folder: Path, side: int) -> Path:
        """Write the description that mea_ray needs."""
        labels = {"top": {"items": "tags", "label": "tag", "score": "p"}} if self.top > 1 else {"label": "tag"}
        tree: dict[str, Any] = {
            "image_shape": [1, side, side],
            "classes": list(self.order),
            "path": "/v2/classify",
            "headers": {"X-Api-Key": "{key}"},
            "encoding": "png_base64",
            "body": {"inputs": "{images}"},
            "rows": "results",
            **labels,
            "max_request_images": 16,
        }
        path = folder / "foreign.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path
