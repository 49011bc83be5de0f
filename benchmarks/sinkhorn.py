"""`gj.sinkhorn_distance` against POT's log-domain Sinkhorn in PyTorch, on the same clouds to the same marginal error.

    python benchmarks/sinkhorn.py
    python benchmarks/sinkhorn.py --torch-python ../torch/bin/python --json sinkhorn.json   # PyTorch and POT elsewhere

Two clouds of n normal points in 64 dimensions, one of them shifted; regularisation relative to the mean cost. POT
stops by another norm than ours: it gets the loosest tolerance at which the marginals of its plan are off by no more
than `--threshold` in sum, as ours. The sides take turns; a cell is the median milliseconds per call with the fastest
and slowest repetition.
"""

import argparse
import os
import statistics
import sys
import tempfile

import numpy as np
from _common import commit, hardware_of, save_record, spread, versions
from _worker import Worker, WorkerError

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = ("forward", "gradient")
ENVIRONMENT = {"KMP_BLOCKTIME": "5"}  # as in step_time.py
GET_POT = "pip install torch POT, or --torch-python with an interpreter that has them"


def clouds(points, path):
    """Write two clouds."""
    rng = np.random.default_rng(points)
    x, y = rng.normal(size=(2, points, 64)).astype(np.float32)
    np.savez(path, x=x, y=y + np.float32(0.3))


def measure(points, options, ours, theirs):
    """The row of one size."""
    sides = {"ours": ours} | ({"pot": theirs} if theirs else {})
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clouds.npz")
        clouds(points, path)
        found = {
            name: side.ask("load", path=path, epsilon=options.epsilon, threshold=options.threshold)
            for name, side in sides.items()
        }
    gradients = {name: np.asarray(result.pop("gradient")) for name, result in found.items()}
    row = {"points": points, "found": found, "seconds": {}}
    if theirs:
        row["value_difference"] = abs(found["ours"]["value"] / found["pot"]["value"] - 1)
        norm = np.linalg.norm(gradients["pot"])
        row["gradient_difference"] = float(np.linalg.norm(gradients["ours"] - gradients["pot"]) / norm)
    for kind in KINDS:
        # Each turn lasts about a fifth of a second.
        times = {
            name: max(1, round(0.2 / max(side.ask("run", kind=kind, times=1), 1e-5))) for name, side in sides.items()
        }
        row["seconds"][kind] = {name: [] for name in sides}
        for _ in range(options.repetitions):
            for name, side in sides.items():
                taken = side.ask("run", kind=kind, times=times[name]) / times[name]
                row["seconds"][kind][name].append(taken)
    return row


def cell(seconds):
    """Median with range, in milliseconds."""
    return spread([1e3 * value for value in seconds])


def main():
    """Print the table; write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=(128, 256, 512, 1024, 2048))
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--threshold", type=float, default=1e-3)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with PyTorch and POT")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    ours = Worker(sys.executable, os.path.join(HERE, "jax_sinkhorn.py"), ENVIRONMENT)
    theirs = Worker(options.torch_python, os.path.join(HERE, "torch_sinkhorn.py"), ENVIRONMENT)
    with ours, theirs:
        about = {"ours": ours.ask("about")}
        try:
            about["pot"] = theirs.ask("about")
        except WorkerError:
            theirs_or_none = None
            print(f"Without PyTorch and POT there is nothing to compare with: {GET_POT}.")
        else:
            theirs_or_none = theirs
        print(f"epsilon {options.epsilon:g}, marginal error {options.threshold:g}, {options.repetitions} repetitions")
        hardware = hardware_of(about["ours"]["device"])
        print(f"{hardware}; commit {commit()}; {about}\n")
        print(f"{'points':>6}  {'':9}{'ours, ms':>26}{'POT, ms':>28}{'POT / ours':>12}{'differ by':>11}")
        rows = []
        for points in options.points:
            row = measure(points, options, ours, theirs_or_none)
            rows.append(row)
            for kind in KINDS:
                seconds = row["seconds"][kind]
                other, ratio, difference = "", "", ""
                if theirs_or_none:
                    other = cell(seconds["pot"])
                    ratio = f"{statistics.median(seconds['pot']) / statistics.median(seconds['ours']):.2f}"
                    difference = f"{row['value_difference' if kind == 'forward' else 'gradient_difference']:.1e}"
                print(
                    f"{points:>6}  {kind:9}{cell(seconds['ours']):>26}{other:>28}{ratio:>12}{difference:>11}",
                    flush=True,
                )
    save_record(options, hardware, versions("jax", "jaxlib", "ott-jax"), about=about, rows=rows)


if __name__ == "__main__":
    main()
