"""Runs: folders that hold a model, its data and settings, and its results.

config.yaml          model, data and settings, as plain values
model.safetensors    the averaged weights with the best validation bound
metrics.csv          a row for every validation
evaluation.nc        the bound of each sample of the test split
samples.png          samples, and terms.png: L_t against t
grids/               optimal grids and analytic variances, for chains of other steps
samples.npy          samples that ``sample`` drew; samples.png then shows them
checkpoints/         best.ckpt, last.ckpt and previous.ckpt, for fit --resume
evaluation/          finished batches of evaluations under way, for evaluate --resume

A command that writes to a run holds its lock (``pyrodiff.serialization.folders``).

fitting, evaluation, sampling, comparison   the commands
added_variance, variance_settings           a learned variance for a run, which makes a new run
settings, chain_settings, choices, build    from plain values to objects
respacing                                   the chain that a run's network is put on
folder, dataset                             a run on disk, and its data
splits, batches, workers                    an evaluation in batches
groups, report                              runs as models, and what is shown of a comparison
summary, pictures, terminal                 what is shown of everything else

Names are imported when they are first used: the settings need no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrodiff.runs.added_variance import add_variance
    from pyrodiff.runs.comparison import compare
    from pyrodiff.runs.dataset import own_data
    from pyrodiff.runs.evaluation import evaluate
    from pyrodiff.runs.fitting import fit
    from pyrodiff.runs.folder import read_run
    from pyrodiff.runs.sampling import sample

__all__ = ["add_variance", "compare", "evaluate", "fit", "own_data", "read_run", "sample"]

_MODULES = {
    "add_variance": "added_variance",
    "compare": "comparison",
    "evaluate": "evaluation",
    "fit": "fitting",
    "own_data": "dataset",
    "read_run": "folder",
    "sample": "sampling",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
