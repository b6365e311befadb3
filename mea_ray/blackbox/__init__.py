"""Table of answer policies: one line each."""

from mea_ray.core.registry import Table

POLICIES = Table(
    "answer policy",
    {
        "embedding": "mea_ray.blackbox.embeddings:PlainEmbedding",
        "embedding_normalised": "mea_ray.blackbox.embeddings:NormalisedEmbedding",
        "embedding_rounded": "mea_ray.blackbox.embeddings:RoundedEmbedding",
        "high_confidence": "mea_ray.blackbox.defences:HighConfidence",
        "label_only": "mea_ray.blackbox.policies:LabelOnly",
        "lof": "mea_ray.blackbox.outliers:OutlierFilter",
        "model_guard": "mea_ray.blackbox.defences:ModelGuard",
        "model_guard_s": "mea_ray.blackbox.defences:ModelGuardS",
        "noise": "mea_ray.blackbox.policies:AdditiveNoise",
        "probabilities": "mea_ray.blackbox.policies:Probabilities",
        "reverse_sigmoid": "mea_ray.blackbox.defences:ReverseSigmoid",
        "rounded": "mea_ray.blackbox.policies:Rounded",
        "top_k": "mea_ray.blackbox.policies:TopK",
    },
    group="mea_ray.policies",
    base="mea_ray.blackbox.policies:AnswerPolicy",
)
