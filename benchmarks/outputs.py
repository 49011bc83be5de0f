"""What a teacher's stored outputs save of a step with soft targets, what they cost, and after how many epochs they pay.

    python benchmarks/outputs.py
    python benchmarks/outputs.py --cases digits --repetitions 7 --json outputs.json

Both sides see the same views of the same images; one runs the teacher in every step, the other reads its stored
outputs. They take turns, one dispatch each. Storing is timed whole (compiling, the teacher on every image of every
view, the files with their sums, reading them) and one view's pass of the teacher by itself; all but the passes is
assumed to take the same time for any number of images. From both, the epochs after which storing pays are computed for
whole training sets. Weights are fresh and CIFAR's images are noise: nothing here depends on what they show.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from _common import hardware, save_record, versions

import gompertz_jax as gj
from gompertz_jax.training.config import get_default
from gompertz_jax.training.data import load
from gompertz_jax.training.feed import Feed, Images
from gompertz_jax.training.outputs import asked, stored_outputs
from gompertz_jax.training.sharding import data_mesh, replicate

VIEWS = 2


class Case(NamedTuple):
    """A pair of networks on images."""

    teacher: str
    student: str
    batch: int
    steps_per_dispatch: int
    images: int  # that are stored here; 0: the digits
    whole: int  # images of the training set


CASES = {
    "resnet56-resnet20": Case("resnet56", "resnet20", 128, 4, 1024, 45_000),
    "resnet20-resnet8": Case("resnet20", "resnet8", 128, 8, 2048, 45_000),
    "digits": Case("resnet14", "resnet8", 64, 20, 0, 1258),
}


def training_set(case, mesh):
    """Images with labels, on the device, and how many classes there are."""
    if case.images:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, size=(case.images, 32, 32, 3), dtype=np.uint8), np.arange(case.images) % 100
    else:
        images = load("digits", validation=180).train
    return Images(*replicate(tuple(images), mesh), None), 100 if case.images else 10


def measure(case, repetitions):
    """Seconds of a step on either side, in turns, and of storing one view."""
    mesh, augment = data_mesh(), get_default().augment
    data, classes = training_set(case, mesh)
    shape = data.images.shape[1:]
    keys = jax.random.split(jax.random.key(0))
    teacher, student = (
        gj.models.create(name, num_classes=classes, in_channels=shape[-1], mean=0.5, std=0.25, key=key)
        for name, key in zip((case.teacher, case.student), keys, strict=True)
    )
    objective = gj.gompertz_objective(1000, wasserstein_weight=0.0, gradient_weight=0.0)
    optimizer = optax.sgd(0.01, momentum=0.9, nesterov=True)

    settings = {"seed": 0, "augment": augment, "mesh": mesh}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        outputs = stored_outputs(Path(folder) / "outputs", teacher, data, parts=("logits",), views=VIEWS, **settings)
        jax.block_until_ready(outputs)
        storing = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    template = {"logits": jax.ShapeDtypeStruct((len(data.labels), classes), np.float32)}
    ask = asked(teacher, data, template, **settings)
    ask(0)
    start = time.perf_counter()
    ask(1)
    passing = time.perf_counter() - start

    def side(outputs, teacher):
        feed = Feed(
            data,
            batch_size=case.batch,
            steps_per_dispatch=case.steps_per_dispatch,
            views=VIEWS,
            outputs=outputs,
            **settings,
        )
        compiled_in = {"make_batch": feed.make_batch, "steps_per_dispatch": case.steps_per_dispatch, "mesh": mesh}
        step = gj.make_train_step(student, optimizer, objective, **compiled_in)
        state = gj.init_state(student, optimizer, objective, shape, teacher=teacher)
        state, teacher = replicate((state, teacher if outputs is None else None), mesh)
        compiled = step.lower(state, teacher, feed(0)).compile()
        losses = []

        def seconds():
            nonlocal state
            start = time.perf_counter()
            state, metrics = compiled(state, teacher, feed(0))
            losses.append(np.asarray(metrics["loss"]))
            return (time.perf_counter() - start) / case.steps_per_dispatch

        return seconds, losses

    (live, live_losses), (stored, stored_losses) = side(None, teacher), side(outputs, teacher)
    live(), stored()
    turns = [(live(), stored()) if number % 2 else (stored(), live())[::-1] for number in range(repetitions)]
    return {
        "live": [turn[0] for turn in turns],
        "stored": [turn[1] for turn in turns],
        "storing_seconds_per_image": passing / len(data.labels),
        "storing_seconds_besides": storing - VIEWS * passing,
        "bytes_on_disk": size,
        "bytes_on_device": sum(leaf.nbytes for leaf in jax.tree.leaves(outputs)),
        "images": len(data.labels),
        "difference": float(abs(live_losses[0][0] / stored_losses[0][0] - 1)),  # later steps magnify rounding
    }


def main():
    """Print a line per case; write them as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    found = versions("jax", "jaxlib", "flax", "orbax-checkpoint")
    print(f"soft targets alone, {VIEWS} views; {hardware()}; {found}\n")
    columns = (
        "live, ms",
        "stored, ms",
        "saved",
        "teacher, ms/image",
        "besides, s",
        "pays after",
        "bytes/image",
        "differs",
    )
    print(f"{'':<18}" + "".join(f"{column:>19}" for column in columns))
    record = {}
    for name in options.cases:
        case = CASES[name]
        record[name] = cell = measure(case, options.repetitions)
        saved = [1 - stored / live for live, stored in zip(cell["live"], cell["stored"], strict=True)]
        live, stored = (statistics.median(cell[side]) for side in ("live", "stored"))
        cost = VIEWS * case.whole * cell["storing_seconds_per_image"] + cell["storing_seconds_besides"]
        cell["epochs"] = epochs = cost / (case.whole // case.batch * (live - stored))
        cells = (
            f"{1e3 * live:.1f}",
            f"{1e3 * stored:.1f}",
            f"{statistics.median(saved):.0%} ({min(saved):.0%} to {max(saved):.0%})",
            f"{1e3 * cell['storing_seconds_per_image']:.2f}",
            f"{cell['storing_seconds_besides']:.1f}",
            f"{epochs:.1f} epochs" if epochs > 0 else "never",
            f"{cell['bytes_on_device'] / cell['images']:.0f}, {cell['bytes_on_disk'] / cell['images']:.0f} on disk",
            f"{cell['difference']:.0e}",
        )
        print(f"{name:<18}" + "".join(f"{text:>19}" for text in cells), flush=True)
    save_record(options, hardware(), found, cases=record)


if __name__ == "__main__":
    main()
