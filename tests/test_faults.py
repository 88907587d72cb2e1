"""A sample of the faults at file operations; ``make faults`` takes all of them.

Which ones is fixed, and every command, kind of fault and file operation is among them somewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_is_lost_to_a_sample_of_faults(tmp_path: Path) -> None:
    """In a process of its own, whose children start from what is imported and computed nothing."""
    counts, program = tmp_path / "faults.json", Path(__file__).with_name("faults.py")
    command = [sys.executable, str(program), "--every", "37", "--output", str(counts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    outcome = json.loads(counts.read_text())
    assert outcome["faults"] > 50 and outcome["lost"] == 0
    assert {name.partition(":")[0] for name in outcome["outcomes"]} == {
        "kill",
        "disk full",
        "I/O error",
    }
