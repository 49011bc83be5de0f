"""One training step bare, inside scan and inside cond, with this package's convolution rules and with XLA's own.

    python benchmarks/step_contexts.py                                          # ResNet-8 alone
    python benchmarks/step_contexts.py --student resnet8 --teacher resnet14 --second_order
    python benchmarks/step_contexts.py --json step_contexts.json

A step is: the teacher's forward pass in evaluation mode (with --teacher), the student's forward and backward pass in
training mode (cross-entropy, with a teacher also soft targets at temperature 4), and a plain gradient step. With
--second_order the loss also holds one minus the cosine between both networks' input gradients.

All programs are timed in turn, so that a drift of the machine falls on all of them, and those that are compared stand
next to each other. A cell is the median milliseconds per step with the fastest and slowest repetition; "of bare" is the
time over that of a bare step with the same rules in the same repetition, as median and range.
"""

import argparse
import contextlib
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from _common import commit, hardware, save_record, spread, versions
from jax_step import rolled

import gompertz_jax as gj
from gompertz_jax.models import convolution

SCAN_LENGTH = 4


def stock_conv(x, w, *, strides=(1, 1), padding=((0, 0), (0, 0))):
    """XLA's convolution with the gradients that JAX derives; what the rules are compared with."""
    return jax.lax.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3] // w.shape[2],
    )


def make_step(student, teacher, *, second_order):
    """`(params, stats, images, labels, turn) -> (params, stats)` of plain gradient descent, on the images `rolled`."""

    def loss(params, stats, images, labels):
        network = student.replace(params=params, stats=stats)

        def forward(images):
            outputs, new_stats = network.forward(images, train=True)
            return outputs.logits, new_stats

        logits, pull_back, new_stats = jax.vjp(forward, images, has_aux=True)
        log_probabilities = jax.nn.log_softmax(logits)
        value = -jnp.take_along_axis(log_probabilities, labels[:, None], 1).mean()
        if teacher is None:
            return value, new_stats

        def teacher_forward(images):
            return teacher.forward(images, train=False)[0].logits

        if second_order:
            teacher_logits, teacher_pull_back = jax.vjp(teacher_forward, images)
            top = jax.nn.one_hot(teacher_logits.argmax(1), teacher_logits.shape[1])
            ours, theirs = pull_back(top)[0], jax.lax.stop_gradient(teacher_pull_back(top)[0])
            norms = jnp.sqrt((ours**2).sum((1, 2, 3)) * (theirs**2).sum((1, 2, 3)) + 1e-12)
            value += (1 - (ours * theirs).sum((1, 2, 3)) / norms).mean()
        else:
            teacher_logits = teacher_forward(images)
        targets = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / 4)
        return value - 16 * (targets * jax.nn.log_softmax(logits / 4)).sum(1).mean(), new_stats

    def step(params, stats, images, labels, turn):
        batch = rolled({"images": images, "labels": labels}, turn)
        gradient, stats = jax.grad(loss, has_aux=True)(params, stats, **batch)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient), stats

    return step


def in_scan(step):
    """SCAN_LENGTH steps of one program."""

    def steps(params, stats, images, labels, turn):
        def body(carry, index):
            return step(*carry, images, labels, turn + index), None

        return jax.lax.scan(body, (params, stats), jnp.arange(SCAN_LENGTH))[0]

    return steps


def in_cond(step):
    """One step behind a condition that is known at run time only."""

    def guarded(params, stats, *batch):
        keep = jnp.isfinite(batch[0].sum())
        return jax.lax.cond(keep, step, lambda params, stats, *_: (params, stats), params, stats, *batch)

    return guarded


CONTEXTS = {"bare": (lambda step: step, 1), "scan": (in_scan, SCAN_LENGTH), "cond": (in_cond, 1)}


def compile_step(context, stock, options):
    """The compiled program of one cell and its arguments."""
    key = jax.random.key(0)
    student = gj.models.create(options.student, num_classes=100, key=key)
    teacher = gj.models.create(options.teacher, num_classes=100, key=key) if options.teacher else None
    images = jax.random.uniform(jax.random.key(1), (options.batch, 32, 32, 3))
    labels = jnp.arange(options.batch) % 100
    arguments = student.params, student.stats, images, labels, jnp.int32(1)
    step = CONTEXTS[context][0](make_step(student, teacher, second_order=options.second_order))
    stock_rules = mock.patch.multiple(convolution, conv=stock_conv, depthwise_conv=stock_conv)
    with stock_rules if stock else contextlib.nullcontext():
        return jax.jit(step).lower(*arguments).compile(), arguments


def measure(options):
    """Seconds per step of every repetition: `{"ours": {"bare": [...], ...}, "stock": {...}}`."""
    cells = [(rules, context) for rules in ("ours", "stock") for context in CONTEXTS]
    programs = {cell: compile_step(cell[1], cell[0] == "stock", options) for cell in cells}
    for program, arguments in programs.values():
        jax.block_until_ready(program(*arguments))
    seconds = {rules: {context: [] for context in CONTEXTS} for rules in ("ours", "stock")}
    for _ in range(options.repetitions):
        for (rules, context), (program, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[rules][context].append((time.perf_counter() - start) / CONTEXTS[context][1])
    return seconds


def main():
    """Print the table; write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--teacher", default="", help="none by default")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--second_order", action="store_true", help="match input gradients too; needs --teacher")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.second_order and not options.teacher:
        parser.error("--second_order needs --teacher")

    stack = versions("jax", "jaxlib", "flax")
    networks = f"{options.teacher} -> {options.student}" if options.teacher else options.student
    order = ", input gradients matched" if options.second_order else ""
    print(f"{networks}{order}, batch {options.batch}, 32x32x3, float32, {options.repetitions} repetitions")
    print(f"{hardware()}; {', '.join(f'{name} {version}' for name, version in stack.items())}; commit {commit()}\n")
    print(f"{'ms per step':<12}" + "".join(f"{rules:>24}{'of bare':>26}" for rules in ("ours", "stock")))
    seconds = measure(options)
    for context in CONTEXTS:
        cells = ""
        for rules in ("ours", "stock"):
            row, bare = (np.array(seconds[rules][name]) for name in (context, "bare"))
            cells += f"{spread(1e3 * row, 0):>24}{spread(row / bare):>26}"
        print(f"{context:<12}{cells}")
    save_record(options, hardware(), stack, seconds=seconds)


if __name__ == "__main__":
    main()
