"""Training with Lightning: ``DiffusionModule`` for any trainer, ``fit`` for a whole run."""

from pyrodiff.training.module import DiffusionModule, SeededBatches, fit

__all__ = ["DiffusionModule", "SeededBatches", "fit"]
