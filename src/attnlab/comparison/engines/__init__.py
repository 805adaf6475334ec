"""Engines make the runs of a comparison: here, on Ray, or by Slurm. Importing them is light."""

from .base import Call, Engine, EngineOptions, Needs, Outcome, Share
from .local import Local
from .ray import Ray
from .slurm import Slurm

__all__ = ["Call", "Engine", "EngineOptions", "Local", "Needs", "Outcome", "Ray", "Share", "Slurm"]
