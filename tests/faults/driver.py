"""Runs a sweep in a process of its own and prints its events, one JSON object a line.

``python driver.py SWEEP.yaml [--resume] [--address ADDRESS]``
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from mea_ray.config import load_sweep
from mea_ray.sweep.events import Event
from mea_ray.sweep.runner import run_sweep


def tell(event: Event) -> None:
    # In one piece: events come from several threads.
    line = json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}, default=str)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--address")
    given = parser.parse_args()
    run_sweep(load_sweep(given.file), resume=given.resume, address=given.address, on_event=tell)
