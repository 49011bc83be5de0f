"""How much of the bare compiled step's speed the training loop delivers, evaluation and checkpoints included.

    python benchmarks/loop.py
    python benchmarks/loop.py --teacher resnet56 --student resnet20 --images 2560 --rounds 3 --json loop.json

One round: dispatches of the compiled step alone; `fit`, the loop that train.py runs, over whole epochs of the same
images with an evaluation of held-out ones (a tenth as many), a checkpoint and a metrics file after each; the bare step
again. The ratio of a round is the loop's images/s over the mean of both bare ones, so that a slow drift of the machine
cancels. Images are noise of CIFAR's size: nothing here depends on what they show.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from _common import commit, hardware, save_record, spread, versions

import gompertz_jax as gj
from gompertz_jax.training.compilation import keep_compiled
from gompertz_jax.training.config import get_default
from gompertz_jax.training.data import Dataset
from gompertz_jax.training.drive import Plan
from gompertz_jax.training.feed import Feed, Images
from gompertz_jax.training.fit import fit
from gompertz_jax.training.images import Split
from gompertz_jax.training.objectives import build_objective
from gompertz_jax.training.optim import learning_rate, make_optimizer
from gompertz_jax.training.sharding import data_mesh, replicate


def noise(count):
    """Images of noise with labels."""
    rng = np.random.default_rng(count)
    return Split(
        rng.integers(0, 256, size=(count, 32, 32, 3), dtype=np.uint8), rng.integers(10, size=count).astype(np.int32)
    )


def experiment(options):
    """Everything that both sides share."""
    config = get_default()
    config.recipe.update({"epochs": options.epochs, "batch_size": options.batch})
    config.steps_per_dispatch = options.steps_per_dispatch
    config.logging.progress = False
    held = noise(options.images // 10)
    dataset = Dataset(
        "noise", 10, noise(options.images), held, (0.5,) * 3, (0.25,) * 3, tuple("0123456789"), lambda: held
    )
    keys = jax.random.split(jax.random.key(0))
    teacher, student = (
        gj.models.create(name, num_classes=10, key=key, mean=dataset.mean, std=dataset.std)
        for name, key in zip((options.teacher, options.student), keys, strict=True)
    )
    plan = Plan.of(config.recipe, config, options.images)
    mesh = data_mesh()
    return (
        config,
        plan,
        build_objective(config, plan.steps),
        teacher,
        student,
        Images.of(dataset, config.data, mesh),
        mesh,
    )


def bare(config, plan, objective, teacher, student, data, mesh):
    """`images per second of n dispatches` of the compiled step; it keeps one state throughout."""
    rate = learning_rate(config.recipe, steps_per_epoch=plan.steps_per_epoch)
    optimizer = make_optimizer(config.recipe, rate)
    feed = Feed(
        data,
        seed=0,
        batch_size=config.recipe.batch_size,
        augment=config.augment,
        steps_per_dispatch=plan.steps_per_dispatch,
        mesh=mesh,
    )
    step = gj.make_train_step(
        student,
        optimizer,
        objective,
        make_batch=feed.make_batch,
        steps_per_dispatch=plan.steps_per_dispatch,
        logged_schedules={"learning_rate": rate},
        mesh=mesh,
    )
    state = gj.init_state(student, optimizer, objective, (32, 32, 3), teacher=teacher)
    state, teacher = replicate((state, teacher), mesh)
    holder = [step(state, teacher, feed(0))[0]]

    def images_per_second(dispatches):
        jax.block_until_ready(holder)
        start = time.perf_counter()
        for _ in range(dispatches):
            holder[0], _ = step(holder[0], teacher, feed(0))
        jax.block_until_ready(holder)
        return dispatches * plan.steps_per_dispatch * config.recipe.batch_size / (time.perf_counter() - start)

    return images_per_second


def main():
    """Print a line per round and the median; write them as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--images", type=int, default=12800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps_per_dispatch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    config, plan, objective, teacher, student, data, mesh = experiment(options)
    measure_bare = bare(config, plan, objective, teacher, student, data, mesh)
    dispatches = plan.steps // plan.steps_per_dispatch
    found = versions("jax", "jaxlib", "flax", "orbax-checkpoint")
    print(
        f"{options.teacher} -> {options.student}, full objective, batch {options.batch}, {plan.steps} steps a round of"
    )
    print(
        f"{plan.steps_per_dispatch} a dispatch, {options.epochs} evaluations and checkpoints; {hardware()}; {found}; "
        f"commit {commit()}\n"
    )
    print(f"{'bare':>10}{'loop':>10}{'bare':>10}   images/s{'loop / bare':>14}")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        keep_compiled(f"{folder}/compiled")  # no quarter of a minute of compiling between what is compared
        for number in range(options.rounds):
            before = measure_bare(dispatches)
            fitted = fit(
                config,
                config.recipe,
                plan,
                label="student",
                workdir=Path(folder) / str(number),
                network=student,
                objective=objective,
                teacher=teacher,
                data=data,
                seed=0,
                mesh=mesh,
            )
            after = measure_bare(dispatches)
            rounds.append({"before": before, "loop": fitted.images_per_second, "after": after})
            rounds[-1]["ratio"] = 2 * fitted.images_per_second / (before + after)
            cells = "".join(f"{rounds[-1][name]:>10.1f}" for name in ("before", "loop", "after"))
            print(f"{cells}{rounds[-1]['ratio']:>25.3f}", flush=True)
    ratios = [each["ratio"] for each in rounds]
    print(f"\nmedian {spread(ratios, 3)}, n = {len(ratios)}")
    save_record(options, hardware(), found, rounds=rounds)


if __name__ == "__main__":
    main()
