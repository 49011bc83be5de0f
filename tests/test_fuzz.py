"""Malformed configs and arguments, a few of the thousands that `benchmarks/fuzz.py` draws, and always the same ones.

In a process of its own: the suite's annotations are checked by beartype, and would refuse before the package does.
"""

import subprocess
import sys

from helpers import ROOT


def test_malformed_configs_and_arguments_are_refused_by_name():
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--examples", "40", "--derandomize"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "configs: 10 tried" in done.stdout and "calls: 40 tried" in done.stdout
