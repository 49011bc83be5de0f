"""What each term adds to the step with soft targets, and what it costs to measure the terms' gradients.

    python benchmarks/terms.py
    python benchmarks/terms.py --pair resnet20-resnet8 --batch 64 --repetitions 3 --json terms.json

The steps are those of step_time.py, on the same weights, batch statistics and images, all in one process, where they
take turns: a dispatch of each per round, so that a drift of the machine falls on all. `/ KD` is the median over the
rounds of a step's seconds over the KD step's in the same round, with the smallest and largest; `flops / KD` the same of
the operations that XLA counts before it compiles, in which Sinkhorn's loop counts as one turn. The last rows are a full
step of a run that measures its terms' gradients: one at which they are measured (`term_gradients_every=1`), and one at
which they are not: it has the branch and does not take it.
"""

import argparse
import os
import statistics
import tempfile

from _common import commit, hardware, save_record, spread, versions
from jax_step import Program, make_weights
from step_time import FEWEST_STEPS, ROWS, TASK, WEIGHTS

TOLD = {"alone": "student alone", "kd": "KD", "wasserstein": "KD + W", "gradient": "KD + M", "full": "full"}


def tasks(pair, batch):
    """Name -> what `Program` is to run."""
    teacher, _, student = pair.partition("-")
    common = TASK | {"teacher": teacher, "student": student, "batch": batch, "dtype": "float32"}
    rows = {TOLD[row]: common | {"weights": {term: WEIGHTS[term] for term in terms}} for row, terms in ROWS.items()}
    every = {"full, measured": 1, "full, not measured": 10**9}
    return rows | {name: rows["full"] | {"term_gradients_every": steps} for name, steps in every.items()}


def main():
    """Print the table; write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="resnet56-resnet20", help="TEACHER-STUDENT")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    programs, prepared, flops = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.npz")
        for name, task in tasks(options.pair, options.batch).items():
            if not programs:
                make_weights(task, weights)
            programs[name] = Program()
            flops[name] = programs[name].count(task, weights, "cpu")
            prepared[name] = programs[name].prepare(task, weights, FEWEST_STEPS)
    found = versions("jax", "jaxlib", "flax", "ott-jax")
    print(f"{options.pair}, batch {options.batch}, {FEWEST_STEPS} steps a dispatch, n = {options.repetitions}")
    print(f"{hardware()}; {found}; commit {commit()}\n", flush=True)

    seconds = {name: [] for name in programs}
    for _ in range(options.repetitions):
        for name, program in programs.items():
            seconds[name].append(program.run(FEWEST_STEPS)["seconds"] / FEWEST_STEPS)
    assert all(program.finish()["sound"] for program in programs.values())
    print(f"{'':<20}{'ms a step':>10}{'/ KD':>26}{'flops / KD':>12}")
    rows = {}
    for name, values in seconds.items():
        ratios = [own / kd for own, kd in zip(values, seconds["KD"], strict=True)]
        relative = flops[name] / flops["KD"]
        rows[name] = {"seconds": values, "ratios": ratios, "flops": relative}
        print(f"{name:<20}{1e3 * statistics.median(values):>10.1f}{spread(ratios, 3):>26}{relative:>12.2f}")
    iterations = prepared["KD + W"]["sinkhorn_iterations"]
    print(f"\nSinkhorn takes {iterations:.0f} iterations")
    save_record(options, hardware(), found, rows=rows, sinkhorn_iterations=iterations)


if __name__ == "__main__":
    main()
