"""Pretext tasks: what a victim learns its main task from. Labels (``none``), or views of images without labels."""

from mea_ray.core.registry import Table

PRETEXTS = Table(
    "pretext",
    {
        "byol": "mea_ray.pretext.byol:Byol",
        "moco": "mea_ray.pretext.moco:Moco",
        "none": "mea_ray.pretext.none:NoPretext",
        "simclr": "mea_ray.pretext.simclr:SimClr",
    },
    group="mea_ray.pretexts",
    base="mea_ray.pretext.base:Pretext",
)
