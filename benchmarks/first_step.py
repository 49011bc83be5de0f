"""From an empty process to the end of the first dispatch, without and with compiled programs from an earlier start.

    python benchmarks/first_step.py
    python benchmarks/first_step.py --pairs resnet56-resnet20 --repetitions 3 --json first_step.json

Each start is a separate process. A cold one has an empty compilation cache, a warm one the cache of the cold one before
it. The seconds are from the start of the process, imports and initial weights included; `first step` is the first call
of the compiled step alone: tracing, compiling or loading, and one step of a batch of 64 under the full objective.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

from _common import commit, hardware_of, save_record, versions

START = """
import sys, time
began = time.perf_counter()
import jax, optax
import gompertz_jax as gj
from gompertz_jax.training.compilation import keep_compiled

keep_compiled(sys.argv.pop(1))
teacher, student = (
    gj.models.create(name, num_classes=100, key=jax.random.key(seed)) for seed, name in enumerate(sys.argv[1:])
)
objective, optimizer = gj.gompertz_objective(1000), optax.sgd(0.1, momentum=0.9)
state = gj.init_state(student, optimizer, objective, (32, 32, 3), teacher=teacher)
batch = {"image": jax.random.uniform(jax.random.key(2), (64, 32, 32, 3)), "label": jax.numpy.arange(64)}
step = gj.make_train_step(student, optimizer, objective)
jax.block_until_ready(batch)
ready = time.perf_counter()
jax.block_until_ready(step(state, teacher, batch))
print(time.perf_counter() - ready, time.perf_counter() - began)
print(jax.devices()[0].device_kind)
"""


def start(pair, cache):
    """Seconds of the first step and of all of one process, and its device."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", START, cache, *pair.split("-")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, device = done.stdout.splitlines()
    first, whole = map(float, seconds.split())
    return {"first_step": first, "all": whole, "device": device}


def main():
    """Print the table; write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=("resnet20-resnet8", "resnet56-resnet20", "resnet50-mobilenetv2"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    found = versions("jax", "jaxlib", "flax")
    print(f"{found}; commit {commit()}; n = {options.repetitions}; median seconds\n")
    print(f"{'':<24}{'first step':^30}{'all':^30}")
    print(f"{'':<24}" + 2 * f"{'cold':>10}{'warm':>10}{'ratio':>10}")
    rows = {}
    for pair in options.pairs:
        starts = []
        for _ in range(options.repetitions):
            with tempfile.TemporaryDirectory() as cache:
                starts.append({"cold": start(pair, cache), "warm": start(pair, cache)})
        line = f"{pair:<24}"
        for what in ("first_step", "all"):
            cold, warm = (statistics.median(each[kind][what] for each in starts) for kind in ("cold", "warm"))
            line += f"{cold:>10.1f}{warm:>10.1f}{warm / cold:>10.2f}"
        print(line, flush=True)
        rows[pair] = starts
    (device,) = {each[kind]["device"] for starts in rows.values() for each in starts for kind in each}
    print(f"\n{hardware_of(device)}")
    save_record(options, hardware_of(device), found, rows=rows)


if __name__ == "__main__":
    main()
