"""What the schedules of a config will do, in numbers and pictures, before anything is trained."""

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import report
from .schedules import AnySchedule, ByProgress, Schedule
from .training.check_config import PREVIEWED, check_config
from .training.config import Config
from .training.data import IMAGES
from .training.objectives import QUARTERS, at_quarters, build_objective, parse_schedule, sampled, weight_warnings
from .training.optim import rate_by_step

SATURATED, EARLY, HALF = 0.95, 0.05, 0.5
# What brings a curve to its asymptote at once.
OVER = {
    "gompertz": {"rate": 1e3},
    "gompertz_through": {"final": 1 - 1e-6},
    "logistic": {"rate": 1e3, "midpoint": 0.0},
}


class ScheduleSummary(NamedTuple):
    """A schedule in numbers.

    Attributes:
      at_quarters: values at 0, 25, 50, 75 and 100 % of training.
      area: the mean over all steps, which a control should share.
      weighted_area: the mean weighted by the learning rate: what is done late, at small rates, counts less.
      direction: "constant", "rises", "falls" or "turns".
      steepest: fraction of training at which it changes fastest, for a Gompertz curve its inflection; None where it
        changes equally fast over a stretch, or fastest at an end.
    """

    at_quarters: tuple[float, ...]
    area: float
    weighted_area: float
    direction: str
    steepest: float | None


def schedule_summary(values: np.ndarray, rates: np.ndarray) -> ScheduleSummary:
    """What a schedule does, from its value and the learning rate at every step."""
    # Between two of a hundred thousand steps a schedule changes by little more than its rounding.
    stride = max(1, len(values) // PREVIEWED)
    change = np.diff(values[::stride])
    noise = 1e-6 * max(np.abs(values).max(), 1e-30)  # float32 rounds
    rises, falls = bool((change > noise).any()), bool((change < -noise).any())
    direction = {(True, True): "turns", (True, False): "rises", (False, True): "falls"}.get((rises, falls), "constant")
    speed = np.abs(change)
    fastest = np.flatnonzero(speed >= speed.max() - noise) if direction != "constant" else np.array([0])
    last = len(change) - 1
    inner = direction != "constant" and fastest[0] > 0 and fastest[-1] < last and np.ptp(fastest) < 0.05 * last
    return ScheduleSummary(
        at_quarters=at_quarters(values),
        area=float(values.mean()),
        weighted_area=float((values * rates).sum() / rates.sum()) if rates.any() else float(values.mean()),
        direction=direction,
        steepest=float(fastest.mean() + 0.5) * stride / len(values) if inner else None,
    )


class Preview(NamedTuple):
    """All schedules of a config: values by name at every step, which of them read progress, and warnings.

    `epochs` and `steps` are those of training; `steps` is None where the number of images is known only once they are
    read.
    """

    values: Mapping[str, np.ndarray]
    summaries: Mapping[str, ScheduleSummary]
    by_progress: frozenset[str]
    warnings: Sequence[str]
    epochs: int
    steps: int | None


def preview(config: Config, *, control: Config | None = None) -> Preview:
    """Read every schedule of a config: the curve, each term's weight, temperatures and epsilons.

    Args:
      config: see `training.config.get_default`.
      control: another config, whose terms of the same names should have the same area.

    Returns:
      The values and their summaries, with warnings: a curve that is saturated before 5 % of training or never passes
      half of its asymptote, a rate that looks like one per epoch, a negative weight, an area that is not the control's.

    Raises:
      RunError: a value or a schedule of the config that a run would refuse.
    """
    check_config(config)
    known = _steps(config)
    steps = known or PREVIEWED
    rate = rate_by_step(config.recipe, steps)
    rates = np.asarray(rate(np.arange(steps)))
    schedules: dict[str, AnySchedule] = {
        "curve": parse_schedule(config.objective.curve, steps, rate=rate, where="objective.curve")
    }
    terms = build_objective(config, steps).terms
    for term in terms:
        schedules[term.name] = term.weight
        schedules |= {f"{term.name}.{key}": schedule for key, schedule in term.schedules.items()}
    values = {name: sampled(schedule, steps) for name, schedule in schedules.items()}
    summaries = {name: schedule_summary(value, rates) for name, value in values.items()}
    warnings = list(
        _curve_warnings(config.objective.curve, values["curve"], summaries["curve"], config.recipe.epochs, rate)
    )
    warnings += [text for term in terms for text in weight_warnings(term.name, values[term.name])]
    if control is not None:
        for name, theirs in preview(control).summaries.items():
            ours = summaries.get(name)
            if ours is None:
                warnings.append(f"{name}: only the control has it")
                continue
            for area in ("area", "weighted_area"):
                a, b = getattr(ours, area), getattr(theirs, area)
                if abs(a - b) > 0.01 * max(abs(a), abs(b)):
                    warnings.append(f"{name}: {area.replace('_', ' ')} {a:.4g}, the control's is {b:.4g}")
    return Preview(
        values,
        summaries,
        frozenset(name for name, schedule in schedules.items() if isinstance(schedule, ByProgress)),
        warnings,
        config.recipe.epochs,
        known,
    )


def _steps(config: Config) -> int | None:
    """The steps of training, where the data set's size is known without reading it."""
    data, recipe = config.data, config.recipe
    if data.name not in IMAGES:
        return None
    images = data.train_images or IMAGES[data.name] - data.validation
    return recipe.epochs * (images // recipe.batch_size) or None


def _asymptote(text: str, steps: int, rate: Schedule) -> float:
    """What a curve would reach if training continued: its largest value with the curves in it at their asymptotes."""
    tree = ast.parse(str(text), mode="eval")

    def finish(node: ast.AST) -> None:
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if name.startswith("matched"):  # a constant, whatever training's length
            return
        if isinstance(node, ast.Call) and name in OVER:
            kept = [keyword for keyword in node.keywords if keyword.arg not in OVER[name]]
            changed = [ast.keyword(arg=key, value=ast.Constant(value)) for key, value in OVER[name].items()]
            node.keywords = kept + changed
        for inner in ast.iter_child_nodes(node):
            finish(inner)

    finish(tree)
    endless = parse_schedule(ast.unparse(tree), steps, rate=rate, where="objective.curve")
    return float(sampled(endless, steps).max())


def _curve_warnings(
    text: str, values: np.ndarray, summary: ScheduleSummary, epochs: int, rate: Schedule
) -> Iterator[str]:
    """Features of a curve that are mistakes more often than not."""
    if summary.direction == "constant":
        return
    top = values.max()
    early = round(EARLY * (len(values) - 1))
    if summary.direction == "rises" and values[early] > SATURATED * top:
        yield f"curve: {values[early] / top:.0%} of its largest value is reached before {EARLY:.0%} of training"
    asymptote = _asymptote(text, len(values), rate)
    if top < HALF * asymptote:
        yield f"curve: never passes half of its asymptote of {asymptote:.3g}; its largest value is {top:.3g}"
    for call in ast.walk(ast.parse(str(text), mode="eval")):
        if not isinstance(call, ast.Call):
            continue
        for keyword in call.keywords:
            given = ast.literal_eval(keyword.value) if keyword.arg == "rate" else 1.0
            if 0 < abs(given) < 1:
                yield (
                    f"curve: rate = {given:g} is counted in whole trainings; if it was meant per epoch, "
                    f"write rate={given * epochs:g} for {epochs} epochs"
                )


# --- for people -------------------------------------------------------------------------------------------------------

BARS = " ▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 60, 8


def as_text(shown: Preview) -> str:
    """The pictures and the table of a preview; schedules that differ by a factor share one, which shows percentages."""
    lines = []
    for names, values in _shapes(shown):
        largest = {f"{shown.values[name].max():.3g}" for name in names}
        progress = " (by progress, drawn as if that went with the clock)" if names[0] in shown.by_progress else ""
        lines += [", ".join(names) + progress, *_picture(values, of_largest=len(largest) > 1), ""]
    rows: list[tuple[str, ...]] = [
        ("", *(f"{quarter:.0%}" for quarter in QUARTERS), "mean", "by rate", "direction", "steepest")
    ]
    for name, summary in shown.summaries.items():
        numbers = [f"{value:.3g}" for value in (*summary.at_quarters, summary.area, summary.weighted_area)]
        steepest = "" if summary.steepest is None else _place(summary.steepest, shown, name in shown.by_progress)
        rows.append((name, *numbers, summary.direction, steepest))
    lines += report.text_table(rows)
    sample = f"{PREVIEWED:,} points" if shown.steps is None else f"{shown.steps:,} steps"
    lines += ["", f"mean: over {sample} of {shown.epochs} epochs; by rate: weighted by the learning rate"]
    return "\n".join([*lines, *(f"warning: {text}" for text in shown.warnings)])


def _place(part: float, shown: Preview, by_progress: bool) -> str:
    if by_progress:
        return f"at {part:.1%} of the progress"
    step = "" if shown.steps is None else f", step {math.ceil(part * shown.steps - 1e-6):,}"  # the first one past it
    return f"at {part:.1%}, epoch {part * shown.epochs:.1f}{step}"


def _shapes(shown: Preview) -> list[tuple[list[str], np.ndarray]]:
    """What is worth a picture: the names of schedules of one shape, and the values of the first of them."""
    found: list[tuple[list[str], np.ndarray]] = []
    for name, values in shown.values.items():
        if shown.summaries[name].direction == "constant":
            continue
        scaled = values / np.abs(values).max()
        for names, other in found:
            alike = np.allclose(scaled, other / np.abs(other).max(), atol=1e-5)
            if alike and (name in shown.by_progress) == (names[0] in shown.by_progress):
                names.append(name)
                break
        else:
            found.append(([name], values))
    return found


def _picture(values: np.ndarray, *, of_largest: bool) -> list[str]:
    """Columns of an eighth of a line, from 0 (or the least value) to the largest, or to 100 % of it."""
    columns = values[np.linspace(0, len(values) - 1, WIDTH).round().astype(int)]
    low, high = min(0.0, float(columns.min())), max(float(columns.max()), 1e-30)
    eighths = np.rint((columns - low) / (high - low) * HEIGHT * 8).astype(int)
    top, bottom = ("100 %", f"{100 * low / high:.3g} %") if of_largest else (f"{high:.3g}", f"{low:.3g}")
    rows = []
    for row in reversed(range(HEIGHT)):
        label = top if row == HEIGHT - 1 else bottom if row == 0 else ""
        rows.append(f"{label:>8} ┤" + "".join(BARS[min(max(count - 8 * row, 0), 8)] for count in eighths).rstrip())
    return rows


def plot(shown: Preview, path: Path) -> None:
    """Draw all schedules over training into a PNG."""
    figure = report.new_figure(7.0, 4.0)
    axes = figure.subplots()
    for name, values in shown.values.items():
        axes.plot(np.linspace(0, 100, len(values)), values, label=name, linestyle="--" if name == "curve" else "-")
    axes.set_ylabel("value")
    report.label_axes(axes, "schedules", "% of training", legend=8)
    report.save(figure, path)
