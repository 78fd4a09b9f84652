"""What a run takes of memory, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent / "benchmarks" / "scale.py"
LIMIT = 2
"""Multiples of the model's bytes: the original, and what a pass makes of it."""


def test_a_run_keeps_the_original_and_what_a_pass_makes_of_it_and_no_third_copy() -> None:
    run = subprocess.run([sys.executable, str(BENCHMARK), "--quick"], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["bytes"] > 90 * 2**20
    assert 1 < found["peak"] < LIMIT
