"""A comparison as one program against its arms one by one, and against the least it can cost.

    python benchmarks/compare.py                        # 8 arms of soft targets, resnet56 -> resnet20, batch 64
    python benchmarks/compare.py --layouts map,vmap --arms 4 --json compare.json

Every arm is CE + KD under another constant. Timed alternately, each by its seconds per step: "one program", all arms by
`make_comparison_step` in each layout; "separate", a step of `make_train_step` by each arm, one after another;
"teacher", its forward pass alone; "student", a step of the student on given soft targets. The least that a comparison
can cost is teacher + arms x student. Compilation is reported separately.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from _common import hardware, save_record, versions
from jax_step import rolled

import gompertz_jax as gj
from gompertz_jax.students import LAYOUTS, Students, grouped, make_comparison_step, stacked
from gompertz_jax.training.sharding import data_mesh, replicate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--arms", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="a dispatch")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--layouts", default="map", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--json")
    options = parser.parse_args()

    mesh = data_mesh()  # whatever devices there are, for both sides

    def network(name, key):
        return gj.models.create(name, num_classes=options.classes, key=jax.random.key(key))

    student, teacher, optimizer = (
        network(options.student, 0),
        network(options.teacher, 1),
        optax.sgd(0.05, momentum=0.9),
    )
    ce, kd = gj.gompertz_objective(1000, wasserstein_weight=0.0, gradient_weight=0.0).terms
    arms = [
        gj.Objective((ce, kd._replace(weight=gj.constant_schedule(0.5 + 0.1 * number))))
        for number in range(options.arms)
    ]
    state = gj.init_state(student, optimizer, arms[0], (32, 32, 3), teacher=teacher)
    batch = {
        "image": jax.random.uniform(jax.random.key(2), (options.batch, 32, 32, 3)),
        "label": jnp.arange(options.batch) % options.classes,
    }
    state, teacher, batch = replicate((state, teacher, batch), mesh)
    told = batch | {"teacher_logits": teacher.forward(batch["image"], train=False, frozen=True)[0].logits}

    def copy():
        return jax.tree.map(jnp.copy, state)

    several = {"make_batch": rolled, "steps_per_dispatch": options.steps, "mesh": mesh}

    def of_one(taught, batch):
        step = gj.make_train_step(student, optimizer, arms[0], **several)
        step = step.lower(state, taught, batch).compile()
        return lambda held: step(held, taught, batch)[0]

    def of_all(layout):
        groups = grouped(arms)
        students = replicate(Students(jnp.int32(0), (stacked([state] * options.arms),)), mesh)
        step = make_comparison_step(student, optimizer, groups, layout=layout, **several)
        step = step.lower(students, teacher, batch).compile()
        return students, lambda held: step(held, teacher, batch)[0]

    @jax.jit
    def look(total):
        def once(total, _):
            return total + teacher.forward(batch["image"] + total * 0, train=False, frozen=True)[0].logits.mean(), None

        return jax.lax.scan(once, total, length=options.steps)[0]

    kinds, compiled = {}, {}

    def add(name, make):
        started = time.perf_counter()
        held, call = make()
        compiled[name] = time.perf_counter() - started
        kinds[name] = [held, call, 1]

    for layout in options.layouts.split(","):
        add(f"one program, {layout}", lambda layout=layout: of_all(layout))
    add("separate", lambda: (copy(), of_one(teacher, batch)))
    kinds["separate"][2] = options.arms
    add("student", lambda: (copy(), of_one(None, told)))
    add("teacher", lambda: (jnp.float32(0), look.lower(jnp.float32(0)).compile()))
    seconds = {name: [] for name in kinds}
    for repetition in range(options.repetitions + 1):
        for name, kind in kinds.items():
            started = time.perf_counter()
            for _ in range(kind[2]):
                kind[0] = jax.block_until_ready(kind[1](kind[0]))
            if repetition:  # the first one warms up
                seconds[name].append((time.perf_counter() - started) / options.steps)
    least = [t + options.arms * s for t, s in zip(seconds["teacher"], seconds["student"], strict=True)]
    print(f"{options.arms} arms, {options.teacher} -> {options.student}, batch {options.batch}; {hardware()}")
    print(f"{'':24}{'s/step, median':>16}{'range':>20}{'compile s':>11}{'separate /':>12}{'/ least':>9}")
    ratios = {}
    for name, times in [*seconds.items(), ("teacher + arms x student", least)]:
        median = statistics.median(times)
        row = f"{name:24}{median:16.3f}{f'{min(times):.3f} to {max(times):.3f}':>20}{compiled.get(name, 0.0):11.1f}"
        if name.startswith("one"):
            against = [a / b for a, b in zip(seconds["separate"], times, strict=True)]
            over = [a / b for a, b in zip(times, least, strict=True)]
            ratios[name] = {"separate": against, "least": over}
            row += f"{statistics.median(against):12.2f}{statistics.median(over):9.2f}"
        print(row)
    save_record(
        options, hardware(), versions("jax", "flax", "optax"), seconds=seconds, compiled=compiled, ratios=ratios
    )


if __name__ == "__main__":
    main()
