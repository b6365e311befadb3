"""Forward passes of one fixed size, so that an answer never depends on the requests with which an image is merged.

Matrix libraries choose their algorithm, and with it the order of summation, by the batch size. The logits of one image
alone and in a batch of 256 differ in their last bits. Here every pass holds the same number of images, padded with
black ones, and the rows of a pass do not influence each other. On a CPU a pass is computed by one thread, because with
several the position of a row decides which thread computes it and how. Add replicas, not threads, to make a service
faster there.

A single image does not need a full pass: a smaller one gives the same bits if some layers compute a few more rows than
there are images, see `least_rows`. These layers and sizes are measured on the machine, see `FixedShapePasses.sizes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mea_ray.blackbox.least_rows import need_least_rows
from mea_ray.blackbox.policies import AnswerPolicy, Response, reads_features, respond
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.models.base import ImageModel
from mea_ray.training.device import device as default_device
from mea_ray.training.device import one_thread

# On a CPU passes of 16 and 32 are equally fast per image for a VGG-like CNN (1634 and 1615 images/s at 3 x 32 x 32, one
# thread), 32 is 18% to 22% faster for small images and for AlexNet, and larger passes fall out of the cache.
_DEFAULT_PASS_IMAGES = {"cpu": 32}
_DEFAULT_ACCELERATOR = 256


def default_pass_images(where: torch.device, max_batch_images: int | None = None) -> int:
    """Return the pass size that is fastest per image on a device, at most ``max_batch_images``."""
    images = _DEFAULT_PASS_IMAGES.get(where.type, _DEFAULT_ACCELERATOR)
    return images if max_batch_images is None else min(images, max_batch_images)


def answer_size(model: ImageModel, policy: AnswerPolicy) -> int:
    """Return the length of an answer: the number of classes, or of an encoder's features."""
    return model.feature_size if policy.source == "features" else model.classes


class FixedShapePasses:
    """A victim that answers any number of images in passes of one size, in float32.

    Args:
        model: The victim; a copy is put in eval mode and moved to the device.
        shape: (channels, height, width) of one image.
        policy: What an answer reveals.
        pass_images: Images in every forward pass; None chooses by device.
        device: Where to compute; None for the device of this process.
        small_passes: Compute few images in a smaller pass, of a size that was verified to give the same bits.

    Attributes:
        sizes: Sizes of the passes in use, ascending; the last is ``pass_images``.
        passes: Forward passes computed so far.
        rows: Total size of these passes, in images.
    """

    def __init__(
        self,
        model: ImageModel,
        shape: tuple[int, int, int],
        policy: AnswerPolicy,
        *,
        pass_images: int | None = None,
        device: torch.device | None = None,
        small_passes: bool = False,
    ) -> None:
        self.device = default_device() if device is None else device
        # Benchmarking algorithms could give two replicas, or two starts of one, different bits.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        # The caller's model is unchanged. Channels last: 1.5 times the images/s on a CPU.
        copy = deepcopy(model).to(self.device, torch.float32).eval()
        self.model: ImageModel = (
            copy.to(memory_format=torch.channels_last) if getattr(model, "channels_last", True) else copy
        )
        self.policy = policy
        self._both = reads_features(policy)
        self._compute = self.model.features if policy.source == "features" else self._probabilities
        self.pass_images = default_pass_images(self.device) if pass_images is None else pass_images
        self.passes = self.rows = 0
        self._pixels = np.zeros((self.pass_images, *shape), dtype=np.uint8)
        self._values = np.zeros((self.pass_images, *shape), dtype=np.float32)
        # A tensor, not a number: dividing by a number may become multiplying by its inverse, which rounds differently.
        self._white = torch.tensor(255.0, device=self.device)
        self.sizes = [*(self._equal_sizes() if small_passes else []), self.pass_images]
        self.passes = self.rows = 0

    def _equal_sizes(self) -> list[int]:
        """Return the smaller pass sizes that give every image the bits of a full pass, ascending.

        Each is tried on a full pass of noise, at every position of a row. Libraries choose the order of summation by
        shape, not by value, so another order changes the bits of almost any image. Logits are compared, since a
        confident softmax hides differences.
        """
        noise = np.random.default_rng(0).integers(0, 256, self._pixels.shape, dtype=np.uint8)
        compute = self.model.features if self._both or self.policy.source == "features" else self.model
        full = self._compute_rows(noise, compute)
        with self._exact():
            need_least_rows(self.model, lambda: self._compute_rows(noise, compute))
        return [
            size
            for size in (2**power for power in range(self.pass_images.bit_length()))
            if size < self.pass_images
            and self.pass_images % size == 0
            and all(
                np.array_equal(self._compute_rows(noise[low : low + size], compute), full[low : low + size])
                for low in range(0, self.pass_images, size)
            )
        ]

    def answer(self, parts: Sequence[Images | FloatImages]) -> list[Answers]:
        """Answer several requests in as few passes as possible.

        Args:
            parts: Images of each request, uint8 or float32 in [0, 1], (N_i, C, H, W), already checked.

        Returns:
            For each request float32 answers (N_i, K), K as given by ``answer_size``.
        """
        return [response.answers for response in self.respond(parts)]

    def respond(self, parts: Sequence[Images | FloatImages]) -> list[Response]:
        """Like ``answer``, with the annotations for the owner."""
        total = sum(map(len, parts))
        rows = [
            self._pass(parts, start, min(start + self.pass_images, total))
            for start in range(0, total, self.pass_images)
        ]
        outputs = np.concatenate(rows)
        features = None
        if self._both:
            outputs, features = np.split(outputs, [self.model.classes], axis=1)
        responses, start = [], 0
        for part in parts:
            stop = start + len(part)
            own_features = None if features is None else features[start:stop]
            responses.append(respond(self.policy, outputs[start:stop], part, own_features))
            start = stop
        return responses

    def _pass(self, parts: Sequence[Images | FloatImages], start: int, stop: int) -> npt.NDArray[np.float32]:
        """Compute probabilities or features of images ``start`` to ``stop``, counted over all parts."""
        pieces = []
        offset = 0
        for part in parts:
            low, high = max(start - offset, 0), min(stop - offset, len(part))
            if low < high:
                pieces.append(part[low:high])
            offset += len(part)
        count = stop - start
        # Requests of uint8 are sent to the device unchanged, a quarter of the bytes, and converted there.
        buffer = self._pixels if all(piece.dtype == np.uint8 for piece in pieces) else self._values
        row = 0
        for piece in pieces:
            target = buffer[row : row + len(piece)]
            if buffer is self._values and piece.dtype == np.uint8:
                np.divide(piece, np.float32(255), out=target)
            else:
                target[...] = piece
            row += len(piece)
        size = next(size for size in self.sizes if size >= count)
        buffer[count:size] = 0
        self.passes += 1
        self.rows += size
        return self._compute_rows(buffer[:size], self._compute)[:count]

    def _compute_rows(
        self, rows: npt.NDArray[np.generic], compute: Callable[[Tensor], Tensor]
    ) -> npt.NDArray[np.float32]:
        """Compute one pass of exactly these uint8 or float32 images."""
        with self._exact():
            x = torch.from_numpy(rows).to(self.device)
            if rows.dtype == np.uint8:
                x = x.float().div_(self._white)
            outputs = compute(x).cpu().numpy()
        return np.asarray(outputs, dtype=np.float32)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        """Compute without gradients, in float32 and on one thread."""
        # A thief may query from within a training step of its own, whose autocast must not reach the victim.
        full_precision = torch.autocast(self.device.type, enabled=False)
        with torch.inference_mode(), full_precision, one_thread():
            yield

    def _probabilities(self, x: Tensor) -> Tensor:
        if not self._both:
            return torch.softmax(self.model(x), dim=1)
        features = self.model.features(x)
        return torch.cat([torch.softmax(self.model.head(features), dim=1), features], dim=1)
