"""Runs a sweep in a process of its own, for a test that kills it: ``python sweep_driver.py SWEEP.yaml``."""

from __future__ import annotations

import sys

from mea_ray.config import load_sweep
from mea_ray.sweep.runner import run_sweep

if __name__ == "__main__":
    run_sweep(load_sweep(sys.argv[1]))
