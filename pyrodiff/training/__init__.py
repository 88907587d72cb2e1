"""Training with Lightning: ``DiffusionModule`` for any ``Trainer``, ``fit`` for a whole training.

settings     what a training does, as plain values
module       a reverse chain and an objective as a ``LightningModule``
batches      the batches of step k, a function of (seed, k)
averaging    the moving average of the weights
validations  the metrics, the best weights, and when to end
checkpoints  files to go on from
loop         all of these together
variance     a learned variance for a trained model

Names are imported when they are first used: the settings need no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pyrodiff.training.settings import TrainingSettings

if TYPE_CHECKING:
    from pyrodiff.training.batches import SeededBatches, SeededData
    from pyrodiff.training.checkpoints import read_checkpoint
    from pyrodiff.training.loop import fit
    from pyrodiff.training.module import DiffusionModule
    from pyrodiff.training.validations import Validations
    from pyrodiff.training.variance import fit_variance, with_variance_head

__all__ = [
    "DiffusionModule",
    "SeededBatches",
    "SeededData",
    "TrainingSettings",
    "Validations",
    "fit",
    "fit_variance",
    "read_checkpoint",
    "with_variance_head",
]

_MODULES = {
    "DiffusionModule": "module",
    "SeededBatches": "batches",
    "SeededData": "batches",
    "Validations": "validations",
    "fit": "loop",
    "fit_variance": "variance",
    "with_variance_head": "variance",
    "read_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
