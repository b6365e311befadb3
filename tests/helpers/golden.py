"""Writes `tests/config/golden_names.json` anew: `python tests/helpers/golden.py`.

To be run when names are meant to change, which makes users train all their victims again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mea_ray.config import ExperimentConfig, build, merge
from mea_ray.experiment.artifacts import null_id, prepared_id, victim_id
from mea_ray.sweep.plan import trial_name

FILE = Path(__file__).parents[1] / "config" / "golden_names.json"


def names(settings: dict[str, object]) -> dict[str, str]:
    """Return what one experiment, given as ``{config path: value}``, names what it makes."""
    config = build(ExperimentConfig, merge({}, settings))
    return {
        "trial": trial_name(config),
        "victim": victim_id(config),
        "null": null_id(config, 0),
        "data": prepared_id(config),
    }


if __name__ == "__main__":
    cases = json.loads(FILE.read_text(encoding="utf-8"))
    for case in cases:
        case["names"] = names(case["settings"])
    FILE.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {FILE}\n")
