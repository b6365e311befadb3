"""Table of extraction attacks: one line each."""

from mea_ray.registry import Table

ATTACKS = Table(
    "attack",
    {
        "active": "mea_ray.attacks.active:Active",
        "dfme": "mea_ray.attacks.data_free:DFME",
        "distillation": "mea_ray.attacks.distillation:Distillation",
        "jbda": "mea_ray.attacks.jbda:Jbda",
        "knockoff": "mea_ray.attacks.knockoff:Knockoff",
        "maze": "mea_ray.attacks.data_free:MAZE",
    },
)
