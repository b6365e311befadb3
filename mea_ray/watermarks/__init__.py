"""Table of watermark schemes: one line each."""

from mea_ray.registry import Table

WATERMARKS = Table(
    "watermark",
    {
        "mea_defender": "mea_ray.watermarks.mea_defender:MeaDefender",
        "mea_defender_encoder": "mea_ray.watermarks.mea_defender_encoder:MeaDefenderEncoder",
        "mea_defender_two_stage": "mea_ray.watermarks.two_stage:MeaDefenderTwoStage",
        "sslguard": "mea_ray.watermarks.sslguard:SslGuard",
        "none": "mea_ray.watermarks.none:NoWatermark",
    },
)
