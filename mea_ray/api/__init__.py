"""The public Python API: what the command line does, as functions.

Everything here can be imported from ``mea_ray`` itself. Long calls show their progress, in a notebook and in a
terminal, and can be interrupted: finished work is saved in the storage, and the same call continues from there.
``run_sweep`` has this name because ``mea_ray.sweep`` is a subpackage.
"""

from mea_ray.api.experiments import Results, run, run_sweep
from mea_ray.api.service import Served, serve
from mea_ray.api.thief import Stolen, open_blackbox, steal
from mea_ray.api.victims import nulls, verify, watermark
from mea_ray.core.types import BlackBox
from mea_ray.experiment.suspect.judging import Verdict
from mea_ray.experiment.victim import Victim
from mea_ray.results.frames import load_results

__all__ = [
    "BlackBox",
    "Results",
    "Served",
    "Stolen",
    "Verdict",
    "Victim",
    "load_results",
    "nulls",
    "open_blackbox",
    "run",
    "run_sweep",
    "serve",
    "steal",
    "verify",
    "watermark",
]
