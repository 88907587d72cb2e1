"""Models and runs as files: plain values in YAML, weights in safetensors, never pickle.

descriptions    objects as plain values, and back
config          plain values in YAML
weights         tensors in safetensors
netcdf          results
files, folders  written completely or not at all; marked and locked
fingerprint     by which a model is recognised
models          a reverse chain as a folder; imported where chains are

A file is made in memory and then written as ``files`` does: a reader sees the old file or the new
one.  Files that are read may come from anywhere: their size, depth and names are checked before
anything is made of them, and whatever is wrong with one is a ValueError that names it.
"""

from pyrodiff.serialization.config import read_config, write_config
from pyrodiff.serialization.descriptions import describe, entry
from pyrodiff.serialization.files import write_atomically, write_bytes
from pyrodiff.serialization.fingerprint import fingerprint
from pyrodiff.serialization.netcdf import netcdf_content
from pyrodiff.serialization.weights import (
    check_shapes,
    load_weights,
    read_weights,
    write_weights,
)

__all__ = [
    "check_shapes",
    "describe",
    "entry",
    "fingerprint",
    "load_weights",
    "netcdf_content",
    "read_config",
    "read_weights",
    "write_atomically",
    "write_bytes",
    "write_config",
    "write_weights",
]
