"""The batches of a training: step k's is a function of (seed, k).

A run that was killed therefore goes on with the batches that it would have had.
"""

from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from pyrodiff.data import DataSet
from pyrodiff.streams import derived_seed

__all__ = ["SeededBatches", "SeededData"]

_PASS = 1  # the streams of the steps have 0 (``module``)


class SeededBatches:
    """Batches of indices for training: pass p over the data is a permutation of (seed, p).

    An epoch is ``length`` batches, whatever the size of the data; epoch e starts at step
    e · ``length``.  Within a pass every sample comes at most once; what is left of a pass after its
    last whole batch is dropped, and the next pass is a new permutation of all samples.

    Args:
        size: number of samples.
        batch_size: samples per batch; at most ``size`` are taken.
        length: batches per epoch.
        seed: of the permutations.
    """

    def __init__(self, size: int, batch_size: int, length: int, seed: int):
        self.size, self.batch_size = size, min(batch_size, size)
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        batches_per_pass = self.size // self.batch_size
        current, order = -1, []
        for step in range(self.epoch * self.length, (self.epoch + 1) * self.length):
            number, position = divmod(step, batches_per_pass)
            if number != current:
                generator = torch.Generator().manual_seed(derived_seed(self.seed, _PASS, number))
                order = torch.randperm(self.size, generator=generator).tolist()
                current = number
            yield order[position * self.batch_size : (position + 1) * self.batch_size]


class SeededData(lightning.LightningDataModule):
    """A data set for a ``Trainer``: seeded batches of its train split, its validation split whole.

    Batches are lists [x_0] or [x_0, context].

    Args:
        data: the data set.
        batch_size: samples per training step.
        length: training steps per epoch.
        seed: of the order of the samples.
    """

    def __init__(self, data: DataSet, *, batch_size: int, length: int, seed: int):
        super().__init__()
        self.data = data
        self.batches = SeededBatches(len(data.train), batch_size, length, seed)

    def train_dataloader(self) -> DataLoader[Any]:
        """The seeded batches."""
        return _loader(self.data.train, self.data.train_context, batch_sampler=self.batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split in one batch."""
        x, context = self.data.validation, self.data.validation_context
        return _loader(x, context, batch_size=len(x))


def _loader(x: Tensor, context: Tensor | None, **options: Any) -> DataLoader[Any]:
    tensors = (x,) if context is None else (x, context)
    return DataLoader(TensorDataset(*tensors), collate_fn=default_collate, **options)
