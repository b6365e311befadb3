"""Writes `tests/config/golden_names.json` anew: `python tests/helpers/golden.py`.

To be run when names are meant to change, which makes users train all their victims again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mea_ray.config import ExperimentConfig, build, digest, identity, merge
from mea_ray.experiment.data import Contents, Fingerprints, pool_choice
from mea_ray.experiment.names import Names

FILE = Path(__file__).parents[1] / "config" / "golden_names.json"


def names(settings: dict[str, object]) -> dict[str, str]:
    """Return what one experiment, given as ``{config path: value}``, names what it makes."""
    return names_of(build(ExperimentConfig, merge({}, settings)))


def names_of(config: ExperimentConfig) -> dict[str, str]:
    """Return what one experiment names what it makes."""
    result = Names.of(config, fingerprints(config))
    return {"trial": result.trial, "victim": result.victim, "null": result.nulls[0], "data": result.data}


def fingerprints(config: ExperimentConfig) -> Fingerprints:
    """Return made-up fingerprints of an experiment's data, without loading any: other settings, other data."""
    pool = pool_choice(config)
    return Fingerprints(digest(identity(config.data)), None if pool is None else digest(identity(pool)))


class MadeUp(Contents):
    """Contents of datasets that are never loaded."""

    def of(self, config: ExperimentConfig) -> Fingerprints:
        return fingerprints(config)


if __name__ == "__main__":
    cases = json.loads(FILE.read_text(encoding="utf-8"))
    for case in cases:
        case["names"] = names(case["settings"])
    FILE.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {FILE}\n")
