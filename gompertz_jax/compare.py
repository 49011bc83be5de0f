"""A comparison from its config to its tables: its arms trained with every seed, tested, and compared with a baseline.

The students' validation chooses, and the test images are read once, at the end.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import report
from .arms import STUDENT, with_student
from .cohort import Cohort, Student, Tested, Trained, train_all
from .step import make_eval_step
from .training.config import Config
from .training.errors import RunError
from .training.feed import in_parts
from .training.files import replace_text, write_json
from .training.sharding import on_main, say, together
from .training.stop import Stop
from .training.workdir import COMPARISON, finished_result, provenance, sole_use


def compare(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    arms: Mapping[str, Config],
    seeds: int = 5,
    baseline: str = "",
    layout: str = "devices",
) -> dict[str, Any]:
    """Train every arm with every seed, or resume where training stopped, and compare.

    Args:
      config: what is common to all arms: data, networks, recipe, teacher.
      workdir: where everything is kept; an existing comparison is continued.
      arms: name -> config, whose objective is the arm's; `arms.arm` makes one by its name.
      seeds: how many, starting at the config's `seed`.
      baseline: the arm that the others are compared with; "": `matched` where it is among the arms, else `student`.
      layout: see `gompertz_jax.students.make_comparison_step`.

    Returns:
      The content of results.json.

    Raises:
      RunError: something the user can change; mostly before any work is done.
      Stopped: SIGTERM or SIGINT came; the work in progress is saved.
    """
    workdir = Path(workdir).expanduser()
    arms = with_student(config, arms)
    baseline = baseline or ("matched" if "matched" in arms else STUDENT)
    if baseline not in arms:
        raise RunError(f"--baseline={baseline} is not among the arms {', '.join(arms)}")
    with Stop() as stop:
        origin = provenance()
        cohort = Cohort.of(config, arms, seeds, layout)
        results = on_main(lambda: finished_result(workdir, COMPARISON, cohort.content))
        if results is not None:
            say(f"{workdir} holds a finished comparison; another --workdir starts a new one.")
        else:
            with sole_use(workdir):
                trained = train_all(cohort, workdir, stop)
                results = trained.results(workdir, tested(trained)) | origin
        return on_main(lambda: _conclude(workdir, results, baseline))


def _conclude(workdir: Path, results: dict[str, Any], baseline: str) -> dict[str, Any]:
    """Compare with the baseline, write the table and the picture, and last the results, which mark it as finished."""
    results = results | {"comparison": report.compared(results, baseline)}
    text = report.as_markdown(results)
    report.save(report.comparison_figure(results), workdir / "comparison.png")
    replace_text(workdir / "results.md", text)
    write_json(workdir / COMPARISON, results)
    say(f"{text}\nfiles     {workdir}/ {COMPARISON}, results.md, comparison.png, metrics.jsonl, checkpoints/, teacher/")
    say(f"next      gompertz-jax report {workdir}")
    return results


def tested(trained: Trained) -> Tested:
    """Read the test images and evaluate all students and the teacher: the one place where a comparison does."""
    test = together(trained.dataset.test)
    evaluate, network = make_eval_step(mesh=trained.mesh), trained.network

    @jax.jit
    def classes_of(params: Any, stats: Any, images: Any, labels: Any) -> jax.Array:
        return jax.lax.map(
            lambda arrays: evaluate(network.replace(params=arrays[0], stats=arrays[1]), images, labels).classes,
            (params, stats),
        )

    def classes(weights: Any) -> list[np.ndarray]:
        return [in_parts(partial(classes_of, *group), test, trained.mesh) for group in weights]

    def of_student(predicted: Sequence[np.ndarray] | None, student: Student) -> np.ndarray | None:
        return None if predicted is None else predicted[student.group][student.place]

    def agreement(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
        return None if a is None or b is None else float(np.mean(a == b))

    state, best = trained.driven.state, trained.driven.best
    last = classes([group.evaluated() for group in state.groups])
    chosen = None if trained.dataset.validation is None else classes([(group.params, group.stats) for group in best])
    teacher_classes = None
    if trained.teacher is not None:
        teacher = trained.teacher.network
        teacher_classes = in_parts(lambda *part: evaluate(teacher, *part).classes, test, trained.mesh)
    return Tested(
        agreement(teacher_classes, test.labels),
        {
            student: {
                "test_accuracy_last": agreement(of_student(last, student), test.labels),
                "test_accuracy_best": agreement(of_student(chosen, student), test.labels),
                "test_agreement_last": agreement(of_student(last, student), teacher_classes),
            }
            for student in trained.students
        },
    )
