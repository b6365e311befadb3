"""Table of extraction attacks: one line each."""

from mea_ray.registry import Table

ATTACKS = Table(
    "attack",
    {
        "active": "mea_ray.attacks.active:Active",
        "distillation": "mea_ray.attacks.distillation:Distillation",
        "jbda": "mea_ray.attacks.jbda:Jbda",
        "knockoff": "mea_ray.attacks.knockoff:Knockoff",
    },
)
