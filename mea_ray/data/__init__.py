"""Table of datasets: one line each."""

from mea_ray.core.registry import Table

DATASETS = Table(
    "dataset",
    {
        "arrays": "mea_ray.data.arrays:load",
        "cifar10": "mea_ray.data.vision:load_cifar10",
        "cifar100": "mea_ray.data.vision:load_cifar100",
        "digits": "mea_ray.data.digits:load",
        "fashion_mnist": "mea_ray.data.vision:load_fashion_mnist",
        "figures": "mea_ray.data.drawn_figures:load",
        "image_folder": "mea_ray.data.image_folder:load",
        "mixture": "mea_ray.data.mixture:load",
        "noise": "mea_ray.data.noise:load",
        "parquet": "mea_ray.data.parquet:load",
        "stl10": "mea_ray.data.vision:load_stl10",
        "svhn": "mea_ray.data.vision:load_svhn",
        "youtube_faces": "mea_ray.data.youtube_faces:load",
    },
    group="mea_ray.datasets",
)
