"""The same number of trials for every arm, over its own curve's and terms' parameters, all in one program.

Trials are arms of a comparison, so they train at once and see the same batches. Validation chooses; the test images are
not read. The winner is written as a config, which a comparison takes as an arm: on fresh seeds, since the winner of
many trials is partly the luckiest.
"""

import ast
import os
import pprint
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import report
from .arms import SCORES
from .cohort import Cohort, train_all
from .training.check_config import PREVIEWED
from .training.config import Config, get_default
from .training.errors import RunError
from .training.files import replace_text, write_json
from .training.objectives import LOSSES, build_objective
from .training.sharding import on_main, say
from .training.stop import Stop
from .training.workdir import SEARCH, finished_result, frozen, provenance, sole_use

LONGEST_NAME = 200  # of an arm, in bytes: file systems take 255, of which the endings of best/NAME.py need some


class Range(NamedTuple):
    """The range from which a parameter is drawn, by its logarithm unless `linear`."""

    low: float
    high: float
    linear: bool = False

    def at(self, share: float) -> float:
        """The value at this share of the way, to four digits."""
        if self.linear:
            return float(f"{self.low + share * (self.high - self.low):.4g}")
        return float(f"{self.low * (self.high / self.low) ** share:.4g}")


# What is drawn for a curve anywhere in an arm's curve, except under `matched`, where only its mean counts.
CURVES: Mapping[str, Mapping[str, Range]] = {
    "gompertz": {"displacement": Range(2.0, 20.0), "rate": Range(3.0, 20.0)},
    "gompertz_through": {"inflection": Range(0.05, 0.8, linear=True)},
    "logistic": {"midpoint": Range(0.1, 0.9, linear=True), "rate": Range(4.0, 30.0)},
    "linear": {"until": Range(0.1, 1.0, linear=True)},
    "cosine": {"since": Range(0.0, 0.8, linear=True)},
}
# What is drawn for every term that distils: a factor on its weight, and these options, if it has them.
FACTOR = Range(0.25, 4.0)
OPTIONS: Mapping[str, Range] = {"temperature": Range(1.0, 10.0), "epsilon": Range(0.01, 0.3)}


class Knob(NamedTuple):
    """One parameter of an arm, and how a config is changed to a value of it."""

    name: str
    range: Range
    set: Callable[[Config, float], None]


def knobs(config: Config) -> list[Knob]:
    """The parameters that can be drawn for an arm."""
    learned = {term.name for term in build_objective(config, PREVIEWED).terms}  # without those of weight 0
    terms = {name: spec for name, spec in config.objective.terms.items() if name in learned}
    distilling = {name: spec for name, spec in terms.items() if spec.loss != "cross_entropy"}
    found = []
    if any("curve" in str(spec.get("weight", LOSSES[spec.loss].weight)) for spec in distilling.values()):
        found += [
            Knob(f"{curve}.{key}", bounds, _set_curve(curve, key))
            for curve in _curves_of(config.objective.curve)
            for key, bounds in CURVES[curve].items()
        ]
    labels = [spec for name, spec in terms.items() if name not in distilling]
    # Where the cross-entropy gives up what the scores gain, as under `budget`, a factor would break the fixed sum.
    tied = any("curve" in str(spec.get("weight", "")) for spec in labels)
    for name, spec in distilling.items():
        if not (tied and spec.loss in SCORES):
            found.append(Knob(f"{name}.weight", FACTOR, _scale(name)))
        found += [Knob(f"{name}.{key}", OPTIONS[key], _set_option(name, key)) for key in OPTIONS if key in spec]
    return found


def _curves_of(text: str) -> list[str]:
    """The curves in a text, each once, that are not under a `matched`."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id.startswith("matched"):
                return
            if node.func.id in CURVES and node.func.id not in found:
                found.append(node.func.id)
        for inner in ast.iter_child_nodes(node):
            visit(inner)

    visit(ast.parse(str(text), mode="eval"))
    return found


def _set_curve(curve: str, key: str) -> Callable[[Config, float], None]:
    def change(config: Config, value: float) -> None:
        tree = ast.parse(str(config.objective.curve), mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == curve:
                others = [keyword for keyword in node.keywords if keyword.arg != key]
                node.keywords = [*others, ast.keyword(arg=key, value=ast.Constant(value))]
        config.objective.curve = ast.unparse(tree)

    return change


def _scale(name: str) -> Callable[[Config, float], None]:
    def change(config: Config, value: float) -> None:
        spec = config.objective.terms[name]
        with config.unlocked(), config.ignore_type():  # which may be a number
            spec.weight = f"{value:g} * ({spec.get('weight', LOSSES[spec.loss].weight)})"

    return change


def _set_option(name: str, key: str) -> Callable[[Config, float], None]:
    def change(config: Config, value: float) -> None:
        with config.ignore_type():  # which may be a number
            config.objective.terms[name][key] = f"{value:g}"

    return change


def shares(search: str, trials: int, dimensions: int, seed: int) -> np.ndarray:
    """Where in the unit cube the trials lie, `[trials, dimensions]`: "random", or "sobol", scrambled (Owen, 1998)."""
    if search == "random":
        return np.random.default_rng(seed).random((trials, dimensions))
    from scipy.stats import qmc

    # A power of two keeps Sobol's balance; surplus points are dropped.
    points = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng(seed))
    return points.random_base2(max(0, (trials - 1).bit_length()))[:trials]


def tune(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    arms: Mapping[str, Config],
    trials: int = 16,
    seeds: int = 1,
    search: str = "sobol",
    layout: str = "devices",
) -> dict[str, Any]:
    """Give every arm the same number of trials, and write each one's best as a config.

    Args:
      config: what is common to all: see `compare`. It must hold out validation images.
      workdir: where everything is kept; an existing search is continued.
      arms: name -> config, as in `compare`.
      trials: how many for every arm.
      seeds: how many for every trial, whose accuracy is their mean.
      search: "sobol" or "random"; drawn by the config's `seed`.
      layout: see `compare`.

    Returns:
      The content of tune.json.

    Raises:
      RunError: as `compare`; no validation images; an arm without parameters to draw, or whose name is none for a file.
    """
    workdir = Path(workdir).expanduser()
    if trials < 1:
        raise RunError(f"--trials={trials}: must be at least 1")
    if search not in ("sobol", "random"):
        raise RunError(f"--search={search}: must be sobol or random")
    if config.data.validation < 1:
        raise RunError("data.validation = 0: trials are chosen by validation images, and none are held out")
    if not arms:
        raise RunError("--arms: there is nothing to tune; name an arm that distils")
    for name in arms:
        if not name or Path(name).name != name or len(os.fsencode(name)) > LONGEST_NAME:
            raise RunError(f"--arms: {name!r} is no name for a file, and the arm's best is written to best/NAME.py")
    drawn: dict[str, list[dict[str, float]]] = {}
    tried: dict[str, Config] = {}
    for number, (name, of_arm) in enumerate(arms.items()):
        arm_knobs = knobs(of_arm)
        if not arm_knobs:
            raise RunError(f"the arm {name!r} has no parameters to tune; leave it out, its result is what it is")
        points = shares(search, trials, len(arm_knobs), config.seed + number)
        drawn[name] = []
        for trial, point in enumerate(points):
            changed = of_arm.copy_and_resolve_references()
            values = {knob.name: knob.range.at(float(share)) for knob, share in zip(arm_knobs, point, strict=True)}
            for knob in arm_knobs:
                knob.set(changed, values[knob.name])
            drawn[name].append(values)
            tried[f"{name}-{trial}"] = changed
    with Stop() as stop:
        origin = provenance()
        cohort = Cohort.of(config, tried, seeds, layout)
        result = on_main(lambda: finished_result(workdir, SEARCH, cohort.content))
        if result is not None:
            say(f"{workdir} holds a finished search; another --workdir starts a new one.")
        else:
            with sole_use(workdir):
                trained = train_all(cohort, workdir, stop).results(workdir)
                result = {"search": search, "trials": trials, **trained, **origin}
                result["tuned"] = {name: _ranked(name, values, trained) for name, values in drawn.items()}
                on_main(lambda: _write(workdir, result, tried))
        say(as_markdown(result))
        say(f"files     {workdir}/ {SEARCH}, tune.md, best/, metrics.jsonl, checkpoints/, teacher/")
        say(f"next      gompertz-jax report {workdir}")
        return result


def _ranked(name: str, drawn: list[dict[str, float]], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An arm's trials, the best first; those with a failed student come last."""
    trials = []
    for index, values in enumerate(drawn):
        students = results["arms"][f"{name}-{index}"]["students"]
        whole = all(student["failed_at_step"] is None for student in students)
        accuracy = float(np.mean([student["best_validation_accuracy"] for student in students])) if whole else None
        trials.append({"trial": index, "values": values, "validation_accuracy": accuracy})
    return sorted(
        trials,
        key=lambda trial: -1.0 if trial["validation_accuracy"] is None else trial["validation_accuracy"],
        reverse=True,
    )


def _write(workdir: Path, result: dict[str, Any], tried: Mapping[str, Config]) -> None:
    (workdir / "best").mkdir(exist_ok=True)
    for name, ranked in result["tuned"].items():
        if ranked[0]["validation_accuracy"] is None:
            say(f"no trial of the arm {name!r} stayed finite, so it has no best; see {SEARCH} for what was drawn")
            continue
        source = config_source(name, ranked, tried[f"{name}-{ranked[0]['trial']}"])
        replace_text(workdir / "best" / f"{name}.py", source)
    replace_text(workdir / "tune.md", as_markdown(result))
    write_json(workdir / SEARCH, result)


def config_source(name: str, ranked: list[dict[str, Any]], config: Config) -> str:
    """An arm's best trial as a config file."""
    best = ranked[0]
    content, usual = frozen(config), frozen(get_default())
    changes = dict(_differences(content, usual))
    values = ", ".join(f"{key} {value:g}" for key, value in best["values"].items())
    return f'''"""The arm {name!r}: the best of {len(ranked)} trials by validation ({best["validation_accuracy"]:.2%}).

{values}
"""

import ml_collections

from gompertz_jax.training.config import get_default

CHANGES = {pprint.pformat(changes, width=110, sort_dicts=False)}
TERMS = {pprint.pformat(content["objective"]["terms"], width=110, sort_dicts=False)}
PROJECTIONS = {pprint.pformat(content["objective"]["projections"], width=110, sort_dicts=False)}


def get_config():
    config = get_default()
    config.update_from_flattened_dict(CHANGES)
    config.objective.terms = ml_collections.ConfigDict(TERMS)
    config.objective.projections = ml_collections.ConfigDict(PROJECTIONS)
    return config
'''


def _differences(content: Mapping[str, Any], usual: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        place = f"{prefix}{key}"
        if place in ("objective.terms", "objective.projections"):
            continue
        if isinstance(value, dict) and place not in ("student.options", "teacher.options"):
            yield from _differences(value, usual[key], f"{place}.")
        elif value != usual[key]:
            yield place, tuple(value) if isinstance(value, list) else value


def as_markdown(result: Mapping[str, Any]) -> str:
    """tune.md: every arm's three best trials, and where the configs are."""
    lines = [
        f"{result['trials']} {result['search']} trials of every arm, seeds {result['seeds']}, by validation accuracy; "
        "the test images were not read. The winners are in `best/`; compare them on other seeds.",
        "",
    ]
    return "\n".join([*lines, *report.markdown_table(report.best_trials(result))]) + "\n"
