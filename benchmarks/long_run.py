"""What a long run holds over time: host memory, device memory, open files and threads.

    python benchmarks/long_run.py
    python benchmarks/long_run.py --steps 5000 --json long.json

Soft targets on the smallest networks, digits, through the whole loop: metrics at every step, an evaluation and a
checkpoint every two epochs of 83 steps. A line is measured between two dispatches, while a checkpoint may be under way.
What grows with the steps shows as the difference between the two halves: the exit status is 1 if the maximum of the
device's bytes or of the open files grew at all, or the mean of the host's memory by more than 2 %.
"""

import argparse
import math
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from _common import hardware, save_record, versions

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from helpers import small_config  # noqa: E402

from gompertz_jax.training.feed import Feed  # noqa: E402
from gompertz_jax.training.loop import train_and_evaluate  # noqa: E402

STEPS_PER_EPOCH = 83  # of 16 images
COLUMNS = "step", "seconds", "host MB", "device bytes", "open files", "threads"


def measured(step, begun):
    """One line of the table."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = sum(array.nbytes for array in jax.live_arrays())
    host = round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
    seconds = round(time.monotonic() - begun, 1)
    return step, seconds, host, held, len(os.listdir("/proc/self/fd")), threading.active_count()


def main():
    """Print a line every so many steps and the difference between the halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    found = versions("jax", "jaxlib", "flax", "orbax-checkpoint")
    print(f"{options.steps:,} steps; {hardware()}; {found}", flush=True)
    print("".join(f"{name:>14}" for name in COLUMNS), flush=True)

    every, begun, lines, call = max(1, options.steps // options.lines), time.monotonic(), [], Feed.__call__

    def watched(self, step):
        # The teacher's steps are fewer than the first line's.
        if step >= every * (len(lines) + 1):
            lines.append(measured(step, begun))
            print("".join(f"{value:>14,}" for value in lines[-1]), flush=True)
        return call(self, step)

    Feed.__call__ = watched
    changes = {
        "recipe.batch_size": 16,
        "recipe.epochs": math.ceil(options.steps / STEPS_PER_EPOCH),
        "evaluate_every_epochs": 2,
        "steps_per_dispatch": 50,
    }
    with tempfile.TemporaryDirectory(prefix="gompertz_jax_long_") as directory:
        result = train_and_evaluate(small_config(**changes), Path(directory) / "run")
        checkpoints = result["steps"] // (2 * STEPS_PER_EPOCH)
    table = np.array(lines)
    early, late = np.array_split(table, 2)
    grown = {
        "host": round(float(late[:, 2].mean() / early[:, 2].mean() - 1), 4),
        "device": int(late[:, 3].max() - early[:, 3].max()),
        "open files": int(late[:, 4].max() - early[:, 4].max()),
    }
    print(f"{result['steps']:,} steps, about {checkpoints} checkpoints; second half against the first: {grown}")
    save_record(options, hardware(), found, columns=COLUMNS, lines=lines, grown=grown, steps=result["steps"])
    sys.exit(grown["host"] > 0.02 or grown["device"] > 0 or grown["open files"] > 0)


if __name__ == "__main__":
    main()
