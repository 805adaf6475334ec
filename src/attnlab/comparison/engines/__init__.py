"""Where the runs of a comparison are made: here, on Ray, or by Slurm. Importing it is light."""

from .base import Call, Engine, Kind, Needs, Outcome
from .local import Local
from .ray import Ray
from .slurm import Slurm

__all__ = ["Call", "Engine", "Kind", "Local", "Needs", "Outcome", "Ray", "Slurm"]
