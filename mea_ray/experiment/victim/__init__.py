"""A victim as a folder with a readable name, which its owner deploys, serves, commits to and verifies with."""

from mea_ray.experiment.victim.folder import Victim
from mea_ray.experiment.victim.records import Card, InputFormat, VictimRecord

__all__ = ["Card", "InputFormat", "Victim", "VictimRecord"]
