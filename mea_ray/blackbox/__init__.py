"""Table of answer policies: one line each."""

from mea_ray.registry import Table

POLICIES = Table(
    "answer policy",
    {
        "label_only": "mea_ray.blackbox.policies:LabelOnly",
        "noise": "mea_ray.blackbox.policies:AdditiveNoise",
        "probabilities": "mea_ray.blackbox.policies:Probabilities",
        "rounded": "mea_ray.blackbox.policies:Rounded",
        "top_k": "mea_ray.blackbox.policies:TopK",
    },
)
