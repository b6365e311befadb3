"""Removals: attempts to remove a watermark from a model whose weights the thief has."""

from mea_ray.core.registry import Table

REMOVALS = Table(
    "removal",
    {
        "attention_distillation": "mea_ray.removal.attention_distillation:AttentionDistillation",
        "chain": "mea_ray.removal.chain:Chain",
        "feature_shift": "mea_ray.removal.feature_shift:FeatureShiftTuning",
        "fine_pruning": "mea_ray.removal.pruning:FinePruning",
        "fine_tuning": "mea_ray.removal.fine_tuning:FineTuning",
        "ibau": "mea_ray.removal.ibau:ImplicitUnlearning",
        "input_noise": "mea_ray.removal.filters:InputNoise",
        "jpeg": "mea_ray.removal.filters:Jpeg",
        "overwriting": "mea_ray.removal.overwriting:Overwriting",
        "pruning": "mea_ray.removal.pruning:Pruning",
        "quantisation": "mea_ray.removal.quantisation:Quantisation",
        "second_theft": "mea_ray.removal.second_theft:SecondTheft",
        "smoothing": "mea_ray.removal.filters:Smoothing",
        "transfer_learning": "mea_ray.removal.transfer_learning:TransferLearning",
        "unlearning": "mea_ray.removal.unlearning:Unlearning",
        "wrk": "mea_ray.removal.wrk:Wrk",
        "wrong_mixes": "mea_ray.removal.wrong_mixes:WrongMixes",
    },
    group="mea_ray.removals",
    base="mea_ray.removal.base:Removal",
)
