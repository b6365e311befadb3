"""Table of extraction attacks: one line each."""

from mea_ray.core.registry import Table

ATTACKS = Table(
    "attack",
    {
        "active": "mea_ray.attacks.active:Active",
        "black_box_dissector": "mea_ray.attacks.dissector:BlackBoxDissector",
        "cloud_leak": "mea_ray.attacks.cloud_leak:CloudLeak",
        "cont_steal": "mea_ray.attacks.cont_steal:ContSteal",
        "dfme": "mea_ray.attacks.data_free:DFME",
        "distillation": "mea_ray.attacks.distillation:Distillation",
        "feature_distillation": "mea_ray.attacks.feature_distillation:FeatureDistillation",
        "jbda": "mea_ray.attacks.jbda:Jbda",
        "knockoff": "mea_ray.attacks.knockoff:Knockoff",
        "maze": "mea_ray.attacks.data_free:MAZE",
        "ssl_extraction": "mea_ray.attacks.ssl_extraction:SslExtraction",
        "stolen_encoder": "mea_ray.attacks.stolen_encoder:StolenEncoder",
    },
    group="mea_ray.attacks",
    base="mea_ray.attacks.base:Attack",
)
