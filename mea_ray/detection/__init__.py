"""Detections: attempts to find the watermark in a model, or its samples among queries."""

from mea_ray.core.registry import Table

DETECTIONS = Table(
    "detection",
    {
        "abs": "mea_ray.detection.brain_stimulation:BrainStimulation",
        "leaning": "mea_ray.detection.leaning:Leaning",
        "lof": "mea_ray.detection.queries:LocalOutliers",
        "neural_cleanse": "mea_ray.detection.neural_cleanse:NeuralCleanse",
        "signal_search": "mea_ray.detection.signal_search:SignalSearch",
        "strip": "mea_ray.detection.queries:Strip",
    },
    group="mea_ray.detections",
    base="mea_ray.detection.base:Detection",
)
