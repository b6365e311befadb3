"""Table of aggregators: ways to combine the gradients of several losses into one."""

from mea_ray.core.registry import Table

AGGREGATORS = Table(
    "aggregator",
    {
        "aligned_mtl": "mea_ray.watermarks.mea_defender.torchjd_aggregators:AlignedMtl",
        "config": "mea_ray.watermarks.mea_defender.torchjd_aggregators:ConFig",
        "dual_proj": "mea_ray.watermarks.mea_defender.torchjd_aggregators:DualProj",
        "grad_drop": "mea_ray.watermarks.mea_defender.torchjd_aggregators:GradDrop",
        "grad_vac": "mea_ray.watermarks.mea_defender.torchjd_aggregators:GradVac",
        "imtl_g": "mea_ray.watermarks.mea_defender.torchjd_aggregators:ImtlG",
        "mean": "mea_ray.watermarks.mea_defender.torchjd_aggregators:MeanGradient",
        "mgda": "mea_ray.watermarks.mea_defender.weighting:Mgda",
        "pcgrad": "mea_ray.watermarks.mea_defender.torchjd_aggregators:PcGrad",
        "random": "mea_ray.watermarks.mea_defender.torchjd_aggregators:RandomWeights",
        "sum": "mea_ray.watermarks.mea_defender.torchjd_aggregators:SumOfGradients",
        "upgrad": "mea_ray.watermarks.mea_defender.torchjd_aggregators:UpGrad",
    },
    group="mea_ray.aggregators",
    base="mea_ray.watermarks.mea_defender.weighting:Weighting",
)
