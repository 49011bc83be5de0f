"""What a finished run shows a person: the result card and curves.png."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
    rows = [
        ("data", f"{result['dataset']}, seed {result['seed']}, {result['steps']:,} steps"),
        ("teacher", f"{teacher:<22} test accuracy {result['teacher_test_accuracy']:.2%}" if teacher else ""),
        ("student", f"{result['student']:<22} test accuracy {result['test_accuracy_last']:.2%} (last step)"),
        ("", f"{'':<22} {'':<13} {best:.2%} (best by validation)" if best is not None else ""),
        (
            "seconds",
            f"student {timing['train_seconds']:.0f} ({timing['images_per_second']:,.0f} images/s), "
            f"teacher {timing['teacher_seconds']:.0f}",
        ),
        ("files", f"{workdir}/ result.json, metrics.jsonl, curves.png, checkpoints/, network/, teacher/"),
    ]
    lines = [f"{name:<8}  {text}".rstrip() for name, text in rows if text]
    width = max(map(len, lines))
    rule = "─" * (width + 2)
    return "\n".join([f"┌{rule}┐", *(f"│ {line:<{width}} │" for line in lines), f"└{rule}┘"])


def plot_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw schedules, weighted terms and accuracies over steps.

    Args:
      lines: the lines of metrics.jsonl.
      path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
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
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    temporary = path.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
