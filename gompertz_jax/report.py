"""What a finished run or comparison shows a person: cards, tables and pictures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .statistics import holm, paired_difference, summary

SELECTIONS = {"last": "test_accuracy_last", "best": "test_accuracy_best"}  # of weights, and the key of their accuracy


def result_card(result: Mapping[str, Any], workdir: Path) -> str:
    """The card that ends a run, from its result.json.

    Args:
      result: the content of result.json.
      workdir: where the files are.

    Returns:
      A few lines of text.
    """
    timing = result["timing"]
    best, teacher = result["test_accuracy_best"], result["teacher"]
    own_teacher = ", teacher/" if (workdir / "teacher").is_dir() else ""
    rows = [
        ("data", f"{result['dataset']}, seed {result['seed']}, {result['steps']:,} steps"),
        ("teacher", f"{teacher:<22} test accuracy {result['teacher_test_accuracy']:.2%}" if teacher else ""),
        ("student", f"{result['student']:<22} test accuracy {result['test_accuracy_last']:.2%} (last step)"),
        ("", f"{'':<22} {'':<13} {best:.2%} (best by validation)" if best is not None else ""),
        (
            "time",
            f"student {timing['train_seconds']:.0f} s, teacher {timing['teacher_seconds']:.0f} s, both with compiling; "
            f"{timing['images_per_second']:,.0f} images/s while training",
        ),
        ("files", f"{workdir}/ result.json, metrics.jsonl, curves.png, checkpoints/, network/{own_teacher}"),
        ("next", f"gompertz-jax report {workdir}"),
    ]
    lines = [f"{name:<8}  {text}".rstrip() for name, text in rows if text]
    width = max(map(len, lines))
    rule = "─" * (width + 2)
    return "\n".join([f"┌{rule}┐", *(f"│ {line:<{width}} │" for line in lines), f"└{rule}┘"])


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label_axes(axes: Any, title: str, xlabel: str, *, legend: int) -> None:
    """What every panel has: a title, a grid, and a legend of this font size if anything is labelled."""
    axes.set(title=title, xlabel=xlabel)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=legend)


def arm_style(number: int) -> dict[str, str]:
    """Colour and dashes of the arm of this number, different for up to forty arms."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def save(figure: Any, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    temporary = path.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


def curves(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Schedules, weighted terms and accuracies over steps, from the lines of a run's metrics.jsonl, as a figure."""
    figure = new_figure(12.0, 3.6)
    weights, terms, accuracy = figure.subplots(1, 3)
    train = [line for line in lines if line["split"] == "train"]
    steps = [line["step"] for line in train]
    names = [key.removesuffix("/weight") for key in (train[0] if train else {}) if key.endswith("/weight")]
    for name in names:
        weights.plot(steps, [line.get(f"{name}/weight") for line in train], label=name)
        terms.plot(steps, [line.get(f"{name}/weighted") for line in train], label=name, linewidth=0.8)
    accuracy.plot(steps, [line.get("accuracy") for line in train], label="training batch", linewidth=0.6, alpha=0.6)
    for key, label in (("accuracy", "validation"), ("agreement", "agreement with teacher")):
        held_out = [line for line in lines if line["split"] == "validation" and line.get(key) is not None]
        if held_out:
            accuracy.plot([line["step"] for line in held_out], [line[key] for line in held_out], label=label)
    terms.set_yscale("symlog", linthresh=1e-2)
    for axes, title in ((weights, "weight of each term"), (terms, "weighted terms"), (accuracy, "accuracy")):
        label_axes(axes, title, "step", legend=8)
    return figure


# --- comparisons ------------------------------------------------------------------------------------------------------


def compared(results: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """Every arm's mean and deviation, and its paired difference to the baseline, from a comparison's results.json.

    The p-values of one selection are corrected together (Holm), all arms but the baseline being one family.

    Args:
      results: its `arms` are read.
      baseline: the name of an arm.

    Returns:
      `{"baseline": name, "last": {arm: {...}}, "best": {arm: {...}}}`, accuracies as fractions; "best" is empty where
      nothing was held out.
    """
    found: dict[str, Any] = {"baseline": baseline}
    for selection, key in SELECTIONS.items():
        values = {name: [student.get(key) for student in arm["students"]] for name, arm in results["arms"].items()}
        if all(value is None for column in values.values() for value in column):
            found[selection] = {}
            continue
        differences = {
            name: paired_difference(column, values[baseline]) for name, column in values.items() if name != baseline
        }
        corrected = dict(zip(differences, holm([difference.p for difference in differences.values()]), strict=True))
        found[selection] = {
            name: {
                **summary([value for value in column if value is not None])._asdict(),
                **(
                    {"difference": differences[name]._asdict() | {"p_holm": corrected[name]}}
                    if name in differences
                    else {}
                ),
            }
            for name, column in values.items()
        }
    return found


def pulls(terms_of: Mapping[str, Sequence[str]], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How hard each term pulled on the students of each arm where it was measured, as means over the seeds.

    A pull is the norm of a raw term's gradient times its weight, divided by the same for the arm's first term.

    Args:
      terms_of: arm -> the names of its terms, in order.
      lines: the lines of a comparison's metrics.jsonl.

    Returns:
      `{arm: {term: {"step": [...], "norm": [...], "pull": [...], "cosine": [...]}}}`, the cosine with the first term's
      gradient; empty where nothing was measured. Values that are not finite in a student are left out, and so are those
      measured where the first term did not pull at all.
    """

    def pull(line: Mapping[str, Any], name: str) -> float | None:
        weight, norm = line.get(f"{name}/weight"), line.get(f"{name}/gradient_norm")
        return None if weight is None or norm is None else weight * norm

    found: dict[tuple[str, str], dict[int, list[tuple[float, float, float]]]] = {}
    for line in lines:
        if line["split"] != "train":
            continue
        arm = line["arm"]
        first = pull(line, terms_of[arm][0])
        for name in terms_of[arm]:
            own, cosine = pull(line, name), line.get(f"{name}/gradient_cosine")
            if first and own is not None and cosine is not None:
                at = found.setdefault((arm, name), {}).setdefault(line["step"], [])
                at.append((line[f"{name}/gradient_norm"], own / first, cosine))

    def averaged(at: Mapping[int, Any]) -> dict[str, Any]:
        columns = np.array([np.mean(at[step], axis=0) for step in sorted(at)]).T.tolist()
        return {"step": sorted(at), **dict(zip(("norm", "pull", "cosine"), columns, strict=True))}

    measured = {
        arm: {name: averaged(found[arm, name]) for name in names if (arm, name) in found}
        for arm, names in terms_of.items()
    }
    return {arm: terms for arm, terms in measured.items() if terms}


def pull_table(measured: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What `pulls` found for every term but the first, as ranges over the steps."""

    def span(values: Sequence[float], digits: str) -> str:
        low, high = f"{min(values):{digits}}", f"{max(values):{digits}}"
        return low if low == high else f"{low} to {high}"

    columns = {"norm": ".2g", "pull": ".2g", "cosine": ".2f"}
    rows: list[tuple[str, ...]] = [("arm", "term", "gradient norm", "pull", "cosine")]
    for arm, terms in measured.items():
        for term, numbers in list(terms.items())[1:]:
            rows.append((arm, term, *(span(numbers[key], digits) for key, digits in columns.items())))
            arm = ""
    return rows


def _percent(value: float | None, *, sign: bool = False) -> str:
    return "" if value is None else f"{100 * value:{'+' if sign else ''}.2f}"


def _probability(p: float | None) -> str:
    """A p-value as tables print it: no test is ever certain."""
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def comparison_rows(comparison: Mapping[str, Any], selection: str) -> list[tuple[str, ...]]:
    """The table of one selection, "last" or "best", with its head: accuracies and differences in percent."""
    rows: list[tuple[str, ...]] = [("arm", "n", "accuracy, %", "difference, points", "95 % interval", "p", "p (Holm)")]
    for name, numbers in comparison[selection].items():
        spread = "" if numbers["sd"] is None else f" ± {_percent(numbers['sd'])}"
        cells = (name, str(numbers["n"]), _percent(numbers["mean"]) + spread)
        difference = numbers.get("difference")
        if difference is None:
            rows.append((*cells, "baseline", "", "", ""))
            continue
        low, high = (_percent(difference[end], sign=True) for end in ("low", "high"))
        ps = (_probability(difference[key]) for key in ("p", "p_holm"))
        rows.append((*cells, _percent(difference["mean"], sign=True), f"{low} to {high}" if low else "", *ps))
    return rows


def best_trials(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of a search: every arm's three best trials, from its tune.json."""
    rows: list[tuple[str, ...]] = [("arm", "trial", "validation, %", "parameters")]
    for name, ranked in result["tuned"].items():
        for trial in ranked[:3]:
            accuracy = trial["validation_accuracy"]
            percent = "not finite" if accuracy is None else _percent(accuracy)
            values = ", ".join(f"{key} {value:g}" for key, value in trial["values"].items())
            rows.append((name, str(trial["trial"]), percent, values))
    return rows


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a terminal."""
    widths = _widths(rows)
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first row is its head, readable as they are."""
    widths = _widths(rows)
    head, *body = (f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
    return [head, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *body]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


CAPTIONS = {
    "last": "Test accuracy after the last step",
    "best": "Test accuracy of the weights that validation chose",
}

PULLS = "How hard each term pulls, beside the first"


def summary_of(results: Mapping[str, Any]) -> str:
    """What was compared, and how its numbers are to be read."""
    seeds, teacher = results["seeds"], results["teacher"]
    teacher_text = (
        f"; the teacher has {_percent(results['teacher_test_accuracy'])} % of the test images" if teacher else ""
    )
    return (
        f"{len(results['arms'])} arms, seeds {seeds[0]} to {seeds[-1]}, {results['steps']:,} steps each{teacher_text}. "
        "Mean ± standard deviation over seeds; differences are paired by seed, to "
        f"{results['comparison']['baseline']}, with a t-interval; p of the paired t-test, as it is and corrected for "
        f"the number of arms. All students see the same batches (order seed {results['order_seed']}): the deviation is "
        "that of initial weights, not of data order."
    )


def as_markdown(results: Mapping[str, Any]) -> str:
    """results.md: the tables of a comparison, and what made them."""
    comparison = results["comparison"]
    lines = [f"# {results['teacher'] or 'no teacher'} -> {results['student']} on {results['dataset']}"]
    lines += ["", summary_of(results)]
    for selection, caption in CAPTIONS.items():
        if comparison[selection]:
            lines += ["", f"## {caption}", "", *markdown_table(comparison_rows(comparison, selection))]
    lines += ["", "## Arms", "", *markdown_table(schedule_table(schedules_of(results)))]
    lines += ["", *(f"- `{name}`: {arm['about']}" for name, arm in results["arms"].items())]
    if results.get("pulls"):  # not in those of older versions
        lines += ["", f"## {PULLS}", "", *markdown_table(pull_table(results["pulls"]))]
    if failed := failures(results):
        lines += ["", failed]
    timing = results["timing"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += [
        "",
        f"{timing['train_seconds']:,.0f} s of training, {timing['teacher_seconds']:,.0f} s of the teacher's, both with "
        f"compiling; {timing['images_per_second']:,.0f} images/s of all students while training; on "
        f"{results['device']}. {versions}; "
        f"commit {results['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def failures(results: Mapping[str, Any]) -> str:
    """Which students are left out because they did not stay finite; "" if none."""
    failed = [
        f"{name}, seed {student['seed']}, at step {student['failed_at_step']:,}"
        for name, arm in results["arms"].items()
        for student in arm["students"]
        if student["failed_at_step"] is not None
    ]
    return f"Not finite, and left out: {'; '.join(failed)}." if failed else ""


def schedules_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """For each arm, its terms' weights in numbers."""
    return {name: arm["schedules"] for name, arm in results["arms"].items()}


def schedule_table(schedules: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """How arms differ: each term's weight at the start, midway and at the end, its mean, also by learning rate."""
    keys = ("start", "middle", "end", "area", "weighted_area")
    rows: list[tuple[str, ...]] = [("arm", "term", "start", "midway", "end", "mean", "by learning rate")]
    for name, terms in schedules.items():
        for term, numbers in terms.items():
            label = f"{term} (by progress)" if numbers["by_progress"] else term
            rows.append((name, label, *(f"{numbers[key]:.3g}" for key in keys)))
            name = ""
    return rows


def _most_common_term(results: Mapping[str, Any]) -> str:
    """The distillation term of most arms, whose weight is worth a picture; ties go to the last by name."""
    counts: dict[str, int] = {}
    for arm in results["arms"].values():
        for term in list(arm["schedules"])[1:]:
            counts[term] = counts.get(term, 0) + 1
    return max(counts, key=lambda term: (counts[term], term), default="")


def over_seeds(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps at which the lines have a value, and its means over the lines of each."""
    at = _by_step((line["step"], line[key]) for line in lines if line.get(key) is not None)
    steps = sorted(at)
    return steps, [float(np.mean(at[step])) for step in steps]


def _by_step(points: Iterable[Sequence[Any]]) -> dict[int, list[float]]:
    """The values of pairs of a step and a value, by step."""
    at: dict[int, list[float]] = {}
    for step, value in points:
        at.setdefault(step, []).append(value)
    return at


def validation_figure(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Validation accuracy over steps of every arm, the mean over its students, from the lines of metrics.jsonl."""
    figure = new_figure(12.0, 4.6)
    axes = figure.subplots()
    for number, (arm, lines) in enumerate(by_arm.items()):
        held_out = [line for line in lines if line["split"] == "validation"]
        axes.plot(*over_seeds(held_out, "accuracy"), label=arm, linewidth=1.2, **arm_style(number))
    label_axes(axes, "validation accuracy, mean over seeds", "step", legend=7)
    return figure


def comparison_figure(results: Mapping[str, Any]) -> Any:
    """Validation accuracy over steps with bands of a deviation, the schedules, and every student's accuracy."""
    arms, comparison = results["arms"], results["comparison"]
    figure = new_figure(15.0, 4.6)
    over_steps, weights, points = figure.subplots(1, 3)
    shown = _most_common_term(results)
    for number, (name, arm) in enumerate(arms.items()):
        style = arm_style(number)
        whole = [student["validation"] for student in arm["students"] if student["failed_at_step"] is None]
        at = _by_step(point for curve in whole for point in curve)
        if at:
            steps = sorted(at)  # at some of which lines may be lost, so that not every student has a value
            found = [summary(at[step]) for step in steps]
            mean, spread = (np.array([getattr(one, name) or 0.0 for one in found]) for name in ("mean", "sd"))
            over_steps.plot(steps, mean, label=name, linewidth=1.2, **style)
            over_steps.fill_between(steps, mean - spread, mean + spread, color=style["color"], alpha=0.12, linewidth=0)
        if (numbers := arm["schedules"].get(shown)) is not None:
            weights.plot(np.linspace(0, 1, len(numbers["curve"])), numbers["curve"], label=name, **style)
        finals = [student.get("test_accuracy_last") for student in arm["students"]]
        finals = [value for value in finals if value is not None]
        points.plot(finals, [number] * len(finals), "o", color=style["color"], alpha=0.6, markersize=4)
        if finals:
            points.plot([np.mean(finals)], [number], "|", color="black", markersize=16)
    points.set_yticks(range(len(arms)), list(arms))
    points.invert_yaxis()
    for axes, title, label in (
        (over_steps, "validation accuracy, mean and deviation", "step"),
        (weights, f"weight of the term {shown!r}", "fraction of training"),
        (points, "test accuracy after the last step, every seed", "accuracy"),
    ):
        label_axes(axes, title, label, legend=7)
    figure.suptitle(
        f"{results['teacher']} -> {results['student']}, {results['dataset']}; baseline {comparison['baseline']}"
    )
    return figure
