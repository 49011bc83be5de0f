"""The pictures of docs/method.md: `python docs/pictures.py` writes them anew."""

from pathlib import Path

import numpy as np

import gompertz_jax as gj
from gompertz_jax import report

STEPS = 1000
HERE = Path(__file__).parent


def curve():
    """The default curve with what its parameters do, and the controls that a claim about it needs."""
    figure = report.new_figure(10.0, 3.6)
    shape, controls = figure.subplots(1, 2, sharey=True)
    steps = np.arange(STEPS)
    for displacement, rate in ((5, 8), (5, 16), (20, 8), (2, 8)):
        values = gj.gompertz_schedule(STEPS, displacement=displacement, rate=rate)(steps)
        shape.plot(
            steps / STEPS,
            values,
            label=f"b = {displacement}, c = {rate}",
            lw=2.2 if (displacement, rate) == (5, 8) else 1,
        )
    inflection = np.log(5) / 8
    shape.plot([inflection], [1 / np.e], "o", color="C0", label="steepest: ln(b) / c, at 1/e")
    default = gj.gompertz_schedule(STEPS)
    for name, schedule in {
        "the curve": default,
        "the constant of its mean": gj.matched_constant(default, STEPS),
        "reversed": gj.reversed_schedule(default, STEPS),
        "logistic": gj.logistic_schedule(STEPS),
        "cosine": gj.cosine_schedule(STEPS),
    }.items():
        controls.plot(steps / STEPS, np.broadcast_to(schedule(steps), steps.shape), label=name)
    report.label_axes(shape, "exp(-b exp(-c tau))", "fraction of training, tau", legend=8)
    report.label_axes(controls, "controls", "fraction of training, tau", legend=8)
    return figure


def objective():
    """What each term of the default objective reads of the two networks."""
    figure = report.new_figure(10.0, 4.2)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(0, 10), ylim=(0, 6))

    def box(x, y, width, text, color):
        style = {"boxstyle": "round,pad=0.3", "facecolor": color, "edgecolor": "0.3"}
        axes.text(x, y, text, ha="center", va="center", fontsize=10, bbox=style | {"mutation_aspect": width})

    def arrow(start, end, style="-"):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.35", "linestyle": style, "lw": 1.2})

    box(0.9, 3, 1, "images\nin [0, 1]", "#eeeeee")
    for y, name, color in ((4.6, "teacher, fixed", "#dbe9f6"), (1.4, "student", "#fde3cf")):
        for x, text in ((3.0, name), (4.9, "last map"), (6.5, "logits")):
            box(x, y, 1, text, color)
        arrow((1.35, 3 + 0.15 * np.sign(y - 3)), (2.3, y))
        arrow((3.85 if y > 3 else 3.45, y), (4.4, y))
        arrow((5.4, y), (6.1, y))
    terms = (
        (3.0, "M: 1 - cosine of\ninput gradients"),
        (4.9, "W: transport\nbetween positions"),
        (6.5, "KL(teacher ||\nstudent)"),
    )
    for x, text in terms:
        box(x, 3, 1, text, "#e2f0d9")
        arrow((x, 4.25), (x, 3.5))
        arrow((x, 1.75), (x, 2.5))
    box(8.9, 1.4, 1, "CE with labels", "#f6e7b4")
    arrow((6.95, 1.4), (7.95, 1.4))
    box(8.9, 3, 1, "L = CE + G(step)\n[ T² KL + b W + c M ]", "#ffffff")
    arrow((7.2, 3), (7.8, 3))
    arrow((8.9, 1.75), (8.9, 2.5))
    return figure


if __name__ == "__main__":
    for picture in (curve, objective):
        report.save(picture(), HERE / f"{picture.__name__}.png")
