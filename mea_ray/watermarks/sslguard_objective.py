"""The objective of SSLGuard: encoder, shadow encoder, patch and decoder, each moved by its own losses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mea_ray.training.objective import Batch, Objective, accumulate, load_module_state, merged, module_state

MOMENTUM = 0.9
SHADOW_DECAY = 0.96
"""Factor of the shadow encoder's learning rate after each epoch."""
HIDDEN = (512, 256)


@dataclass(frozen=True)
class GuardSettings:
    """Settings of ``GuardObjective``; ``SslGuard`` documents them.

    Attributes:
        rates: Learning rates of ``shadow``, ``patch`` and ``decoder``.
        leak: Gradients flow as in the published code.
        strangers: Weight of the decoder's term on other encoders' features.
    """

    rates: Mapping[str, float]
    leak: bool = False
    strangers: float = 0.0


class Decoder(nn.Sequential):
    """features - 512 - 256 - secret, with ReLUs: float32 (N, features) to (N, secret)."""

    def __init__(self, features: int, secret: int) -> None:
        sizes = (features, *HIDDEN)
        hidden = [layer for a, b in zip(sizes, HIDDEN, strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(*hidden, nn.Linear(HIDDEN[-1], secret))

    @classmethod
    def restored(cls, tensors: Mapping[str, npt.NDArray[np.float32]], prefix: str) -> Decoder:
        """Rebuild a decoder from arrays named ``prefix`` + the parameter's name."""
        state = {n.removeprefix(prefix): torch.from_numpy(v) for n, v in tensors.items() if n.startswith(prefix)}
        decoder = cls(state["0.weight"].shape[1], state[f"{2 * len(HIDDEN)}.weight"].shape[0])
        decoder.load_state_dict(state)
        return decoder.eval()


def blend(images: Tensor, mask: Tensor, patch: Tensor) -> Tensor:
    """(1 - mask) images + mask patch, clipped to [0, 1]: float32 (N, C, H, W)."""
    return ((1 - mask) * images + mask * patch).clamp(0, 1)


class GuardObjective(Objective):
    """One step: the shadow follows the encoder; patch and decoder follow both; then the encoder's own terms.

    For images x, patched images x_t and the secret s, the encoder's terms are ``preserve``, -mean cos(clean(x),
    marked(x)); ``silent``, [mean cos(dec(marked(x)), s)]^2; ``speak``, -mean cos(dec(marked(x_t)), s). Its batch
    statistics stay as the pretext task left them.

    Args:
        tensors: ``secret`` (D,), ``mask`` (1, H, W) of 0 and 1, ``patch`` (C, H, W) in [0, 1] to begin with; float32.
        settings: Learning rates and how gradients flow.
    """

    resumable = True

    def __init__(self, tensors: Mapping[str, Tensor], settings: GuardSettings) -> None:
        super().__init__()
        self.secret, self.mask, self.first_patch = tensors["secret"], tensors["mask"], tensors["patch"]
        self.settings = settings
        self._leaked: list[Tensor] = []

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Copy the clean encoder, build shadow, decoder and patch with optimisers of their own; return nothing."""
        self.clean = copy.deepcopy(model).eval().requires_grad_(False)
        self.shadow = copy.deepcopy(model).train()
        for module in self.shadow.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        self.secret, self.mask = self.secret.to(device), self.mask.to(device)
        self.patch = nn.Parameter(self.first_patch.clone().to(device))
        self.decoder = Decoder(int(model.feature_size), len(self.secret)).to(device)  # type: ignore[arg-type]
        self.encoder = [p for p in model.parameters() if p.requires_grad]
        moved = {
            "shadow": [p for p in self.shadow.parameters() if p.requires_grad],
            "patch": [self.patch],
            "decoder": list(self.decoder.parameters()),
        }
        self.optimisers = {
            name: torch.optim.SGD(parameters, self.settings.rates[name], momentum=MOMENTUM)
            for name, parameters in moved.items()
        }
        return []

    def start_epoch(self, epoch: int) -> None:
        """Lower the shadow's learning rate."""
        for group in self.optimisers["shadow"].param_groups:
            group["lr"] = self.settings.rates["shadow"] * SHADOW_DECAY**epoch

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Move shadow, patch and decoder, and return the encoder's terms."""
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        self._leaked = []
        images = batch.images.float()
        with torch.no_grad():
            clean = self._features(self.clean, images)
        self._follow(model, images)
        self._teach(model, images, clean)
        patch = self.patch if self.settings.leak else self.patch.detach()
        plain, marked = self._features(model, images, blend(images, self.mask, patch)).chunk(2)
        return {
            "preserve": -torch.cosine_similarity(clean, plain).mean(),
            "silent": self._similarity(plain).mean().square(),
            "speak": -self._similarity(marked).mean(),
        }

    def backward(self, terms: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Sum the terms; with the published code's leak, the other parts' gradients move the encoder as well."""
        total = super().backward(terms, model)
        for parameter, leaked in zip(self.encoder, self._leaked, strict=bool(self._leaked)):
            accumulate(parameter, leaked)
        return total

    def memory(self) -> dict[str, Any]:
        """Return shadow, decoder and patch, with their optimisers and the gradient that the published code leaks."""
        return {
            "shadow": module_state(self.shadow),
            "decoder": module_state(self.decoder),
            "patch": self.patch.detach(),
            "patch_gradient": self.patch.grad,
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """See the base class."""
        load_module_state(self.shadow, memory["shadow"])
        load_module_state(self.decoder, memory["decoder"])
        gradient = memory["patch_gradient"]
        with torch.no_grad():
            self.patch.copy_(memory["patch"])
        self.patch.grad = None if gradient is None else gradient.to(self.patch.device)
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(memory["optimisers"][name])

    def learned(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return patch and decoder as arrays."""
        state = {"patch": self.patch, **{f"decoder.{n}": v for n, v in self.decoder.state_dict().items()}}
        return {name: value.detach().cpu().numpy() for name, value in state.items()}

    def _features(self, model: nn.Module, *images: Tensor) -> Tensor:
        features: Tensor = model.features(merged(images)).float()  # type: ignore[operator]
        return features

    def _similarity(self, features: Tensor) -> Tensor:
        """Cosines of decoded features and the secret, (N,)."""
        return torch.cosine_similarity(self.decoder(features).float(), self.secret[None])

    def _follow(self, model: nn.Module, images: Tensor) -> None:
        """Step 1: the shadow's features towards the encoder's."""
        with torch.set_grad_enabled(self.settings.leak):
            goal = self._features(model, images)
        self._step(-torch.cosine_similarity(goal, self._features(self.shadow, images)).mean(), "shadow")

    def _teach(self, model: nn.Module, images: Tensor, clean: Tensor) -> None:
        """Step 2: patch and decoder; only patched features of marked and shadow encoder are to decode to the secret."""
        patched = blend(images, self.mask, self.patch)
        with torch.set_grad_enabled(self.settings.leak):
            plain = self._features(model, images)
        with torch.no_grad():
            shadow = self._features(self.shadow, images)
        speak = (
            self._similarity(self._features(model, patched)).mean()
            + self._similarity(self._features(self.shadow, patched)).mean()
        )
        unmarked = self._similarity(self._features(self.clean, patched)).mean().square()
        silent = sum(self._similarity(each).mean().square() for each in (clean, plain, shadow))
        strange = self._strange(model, patched) if self.settings.strangers else 0.0
        self._step(unmarked + silent - speak + self.settings.strangers * strange, "patch", "decoder")
        with torch.no_grad():
            self.patch.clamp_(0, 1)

    def _strange(self, model: nn.Module, patched: Tensor) -> Tensor:
        """Mean squared cosine of the secret and what is decoded of features as encoders with other neurons give them.

        An encoder that was trained from other weights has learnt much the same, but its neurons are in another order.
        The features of the marked, the shadow and the clean encoder imitate it, in an order drawn anew in each step.
        """
        with torch.no_grad():
            parts = [self._features(each, patched) for each in (model, self.shadow, self.clean)]
        order = torch.randperm(parts[0].shape[1], generator=self.context.generator).to(patched.device)
        return self._similarity(torch.cat(parts)[:, order]).square().mean()

    def _step(self, loss: Tensor, *names: str) -> None:
        """Update the parameters of the named optimisers; store the gradient that leaks into the encoder."""
        moved = [p for name in names for group in self.optimisers[name].param_groups for p in group["params"]]
        leaks = self.encoder if self.settings.leak else []
        gradients = torch.autograd.grad(loss, [*moved, *leaks], allow_unused=True)
        for parameter, gradient in zip(moved, gradients, strict=False):
            # The published code never clears the patch's gradient: that of the encoder's last step is added.
            previous = parameter.grad if self.settings.leak and parameter is self.patch else None
            parameter.grad = gradient if previous is None or gradient is None else gradient + previous
        for name in names:
            self.optimisers[name].step()
        self.patch.grad = None
        leaked = [torch.zeros_like(p) if g is None else g for p, g in zip(leaks, gradients[len(moved) :], strict=True)]
        self._leaked = [a + b for a, b in zip(self._leaked, leaked, strict=True)] if self._leaked else leaked
