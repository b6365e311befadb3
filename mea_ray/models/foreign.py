"""Any ``nn.Module`` that returns logits as a network of mea_ray: its input is declared once, its layout is found.

``victim.model.name=my_pkg.net:Net`` names a class, or a function that builds a module. Arguments that are called like
the number of classes (``num_classes``, ``classes``) or of channels (``in_channels``, ``in_chans``) are supplied by the
program. All others that have a default are options of the config. What the module expects of an image is declared under
``preprocessing``; outside of it images are RGB in [0, 1], as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, get_type_hints

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from mea_ray.core.errors import ConfigError, first_line
from mea_ray.core.settings import RefusedSettings, Settings
from mea_ray.models.base import ImageModel

CLASSES = ("num_classes", "classes", "n_classes", "nb_classes", "num_class", "n_class")
CHANNELS = ("in_channels", "in_chans", "input_channels", "num_channels", "channels")
SHAPES = ("input_shape", "image_shape", "shape")
PROBE_IMAGES = 2
"""Images of the forward passes that look at a module; two, as batch normalisation needs."""


class Preprocessing(Settings):
    """What a module expects of an image. Whatever is left out is as everywhere in mea_ray.

    Attributes:
        size: Height and width that the module needs, in pixels; images of another size are resized for it.
        channel_order: Order of the channels.
        value_range: Values of black and of white, before ``mean`` is subtracted.
        mean: Subtracted from each channel, in the units of ``value_range``; those of the training images when null.
        deviation: Divided by afterwards, per channel.
    """

    size: tuple[int, int] | None = None
    channel_order: Literal["RGB", "BGR"] = "RGB"
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Preprocessing:
        if (self.mean is None) != (self.deviation is None):
            raise RefusedSettings(ConfigError("mean and deviation belong together; give both or neither"))
        low, high = self.value_range
        if not high > low:
            raise RefusedSettings(ConfigError(f"value_range={[low, high]} must rise: black, then white"))
        if self.mean is None and self.value_range != (0.0, 1.0):
            raise RefusedSettings(
                ConfigError(
                    f"value_range={[low, high]} needs mean and deviation; write mean: [0], deviation: [1] if the "
                    "module takes the values as they are"
                )
            )
        if self.deviation is not None and not all(each > 0 for each in self.deviation):
            raise RefusedSettings(ConfigError(f"deviation={list(self.deviation)} must be positive"))
        if self.size is not None and min(self.size) < 1:
            raise RefusedSettings(ConfigError(f"size={list(self.size)} must be positive"))
        return self


def resized(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Return images (N, C, H, W) in another height and width, bilinearly; as they are if ``size`` is None or theirs."""
    if size is None or tuple(x.shape[2:]) == size:
        return x
    shrinks = size[0] < x.shape[2] or size[1] < x.shape[3]
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


class ForeignModel(ImageModel):
    """A module from outside, see the module's docstring.

    Its features are what its last linear layer receives, if its logits come out of one linear layer.

    Attributes:
        net: The module.
        preprocessing: What it expects of an image.
        channels_last: Whether it can take images and weights in that memory layout. Modules that flatten with ``view``
            cannot.

    Args:
        component: The class, or the function that builds the module.
        name: Its ``package.module:Attribute``, for messages.
        shape: (channels, height, width) of one image, before ``preprocessing``.
        classes: Number of classes.
        options: Arguments of the component, and ``preprocessing``.

    Raises:
        ConfigError: It builds no module, cannot take the images, or does not return logits (N, classes).
    """

    def __init__(
        self,
        component: Callable[..., Any],
        name: str,
        shape: tuple[int, int, int],
        classes: int,
        options: dict[str, Any],
    ) -> None:
        super().__init__(shape, classes)
        given = dict(options)
        self.preprocessing: Preprocessing = given.pop("preprocessing")
        self.named = name
        try:
            net = component(**{**given, **_supplied(component, self.shape, self.classes)})
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{name} cannot be built: {type(error).__name__}: {error}") from error
        if not isinstance(net, nn.Module):
            raise ConfigError(f"{name} builds {type(net).__name__}, not a torch.nn.Module")
        self.net = net
        self.feature_size, self._head, self.channels_last = 0, "", False
        self._declare()
        if not any(each.is_meta for each in net.parameters()):
            self._look()

    def _declare(self) -> None:
        """Turn mean and deviation into the units of [0, 1] RGB, in which the base class normalises."""
        given = self.preprocessing
        if given.mean is None or given.deviation is None:
            return
        channels, (low, high) = self.shape[0], given.value_range
        for what, values in (("mean", given.mean), ("deviation", given.deviation)):
            if len(values) not in {1, channels}:
                raise ConfigError(f"{self.named}: preprocessing.{what}={list(values)} must hold 1 or {channels} values")
        span = high - low
        mean, deviation = (list(v) * (channels // len(v)) for v in (given.mean, given.deviation))
        if given.channel_order == "BGR":
            mean, deviation = mean[::-1], deviation[::-1]
        super().set_normalisation([(m - low) / span for m in mean], [d / span for d in deviation])

    def set_normalisation(self, mean: Any, std: Any) -> None:
        """Set the statistics of the training images, unless ``preprocessing`` declares others."""
        if self.preprocessing.mean is None:
            super().set_normalisation(mean, std)

    @property
    def has_features(self) -> bool:  # type: ignore[override]
        """Whether the logits come out of one linear layer, so that there are features."""
        return bool(self._head)

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """The last linear layer; see ``features`` for errors."""
        return self.net.get_submodule(self._require_head())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "head":
            self.net.set_submodule(self._require_head(), value)
        else:
            super().__setattr__(name, value)

    def encode(self, x: Tensor) -> Tensor:
        """Return what the last linear layer receives, see the base class.

        Raises:
            ConfigError: The logits do not come out of one linear layer.
        """
        received: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
        try:
            self.net(self._arranged(x))
        finally:
            hook.remove()
        return received[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (N, classes), of float32 RGB images in [0, 1], shape (N, C, H, W)."""
        return self._checked(self.net(self._arranged((x - self.mean) / self.std)))

    def _arranged(self, x: Tensor) -> Tensor:
        """Bring normalised images into the channel order, the size and the layout that the module takes."""
        if self.preprocessing.channel_order == "BGR":
            x = x.flip(1)
        x = resized(x, self.preprocessing.size)
        return x if self.channels_last else x.contiguous()

    def _checked(self, out: Any) -> Tensor:
        if isinstance(out, Tensor):
            return out
        raise ConfigError(
            f"{self.named} returns {_described(out)}; it must return logits (N, classes) alone: write a module that "
            "calls it and returns them"
        )

    def _require_head(self) -> str:
        if not self._head:
            raise ConfigError(
                f"{self.named} has no features: its logits do not come out of one nn.Linear. Choose a component that "
                "does not need them, or derive the network from mea_ray.models.base.ImageModel"
            )
        return self._head

    def _look(self) -> None:
        """Pass two images through the module: find its last linear layer and its layout; refuse what cannot work."""
        images = torch.rand(PROBE_IMAGES, *self.shape, generator=torch.Generator().manual_seed(0))
        with _undisturbed(self), torch.no_grad():
            self.eval()
            outputs: dict[str, Tensor] = {}
            hooks = [
                layer.register_forward_hook(_remember(outputs, name), with_kwargs=False)
                for name, layer in self.net.named_modules()
                if isinstance(layer, nn.Linear)
            ]
            try:
                logits = self._tried(images)
            finally:
                for hook in hooks:
                    hook.remove()
            self._refuse_what_is_no_logits(logits)
            heads = [name for name, out in outputs.items() if out is logits]
            if heads and heads[0]:  # the module itself has no name: it may be a bare nn.Linear
                self._head = heads[0]
                self.feature_size = int(self.net.get_submodule(heads[0]).in_features)  # type: ignore[arg-type]
            self.channels_last = takes_channels_last(self)

    def _tried(self, images: Tensor) -> Tensor:
        try:
            logits: Tensor = self(images)
        except ConfigError:
            raise
        except Exception as error:  # whatever a module from outside raises
            raise ConfigError(
                f"{self.named} cannot take images of shape {self.shape}: {type(error).__name__}: "
                f"{first_line(error)}; set preprocessing.size of the model to the [height, width] that it needs, "
                "or data.image_size"
            ) from error
        return logits

    def _refuse_what_is_no_logits(self, out: Tensor) -> None:
        if tuple(out.shape) != (PROBE_IMAGES, self.classes):
            raise ConfigError(
                f"{self.named} returns {tuple(out.shape)} for {PROBE_IMAGES} images of {self.classes} classes; its "
                f"last layer must give {self.classes} logits: name the argument num_classes, or set it in the config"
            )
        if (out >= 0).all() and torch.allclose(out.sum(1), torch.ones(len(out)), atol=1e-3):
            raise ConfigError(
                f"{self.named} returns probabilities (every row sums to 1); logits are needed: leave out its softmax"
            )


def takes_channels_last(model: ImageModel) -> bool:
    """Return whether a network works with images and weights in this layout, found by one pass.

    A module that flattens with ``view`` raises "view size is not compatible" there.
    """
    before = model.channels_last
    where = next((each.device for each in model.parameters()), torch.device("cpu"))
    images = torch.zeros(PROBE_IMAGES, *model.shape, device=where)
    with _undisturbed(model), torch.no_grad():
        model.eval()
        try:
            model.channels_last = True
            model.to(memory_format=torch.channels_last)
            model(images.contiguous(memory_format=torch.channels_last))
        except RuntimeError:
            return False
        finally:
            model.channels_last = before
            model.to(memory_format=torch.contiguous_format)
    return True


def check_trainable(model: ImageModel) -> None:
    """Pass two images through a copy of a network as a training does, forward and back.

    Raises:
        ConfigError: It returns no logits in this mode (auxiliary outputs, for instance), or cannot be differentiated.
    """
    copy = deepcopy(model)
    images = torch.rand(PROBE_IMAGES, *copy.shape, generator=torch.Generator().manual_seed(0))
    layout = torch.channels_last if copy.channels_last else torch.contiguous_format
    with _undisturbed(copy):
        copy.train().to(memory_format=layout)
        try:
            copy(images.contiguous(memory_format=layout)).sum().backward()
        except ConfigError:
            raise
        except Exception as error:  # whatever a module from outside raises
            raise ConfigError(
                f"{type(model).__name__} cannot be trained on images of shape {model.shape}: {type(error).__name__}: "
                f"{first_line(error)}; repair the module"
            ) from error


def adapted(component: Any, name: str) -> Any:
    """Return a class that stands in the table of networks, for a module or a function from outside.

    Args:
        component: What ``name`` names.
        name: ``package.module:Attribute``.

    Returns:
        A subclass of ``ForeignModel`` with the component's arguments as options; the component itself if it derives
        from ``ImageModel``, or is neither a module nor a function.

    Raises:
        ConfigError: An argument has no default and is not supplied, or is called ``preprocessing``.
    """
    is_module = inspect.isclass(component) and issubclass(component, nn.Module)
    if not (is_module or inspect.isfunction(component)) or (is_module and issubclass(component, ImageModel)):
        return component
    options = _options(component, name)

    def __init__(self: ForeignModel, shape: tuple[int, int, int], classes: int, **given: Any) -> None:
        ForeignModel.__init__(self, component, name, shape, classes, given)

    kind = inspect.Parameter
    positional = [kind(each, kind.POSITIONAL_OR_KEYWORD) for each in ("shape", "classes")]
    __init__.__annotations__ = {option.name: option.annotation for option in options}
    signature = inspect.Signature([*positional, *options])
    body = {"__init__": __init__, "__doc__": inspect.getdoc(component), "__signature__": signature}
    return type(component.__name__, (ForeignModel,), {**body, "version": getattr(component, "version", 1)})


def _options(component: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    """Return a component's arguments that a config may set, as keyword-only parameters with defaults."""
    kind = inspect.Parameter
    parameters = [kind("preprocessing", kind.KEYWORD_ONLY, default=Preprocessing(), annotation=Preprocessing)]
    for each in _arguments(component):
        if each.name in {*CLASSES, *CHANNELS, *SHAPES}:
            continue
        if each.default is each.empty:
            raise ConfigError(
                f"{name} needs {each.name}, which has no default; give it one, or name a function that builds it"
            )
        if each.name == "preprocessing":
            raise ConfigError(f"{name} has an argument called preprocessing, which mea_ray needs; rename it")
        parameters.append(
            kind(each.name, kind.KEYWORD_ONLY, default=each.default, annotation=_annotation(component, each))
        )
    return parameters


def _annotation(component: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the annotation of an argument if its default fits it; anything goes otherwise."""
    target = component.__init__ if inspect.isclass(component) else component
    try:
        hint = get_type_hints(target, include_extras=True).get(parameter.name, Any)
    except Exception:  # annotations that only a type checker can read
        return Any
    return hint if hint in {int, float, bool, str} and isinstance(parameter.default, hint) else Any


def _arguments(component: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = inspect.signature(component).parameters.values()
    except (TypeError, ValueError):
        return []
    return [each for each in parameters if each.kind in {each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY}]


def _supplied(component: Callable[..., Any], shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
    """Return the arguments that follow from the data."""
    names = [each.name for each in _arguments(component)]
    values: dict[str, Any] = {name: shape for name in names if name in SHAPES}
    values |= {name: classes for name in names if name in CLASSES}
    values |= {name: shape[0] for name in names if name in CHANNELS}
    open_ended = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(component).parameters.values())
    if inspect.isfunction(component) and open_ended and not {*names} & {*CLASSES}:
        values["num_classes"] = classes  # as torchvision's functions take it
    return values


def _described(out: Any) -> str:
    if isinstance(out, (tuple, list)):
        return f"a {type(out).__name__} of {len(out)}"
    return f"a {type(out).__name__}"


def _remember(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[name] = output

    return hook


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore modes and torch's random state afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
