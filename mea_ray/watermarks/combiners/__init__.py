"""Table of the ways to mix two images into one: combiners of the watermark and geometries of the other mixes."""

from mea_ray.core.registry import Table

COMBINERS = Table(
    "combiner",
    {
        "autoencoder": "mea_ray.watermarks.combiners.autoencoder:Autoencoder",
        "crop_paste": "mea_ray.watermarks.combiners.halves:CropPaste",
        "diagonal": "mea_ray.watermarks.combiners.masks:Diagonal",
        "donut": "mea_ray.watermarks.combiners.masks:Donut",
        "hotdog": "mea_ray.watermarks.combiners.masks:HotDog",
        "left_right": "mea_ray.watermarks.combiners.halves:LeftRight",
        "pixel_merge": "mea_ray.watermarks.combiners.pixel_merge:PixelMerge",
        "ratio": "mea_ray.watermarks.combiners.halves:Ratio",
        "stripes": "mea_ray.watermarks.combiners.masks:Stripes",
        "top_bottom": "mea_ray.watermarks.combiners.halves:TopBottom",
    },
    group="mea_ray.combiners",
    base="mea_ray.watermarks.combiners.base:Combiner",
    arguments=3,
)
