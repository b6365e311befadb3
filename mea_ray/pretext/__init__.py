"""Table of what a victim learns its main task from: its labels, or views of its images without any."""

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
