"""Table of watermark schemes: one line each."""

from mea_ray.core.registry import Table

WATERMARKS = Table(
    "watermark",
    {
        "adi": "mea_ray.watermarks.adi:Adi",
        "cfw": "mea_ray.watermarks.cfw:ClassFeature",
        "composite": "mea_ray.watermarks.composite:Composite",
        "cosine": "mea_ray.watermarks.cosine:CosineLean",
        "dawn": "mea_ray.watermarks.dawn:Dawn",
        "deeptracer": "mea_ray.watermarks.deeptracer:DeepTracer",
        "ewe": "mea_ray.watermarks.ewe:EntangledWatermark",
        "honeytrace": "mea_ray.watermarks.honeytrace:NeuralHoneytrace",
        "mbw": "mea_ray.watermarks.margin_based:MarginBased",
        "mea_carrier": "mea_ray.watermarks.mea_carrier.scheme:MeaCarrier",
        "mea_carrier_encoder": "mea_ray.watermarks.mea_carrier.encoder:MeaCarrierEncoder",
        "mea_defender": "mea_ray.watermarks.mea_defender.scheme:MeaDefender",
        "mea_defender_encoder": "mea_ray.watermarks.mea_defender.encoder:MeaDefenderEncoder",
        "mea_defender_two_stage": "mea_ray.watermarks.mea_defender.two_stage:MeaDefenderTwoStage",
        "pattern": "mea_ray.watermarks.pattern:PatternTrigger",
        "rehearsal": "mea_ray.watermarks.rehearsal.scheme:Rehearsal",
        "several_keys": "mea_ray.watermarks.several_keys:SeveralKeys",
        "sslguard": "mea_ray.watermarks.sslguard:SslGuard",
        "none": "mea_ray.watermarks.none:NoWatermark",
    },
    group="mea_ray.watermarks",
    base="mea_ray.watermarks.base:Watermark",
)
