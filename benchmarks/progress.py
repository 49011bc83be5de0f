"""The Gompertz curve by the clock and by the student's progress, on digits: accuracy by arm and paired differences.

    python benchmarks/progress.py --workdir DIR [--seeds N] [--arms ARM ...] [--json FILE]

One teacher for all; arms of one seed begin with equal weights and see equal batches. Nothing is tuned here. Runs that
are finished in DIR are not made again.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from _common import commit, hardware, save_record, versions
from scipy import stats

from gompertz_jax.training.loop import train_and_evaluate
from gompertz_jax.training.writer import read_metrics

sys.path.insert(0, str(Path(__file__).parent.parent))
from configs import digits

GOMPERTZ = "gompertz(displacement=5, rate=8)"
ARMS = {
    "clock": {"objective.curve": GOMPERTZ},
    "agreement": {"objective.curve": f"progress({GOMPERTZ})"},
    "relative accuracy": {
        "objective.curve": f"progress({GOMPERTZ})",
        "objective.progress.measure": "relative_accuracy",
    },
}


def run(workdir, seed, arm):
    config = digits.get_config()
    config.logging.progress = False
    teacher = workdir / "clock-0" / "teacher"
    if (teacher / "teacher.json").exists() and (arm, seed) != ("clock", 0):
        config.teacher.dir = str(teacher)
    config.update_from_flattened_dict({"seed": seed, **ARMS[arm]})
    directory = workdir / f"{arm.replace(' ', '-')}-{seed}"
    result = train_and_evaluate(config, directory)
    train = [line for line in read_metrics(directory / "metrics.jsonl") if line["split"] == "train"]
    return {
        "test_accuracy_last": result["test_accuracy_last"],
        "mean_weight": float(np.mean([line["kd/weight"] for line in train])),
        "final_progress": train[-1].get("progress"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="the clock is always one")
    parser.add_argument("--json")
    options = parser.parse_args()
    found = {arm: [] for arm in ARMS if arm == "clock" or arm in options.arms}
    for seed in range(options.seeds):
        for arm in found:
            found[arm].append(run(options.workdir, seed, arm))
    print("| curve by | test accuracy, last step | difference (95 %) | mean weight | progress |")
    print("|---|---|---|---|---|")
    clock = np.array([one["test_accuracy_last"] for one in found["clock"]])
    for arm, runs in found.items():
        accuracy = np.array([one["test_accuracy_last"] for one in runs])
        difference = progress = ""
        if arm != "clock":
            low, high = stats.ttest_rel(accuracy, clock).confidence_interval(0.95)
            difference = f"{100 * np.mean(accuracy - clock):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
            progress = f"{np.mean([one['final_progress'] for one in runs]):.3f}"
        spread = f"{100 * accuracy.mean():.2f} ± {100 * accuracy.std(ddof=1):.2f} % (n = {len(runs)})"
        weight = np.mean([one["mean_weight"] for one in runs])
        print(f"| {arm} | {spread} | {difference} | {weight:.3f} | {progress} |")
    used = versions("jax", "flax", "optax", "ott-jax")
    print(f"{hardware()}; {used}; commit {commit()}")
    options.workdir = str(options.workdir.name)
    save_record(options, hardware(), used, runs=found)


if __name__ == "__main__":
    main()
