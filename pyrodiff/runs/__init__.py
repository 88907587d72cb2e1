"""Runs: folders that hold a model, how it came about, and what came of it.

config.yaml          model, data and settings, as plain values
model.safetensors    the averaged weights with the best validation bound
metrics.csv          a row for every validation
evaluation.nc        per-sample bound on the test split
samples.png          samples, and terms.png: L_t against t
samples.npy          samples that ``sample`` drew, and samples.png in place of fit's
checkpoints/         best.ckpt, last.ckpt and previous.ckpt, for fit --resume
evaluation/          finished batches of evaluations under way, for evaluate --resume

Whoever writes to a run holds its lock (``pyrodiff.serialization.folders``).
"""

from pyrodiff.runs.commands import evaluate, fit, own_data, read_run, sample

__all__ = ["evaluate", "fit", "own_data", "read_run", "sample"]
