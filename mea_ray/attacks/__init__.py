"""Table of extraction attacks: one line each."""

from mea_ray.registry import Table

ATTACKS = Table(
    "attack",
    {
        "distillation": "mea_ray.attacks.distillation:Distillation",
        "knockoff": "mea_ray.attacks.knockoff:Knockoff",
    },
)
