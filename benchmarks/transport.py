"""What every form of transport costs in a compiled program, and whether its iterations converge.

    python benchmarks/transport.py
    python benchmarks/transport.py --repetitions 3 --json transport.json

Value and gradient at batch 128. A per-image form compares 64 points in 64 dimensions with 64 others, of every image; a
batch form 128 points, one per image, with 10 classes; WKD-L the probabilities of 100 classes. All points are normal,
the teacher's shifted by .3; `--matched` moves each of them by that share of the way to the student's of the same index.
The programs take turns; a cell is the median of the repetitions with the fastest and slowest. Health is that of one
evaluation: the share of problems that converged, the largest number of iterations and the largest marginal error.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _common import commit, hardware, save_record, versions

import gompertz_jax as gj

BATCH, POINTS, WIDTH, CLASSES = 128, 64, 64, 100


def forms(matched):
    """Name -> (loss, its arguments, whether it returns diagnostics); the gradient is by the first argument."""
    rng = np.random.default_rng(0)

    def pair(*shape):
        student, other = rng.normal(size=(2, *shape)).astype(np.float32)
        return jnp.asarray(student), jnp.asarray(matched * student + (1 - matched) * (other + np.float32(0.3)))

    maps, images = pair(BATCH, POINTS, WIDTH), pair(BATCH, WIDTH)
    logits = tuple(3.0 * scores for scores in pair(BATCH, CLASSES))
    labels = jnp.asarray(rng.integers(0, 10, BATCH))
    class_cost = gj.class_distances(jnp.asarray(rng.normal(size=(CLASSES, WIDTH)), jnp.float32))
    sinkhorn = partial(gj.sinkhorn_distance, return_diagnostics=True)
    in_classes = partial(gj.class_sinkhorn_distance, return_diagnostics=True)

    def of_logits(student, teacher, cost, labels):
        return gj.wasserstein_logits(student, teacher, cost, labels=labels, return_diagnostics=True)

    return {
        "plain, epsilon .05": (sinkhorn, maps, True),
        "plain, epsilon .01": (partial(sinkhorn, epsilon=0.01), maps, True),
        "plain, threshold .01": (partial(sinkhorn, threshold=0.01), maps, True),
        "debiased": (partial(sinkhorn, debiased=True), maps, True),
        "cosine": (partial(sinkhorn, cost="cosine"), maps, True),
        "unbalanced, penalty 1": (partial(sinkhorn, marginal_penalty=1.0), maps, True),
        "batch": (sinkhorn, images, True),
        "class-aware batch": (in_classes, (*images, labels), True),
        "Gaussian": (gj.gaussian_wasserstein, maps, False),
        "sliced, 64 directions": (partial(gj.sliced_wasserstein, key=jax.random.key(0)), maps, False),
        "WKD-L": (of_logits, (*logits, class_cost, labels), True),
    }


def compiled(loss, arguments, has_health):
    """A function that runs the program once and returns its seconds, and the health of the iterations or None."""

    def mean(*arguments):
        result = loss(*arguments)
        return (result[0].mean(), result[1]) if has_health else (result.mean(), None)

    program = jax.jit(jax.value_and_grad(mean, has_aux=True)).lower(*arguments).compile()

    def run():
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return time.perf_counter() - start

    (_, health), _ = program(*arguments)
    if health is None:
        return run, None
    return run, {
        "converged": float(jnp.mean(health.converged)),
        "iterations": int(jnp.max(health.iterations)),
        "marginal_error": float(jnp.max(health.marginal_error)),
    }


def main():
    """Print the table; write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--matched", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    programs = {name: compiled(*form) for name, form in forms(options.matched).items()}
    seconds = {name: [] for name in programs}
    for _ in range(options.repetitions):
        for name, (run, _) in programs.items():
            seconds[name].append(run())

    found = versions("jax", "jaxlib", "ott-jax")
    print(f"{hardware()}; commit {commit()}; {found}; n = {options.repetitions}; matched {options.matched:g}\n")
    print("| form | ms | relative | converged | iterations | marginal error |\n|---|---|---|---|---|---|")
    first = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, (_, health) in programs.items():
        times = [1e3 * value for value in seconds[name]]
        median = statistics.median(times)
        rows.append({"form": name, "seconds": seconds[name], "health": health})
        cells = " | | " if health is None else "{converged:.0%} | {iterations} | {marginal_error:.1e}".format(**health)
        print(
            f"| {name} | {median:.2f} ({min(times):.2f} to {max(times):.2f}) | {median / (1e3 * first):.2f} | {cells} |"
        )
    save_record(options, hardware(), found, rows=rows)


if __name__ == "__main__":
    main()
