"""Metrics of each dispatch, read one dispatch late, and the time that a run has taken."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from ..objective import Objective
from ..state import HEALTHY
from ..step import TELEMETRY
from .config import Config
from .errors import RunError
from .sharding import say
from .writer import MetricsWriter, ProgressBar


class StudentMetrics(NamedTuple):
    """Metrics of one student.

    Attributes:
      tags: what marks its lines in metrics.jsonl; none where there is one student.
      objective: its objective.
      metrics: by name, an array `[steps]` or a scalar.
    """

    tags: Mapping[str, Any]
    objective: Objective
    metrics: Mapping[str, np.ndarray]


@dataclass
class Clock:
    """Time spent, over all starts of a run. The seconds of steps hold evaluation and saving, but no compilation."""

    total_seconds: float = 0.0
    step_seconds: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float:
        """The rate while steps were taken; 0 if none was."""
        return self.images / self.step_seconds if self.step_seconds else 0.0

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return vars(self).copy()


class MetricsReader:
    """Reads each dispatch's metrics once the next one is under way, and passes them on.

    Attributes:
      not_converged: for each term, after the student's prefix where there are several, the number of steps at which
        transport failed to converge for at least one image, over all starts.
      failed: prefixes of the students whose training ended early, where there are several.
    """

    def __init__(
        self,
        students: Callable[[Any], Iterable[StudentMetrics]],
        *,
        batch_size: int,
        logging: Config,
        clock: Clock,
        not_converged: dict[str, int],
        failed: set[str],
        writer: MetricsWriter,
        progress: ProgressBar,
    ):
        self.not_converged, self.failed = not_converged, failed
        self._warned = False
        self._students, self._batch_size, self._logging = students, batch_size, logging
        self._clock, self._writer, self._progress = clock, writer, progress
        self._pending: Any = None
        self._last_read = time.monotonic()

    def has_failed(self, student: StudentMetrics) -> bool:
        """Whether this student's training ended early."""
        return _prefix(student) in self.failed

    def take(self, metrics: Any) -> None:
        """Accept the metrics of the dispatch just issued, and read those of the one before it."""
        self.drain()
        self._pending = metrics

    def drain(self) -> None:
        """Wait for what is pending, check it and write it.

        Raises:
          RunError: a term or the gradient of the only student, or of the last one left, was not finite.
        """
        if self._pending is None:
            return
        students, self._pending = list(self._students(jax.device_get(self._pending))), None
        now = time.monotonic()
        elapsed, self._last_read = now - self._last_read, now
        steps = len(students[0].metrics["step"])
        images = steps * self._batch_size * len(students)
        self._clock.step_seconds += elapsed
        self._clock.images += images
        failures = []
        for student in students:
            if not self.has_failed(student) and (failure := self._read(student, images / elapsed)):
                self.failed.add(_prefix(student))
                failures.append(failure)
        if failures:
            self._writer.commit()
            if len(self.failed) == len(students):
                raise RunError(f"{f'no student of {len(students)} is left: ' * (len(students) > 1)}{failures[-1]}")
            say("\n".join(f"warning: {failure}; the others go on" for failure in failures))
        going = [student.metrics for student in students if not self.has_failed(student)]
        self._progress.update(
            max(int(metrics["step"][-1]) for metrics in going) + 1,
            loss=float(np.mean([metrics["loss"][-1] for metrics in going])),
            accuracy=float(np.mean([metrics["accuracy"] for metrics in going])),
            images_per_second=images / elapsed,
        )

    def count_rest(self) -> None:
        """Count the time after the last metrics, too: of the last evaluation, and of saving."""
        if self._clock.images:
            self._clock.step_seconds += time.monotonic() - self._last_read

    def _read(self, student: StudentMetrics, images_per_second: float) -> str | None:
        """Write a student's metrics; return how it failed, if it did."""
        metrics = student.metrics
        failed, gradients_every = metrics["failed_term"] != HEALTHY, self._logging.term_gradients_every
        # Steps after a failure change nothing and say nothing new; the failing one is written.
        until = np.cumsum(failed) <= 1
        measured = metrics["step"] % gradients_every == 0 if gradients_every else np.zeros_like(failed)
        for index in np.flatnonzero(until & ((metrics["step"] % self._logging.every_steps == 0) | measured | failed)):
            without = ("failed_term", "failed_step", *(TELEMETRY if gradients_every and not measured[index] else ()))
            values = {name: column[index] for name, column in metrics.items() if not name.endswith(without)}
            line = {"step": values.pop("step"), "split": "train", **student.tags, **values}
            self._writer.write({**line, "timing": {"images_per_second": round(images_per_second, 1)}})
        self._count_convergence(student)
        if not failed.any():
            return None
        return _failure(student, int(metrics["failed_term"][-1]), int(metrics["failed_step"][-1]))

    def _count_convergence(self, student: StudentMetrics) -> None:
        metrics = student.metrics
        for term in student.objective.terms:
            shares = metrics.get(f"{term.name}/converged", np.ones(1))
            short = np.flatnonzero(shares < 1)  # NaN, where the term was not computed, is no such step
            if not short.size:
                continue
            name = _prefix(student) + term.name
            self.not_converged[name] = self.not_converged.get(name, 0) + int(short.size)
            if not self._warned:
                self._warned = True
                first = short[0]
                say(
                    f"warning: at step {int(metrics['step'][first])} the transport of {1 - float(shares[first]):.1%} "
                    f"of the images in the term {name!r} did not converge (mean marginal error "
                    f"{float(metrics[f'{term.name}/marginal_error'][first]):.1e}): its value is approximate. A larger "
                    f"objective.terms.{term.name}.epsilon converges sooner. Further steps are counted in result.json"
                )


def _prefix(student: StudentMetrics) -> str:
    return "".join(f"{value}/" for value in student.tags.values())


def _failure(student: StudentMetrics, failed: int, step: int) -> str:
    what = [*(f"the term {term.name!r}" for term in student.objective.terms), "the gradient", "the update"][failed]
    whose = f"{_prefix(student).rstrip('/')}: " if student.tags else ""
    return (
        f"{whose}{what} was not finite at step {step}; the update was refused and nothing of it saved. "
        "Look at that step in metrics.jsonl; a lower learning_rate or a clip_norm in the recipe, or a smaller weight, "
        "with another --workdir, is the usual remedy"
    )
