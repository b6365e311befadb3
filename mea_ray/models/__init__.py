"""Table of networks: one line each."""

from mea_ray.core.registry import Table

MODELS = Table(
    "model",
    {
        "alexnet": "mea_ray.models.alexnet:AlexNet",
        "cnn9": "mea_ray.models.cnn9:Cnn9",
        "resnet18": "mea_ray.models.resnet:ResNet18",
        "resnet50": "mea_ray.models.resnet:ResNet50",
        "vgg_like": "mea_ray.models.vgg_like:VggLike",
        "vggface": "mea_ray.models.vggface:VggFace",
    },
    group="mea_ray.models",
    base="mea_ray.models.base:ImageModel",
    arguments=2,
    adapt="mea_ray.models.foreign:adapted",
)
