"""Evaluation mode for a while: dropout off, every part's own mode back afterwards."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["evaluation_mode"]

_lock = threading.Lock()
# How many evaluations a module is in at the moment, and the mode that it had before the first.
_evaluated: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """``module.eval()`` inside; afterwards every submodule has the mode that it came with.

    A part that was frozen (a ``BatchNorm`` in evaluation mode within a network in training) stays
    so, and an exception changes nothing.  Evaluations may be nested, or run in several threads
    at once, also of modules that share parts: the last one to end restores a part's mode.
    """
    parts = list(module.modules())
    with _lock:
        for part in parts:
            count, mode = _evaluated.get(part, (0, part.training))
            _evaluated[part] = (count + 1, mode)
        module.eval()
    try:
        yield
    finally:
        with _lock:
            states = [(part, *_evaluated.pop(part)) for part in parts]
            _, count, mode = states[0]
            if count == 1:
                module.train(mode)  # which a part may have overridden to do more
            for part, count, mode in states:
                part.training = mode and count == 1
                if count > 1:
                    _evaluated[part] = (count - 1, mode)
