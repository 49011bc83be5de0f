"""The other side of sinkhorn.py: POT's log-domain solver in PyTorch, its gradient by the envelope theorem."""

import time
import warnings

import _worker
import numpy as np
import ot
import torch

PROBLEM = {}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def solve(stop):
    """Value and plan; `e = epsilon * mean cost`, a constant in differentiation, as ours."""
    cost = squared(PROBLEM["x"], PROBLEM["y"])
    strength = float(PROBLEM["epsilon"] * cost.detach().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ot.solve(cost, reg=strength, method="sinkhorn_log", grad="envelope", tol=stop, max_iter=10_000)


def squared(x, y):
    """Squared Euclidean distances by one product of matrices."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def load(path, epsilon, threshold):
    """Find the loosest of POT's own tolerances at which its plan is as good as ours has to be; what it then returns."""
    with np.load(path) as arrays:
        x, y = (torch.from_numpy(arrays[name]).to(DEVICE) for name in ("x", "y"))
    PROBLEM.update(x=x, y=y, epsilon=epsilon)
    stop = threshold
    while True:
        plan = solve(stop).plan
        n, m = plan.shape
        error = max(float((plan.sum(1) - 1 / n).abs().sum()), float((plan.sum(0) - 1 / m).abs().sum()))
        if error <= threshold:
            break
        stop /= 2
    PROBLEM["stop"] = stop
    PROBLEM["x"] = x.requires_grad_()
    value = solve(stop).value
    (gradient,) = torch.autograd.grad(value, PROBLEM["x"])
    return {"value": float(value.detach()), "gradient": gradient.tolist(), "stop": stop, "marginal_error": error}


def run(kind, times):
    """Seconds that `times` calls take."""
    start = time.perf_counter()
    for _ in range(times):
        if kind == "forward":
            with torch.no_grad():
                solve(PROBLEM["stop"])
        else:
            torch.autograd.grad(solve(PROBLEM["stop"]).value, PROBLEM["x"])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def about():
    """Versions."""
    return {"torch": torch.__version__, "pot": ot.__version__, "device": DEVICE}


if __name__ == "__main__":
    _worker.serve({"load": load, "run": run, "about": about})
