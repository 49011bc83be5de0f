"""Kill a run again and again at random moments, and compare what it ends in with an uninterrupted one, to the bit.

    python benchmarks/kill.py --kills 50
    python benchmarks/kill.py --kills 4 --seed 1 --json kill.json

One run is left alone. Others are started by the same `python train.py` command and killed (SIGKILL) after a time drawn
uniformly from 0 to as long as the run that was left alone took from warm caches; each is started again until it ends,
and its results, metrics, parameters, optimiser state and best weights are compared. After every tenth kill a compiled
program in the cache is cut in half, as a kill may leave it. What the killed process was doing is inferred from what it
left: its last output and the files in its workdir.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import hardware, save_record, versions

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from helpers import differences  # noqa: E402

CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers import small_config

def get_config():
    return small_config(**{{"recipe.epochs": 15, "teacher.recipe.epochs": 15}})
"""


def start(directory, workdir, cache):
    """The command of every start."""
    command = [sys.executable, str(ROOT / "train.py"), f"--config={directory / 'config.py'}", f"--workdir={workdir}"]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (directory / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def phase(workdir, since):
    """What a run that was started at time `since` and just killed had been doing."""
    if any(path.stat().st_mtime > since for path in workdir.rglob("*.orbax-checkpoint-tmp*")):
        return "saving"
    if (workdir / "network").exists():
        return "after the last step"
    for part, name in ((workdir, "student"), (workdir / "teacher", "teacher")):
        if (part / "checkpoints.json").exists():
            return f"{name} in training"
        if (part / "metrics.jsonl").exists():
            return f"{name} in its first steps"
    return "starting or compiling the teacher" if not (workdir / "teacher" / "teacher.json").exists() else "compiling"


def finish(directory, workdir, cache):
    """Start a run and let it end."""
    begun = time.monotonic()
    if start(directory, workdir, cache).wait(timeout=600) != 0:
        sys.exit((directory / "log").read_text())
    return time.monotonic() - begun


def main():
    """Print a line per kill and the sum; exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    found = versions("jax", "jaxlib", "flax", "orbax-checkpoint")
    print(f"{options.kills} kills, seed {options.seed}; {hardware()}; {found}", flush=True)

    with tempfile.TemporaryDirectory(prefix="gompertz_jax_kill_") as name:
        directory = Path(name)
        (directory / "config.py").write_text(CONFIG)
        cold = finish(directory, directory / "whole", directory / "cache")
        warm = finish(directory, directory / "warm", directory / "cache")
        unequal = differences(directory / "whole", directory / "warm")
        print(f"left alone: {cold:.1f} s, from warm caches {warm:.1f} s, differences {unequal}", flush=True)

        kills, runs, phases = 0, 0, collections.Counter()
        while kills < options.kills:
            workdir, cache = directory / f"killed{runs}", directory / "cache_of_the_killed"
            while True:
                since, process = time.time(), start(directory, workdir, cache)
                try:
                    process.wait(timeout=moments.uniform(0, warm) if kills < options.kills else 600)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                if process.wait() == 0:
                    break
                if process.returncode != -signal.SIGKILL:
                    sys.exit((directory / "log").read_text())
                kills += 1
                phases[phase(workdir, since)] += 1
                if kills % 10 == 0 and (entries := sorted(cache.glob("*-cache"))):
                    entry = moments.choice(entries)
                    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
            runs += 1
            unequal += differences(directory / "whole", workdir)
            print(f"run {runs} ended after {kills} kills in all; differences: {unequal}", flush=True)
    print(f"{kills} kills over {runs} runs, {len(unequal)} differences; killed while: {dict(phases)}")
    save_record(options, hardware(), found, kills=kills, runs=runs, differences=unequal, phases=dict(phases))
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
