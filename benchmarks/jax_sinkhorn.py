"""Our side of sinkhorn.py: `gj.sinkhorn_distance`, compiled."""

import time

import _worker
import jax
import jax.numpy as jnp
import numpy as np

import gompertz_jax as gj

PROGRAMS = {}
CLOUDS = []


def load(path, epsilon, threshold):
    """Compile both programs for the clouds in `path`; what they return."""
    with np.load(path) as arrays:
        CLOUDS[:] = jnp.asarray(arrays["x"]), jnp.asarray(arrays["y"])
    options = {"epsilon": epsilon, "threshold": threshold, "max_iterations": 10_000}

    def value(x, y):
        return gj.sinkhorn_distance(x, y, **options)

    PROGRAMS.update(forward=jax.jit(value), gradient=jax.jit(jax.value_and_grad(value)))
    cost, gradient = PROGRAMS["gradient"](*CLOUDS)
    PROGRAMS["forward"](*CLOUDS)
    _, health = gj.sinkhorn_distance(*CLOUDS, return_diagnostics=True, **options)
    return {
        "value": float(cost),
        "gradient": np.asarray(gradient).tolist(),
        "iterations": int(health.iterations),
        "marginal_error": float(health.marginal_error),
    }


def run(kind, times):
    """Seconds that `times` calls take."""
    start = time.perf_counter()
    for _ in range(times):
        result = PROGRAMS[kind](*CLOUDS)
    jax.block_until_ready(result)
    return time.perf_counter() - start


def about():
    """Version and device."""
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


if __name__ == "__main__":
    _worker.serve({"load": load, "run": run, "about": about})
