"""A run, a comparison or a search as one HTML page, with its config and provenance, that opens without a network."""

import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import report
from .training.errors import RunError
from .training.files import read_json, replace_text
from .training.workdir import COMPARISON, CONFIG, RESULT, SEARCH
from .training.writer import METRICS, read_metrics

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #8884; vertical-align: top; }
figure { margin: 0; background: #fff; border-radius: 6px; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; display: block; }
pre { overflow-x: auto; padding: .8rem; background: #8881; border-radius: 6px; font-size: 13px; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def write(workdir: Path, out: Path) -> None:
    """Write the page for a workdir.

    Args:
      workdir: that of a run, a comparison or a search, finished or not.
      out: the file.

    Raises:
      RunError: the workdir holds none of these; or the page cannot be written.
    """
    lines = read_metrics(workdir / METRICS)
    if (workdir / COMPARISON).exists():
        body = _comparison(read_json(workdir / COMPARISON), lines)
    elif (workdir / SEARCH).exists():
        body = _search(read_json(workdir / SEARCH), lines)
    elif (workdir / CONFIG).exists():
        config = read_json(workdir / CONFIG)
        result = read_json(workdir / RESULT) if (workdir / RESULT).exists() else None
        body = _going(config, lines) if "arms" in config else _run(result, config, lines)
    else:
        raise RunError(f"{workdir} holds no run and no comparison: give the --workdir of one")
    if not (workdir / METRICS).exists():
        body = [f"<p>There is no {METRICS} in the workdir: what it would show is left out.</p>", *body]
    title = html.escape(workdir.absolute().name)
    replace_text(
        out,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n" + "\n".join(body) + "\n</body></html>\n",
        "give another --out",
    )


def _run(
    result: Mapping[str, Any] | None, config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> Iterable[str]:
    if result is None:
        steps = max((line["step"] for line in lines), default=0)
        yield f"<p>Not finished: {steps:,} steps so far.</p>"
    else:
        yield _table([("", ""), *_plain_rows(result, without=("config", "versions", "timing"))])
    if lines:
        yield from _figure("Weights, terms, accuracy", report.curves(lines))
        yield from _telemetry({"": lines})
    yield from _provenance(result or {}, config)


def _comparison(results: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    comparison = results["comparison"]
    yield f"<p>{html.escape(report.summary_of(results))}</p>"
    yield from _figure("", report.comparison_figure(results))
    for selection, caption in report.CAPTIONS.items():
        if comparison[selection]:
            yield f"<h2>{caption}</h2>" + _table(report.comparison_rows(comparison, selection))
    yield "<h2>Arms</h2>" + _table(report.schedule_table(report.schedules_of(results)))
    yield _table([("arm", ""), *((name, arm["about"]) for name, arm in results["arms"].items())])
    if failed := report.failures(results):
        yield f"<p>{html.escape(failed)}</p>"
    if results.get("pulls"):  # not in those of older versions
        yield f"<h2>{report.PULLS}</h2>" + _table(report.pull_table(results["pulls"]))
    yield from _telemetry(_by_arm(lines))
    yield from _provenance(results, results["config"])


def _search(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield f"<p>{result['trials']} {html.escape(result['search'])} trials of every arm, by validation accuracy.</p>"
    yield _table(report.best_trials(result))
    yield from _progress(lines)
    yield from _provenance(result, result["config"])


def _going(config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """A comparison or a search that has not ended."""
    steps = max((line["step"] for line in lines), default=0)
    yield f"<p>Not finished: {steps:,} steps of {len(config['arms'])} arms so far.</p>"
    yield from _progress(lines)
    yield from _provenance({}, config)


def _progress(lines: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Validation accuracy and telemetry of every arm, if metrics were logged."""
    if lines:
        by_arm = _by_arm(lines)
        yield from _figure("Validation accuracy", report.validation_figure(by_arm))
        yield from _telemetry(by_arm)


def _by_arm(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["arm"], []).append(line)
    return found


def _telemetry(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[str]:
    """What was measured for each term: pull on the student, and how its transport converged."""
    for title, names in (
        ("Gradient norm of each raw term, and its cosine with the first term's", ("gradient_norm", "gradient_cosine")),
        ("Sinkhorn iterations and marginal error", ("iterations", "marginal_error")),
    ):
        found = {
            (arm, key.rpartition("/")[0], key.rpartition("/")[2])
            for arm, lines in by_arm.items()
            for line in lines
            for key in line
            if "/" in key and key.rpartition("/")[2] in names
        }
        if found:
            yield from _figure(title, _telemetry_figure(by_arm, sorted(found), names))


def _telemetry_figure(
    by_arm: Mapping[str, Sequence[Mapping[str, Any]]], found: Sequence[tuple[str, str, str]], names: tuple[str, ...]
) -> Any:
    """For a run, all terms in one row of panels; for a comparison, a row for each term, whose lines are the arms."""
    rows = [""] if "" in by_arm else sorted({term for _, term, _ in found})
    figure = report.new_figure(12.0, 3.6 * len(rows))
    grid = figure.subplots(len(rows), len(names), squeeze=False)
    arms = list(by_arm)
    for arm, term, name in found:
        style = report.arm_style(arms.index(arm)) if arm else {}
        axes = grid[rows.index(term) if arm else 0][names.index(name)]
        axes.plot(*report.over_seeds(by_arm[arm], f"{term}/{name}"), label=arm or term, linewidth=1, **style)
    for term, panels in zip(rows, grid, strict=True):
        for name, axes in zip(names, panels, strict=True):
            if name in ("gradient_norm", "marginal_error"):
                axes.set_yscale("log")
            if name == "gradient_cosine":
                axes.set_ylim(-1.05, 1.05)
            report.label_axes(axes, " ".join((term, name.replace("_", " "))).strip(), "step", legend=7)
    return figure


def _provenance(result: Mapping[str, Any], config: Mapping[str, Any]) -> Iterable[str]:
    rows = [("", ""), *_plain_rows(result.get("timing", {})), *_plain_rows(result.get("versions", {}))]
    rows += [(key, str(result[key])) for key in ("device", "commit", "data_sha256") if key in result]
    yield "<h2>Provenance</h2>" + _table(rows)
    text = html.escape(json.dumps(config, indent=2))
    yield f"<details><summary>Config</summary><pre>{text}</pre></details>"


def _plain_rows(values: Mapping[str, Any], without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Names and values; None and empty ones are left out, shares are in percent as everywhere."""

    def text(key: str, value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.2%}" if {"accuracy", "agreement"} & set(key.split("_")) else f"{value:,.5g}"

    return [
        (key.replace("_", " "), text(key, value))
        for key, value in values.items()
        if key not in without and value not in (None, {}, [])
    ]


def _figure(caption: str, figure: Any) -> Iterable[str]:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    if caption:
        yield f"<h2>{html.escape(caption)}</h2>"
    yield f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f"<table>{f'<thead><tr>{cells}</tr></thead>' if any(head) else ''}<tbody>{''.join(lines)}</tbody></table>"
