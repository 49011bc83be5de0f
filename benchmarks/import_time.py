"""How long `import gompertz_jax` takes, next to `import jax` alone.

    python benchmarks/import_time.py [--repetitions N] [--json FILE]

Fresh processes in turn, one of each kind a repetition; the clock runs around the import only.
"""

import argparse
import statistics
import subprocess
import sys

from _common import commit, processor, save_record, spread, versions

MODULES = ("jax", "gompertz_jax")


def seconds(module):
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--json")
    options = parser.parse_args()
    for module in MODULES:  # the first import fills the disk cache
        seconds(module)
    readings = [[seconds(module) for module in MODULES] for _ in range(options.repetitions)]
    alone, whole = zip(*readings, strict=True)
    ratios = [b / a for a, b in readings]
    print("| import jax | import gompertz_jax | ratio, median (range) |")
    print("|---|---|---|")
    print(f"| {statistics.median(alone):.2f} s | {statistics.median(whole):.2f} s | {spread(ratios)} |")
    used = versions("jax", "optax")
    print(f"n = {options.repetitions}; {processor()}; {used}; commit {commit()}")
    save_record(options, processor(), used, readings=readings)


if __name__ == "__main__":
    main()
