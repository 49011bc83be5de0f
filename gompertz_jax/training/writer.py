"""What a run writes while it works: metrics.jsonl, TensorBoard events, the progress bar.

With several processes only the first one writes metrics and progress: the others have the same ones.
"""

import contextlib
import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .files import plain, replace_text, writing
from .sharding import is_main

METRICS = "metrics.jsonl"
PLAIN_LINE_SECONDS = 10.0
_BAR = "{desc} {percentage:3.0f}%|{bar:6}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"  # fits into 90 columns


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a torn last line is left out."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def lines_until(lines: Iterable[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The lines that belong to the first `step` steps."""
    return [line for line in lines if line["step"] + (line["split"] == "train") <= step]


class MetricsWriter:
    """Appends to `WORKDIR/metrics.jsonl`, and to TensorBoard events where the extra is installed.

    A line of split "train" carries the step that was taken, counted from 0, whose schedules it logs; one of split
    "validation" the number of steps taken so far. Lines past `step` steps are cut when it opens: they belong to steps
    that are about to be taken again.

    Attributes:
      lines: how many there are. A checkpoint records it, so that lines lost later are noticed.
    """

    def __init__(self, workdir: Path, *, step: int):
        self._file = self._events = None
        self.lines = 0
        if not is_main():
            return
        path = self._path = workdir / METRICS
        kept = lines_until(read_metrics(path), step)
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.lines = len(kept)
        with writing(path):
            self._file = path.open("a")
        if importlib.util.find_spec("tensorboardX") is not None:  # the extra [tensorboard]
            self._events = _Events(workdir / "events", step=step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line with its `step` and `split`. What is not finite becomes null, so that every line is JSON."""
        if self._file is None:
            return
        line = plain(line)
        with writing(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self.lines += 1
        if self._events is not None:
            self._events.write(line)

    def commit(self) -> None:
        """Return once everything written so far is on disk. Comes before a checkpoint of the same step."""
        if self._file is not None:
            with writing(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Commit and close."""
        try:
            self.commit()
        finally:
            for file in (self._file, self._events):
                if file is not None:
                    with contextlib.suppress(OSError):  # reported by `commit`
                        file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Events:
    """TensorBoard's events of the lines of `metrics.jsonl`, in one file per start.

    Events of an earlier start past `step` are hidden. The training line of index `step` is shown twice, with equal
    numbers: validation lines, which count the steps taken, must stay.

    They are written by the caller's thread. The thread of tensorboardX's SummaryWriter dies silently on a full disk,
    and its queue then fills up until the run hangs.
    """

    def __init__(self, directory: Path, *, step: int):
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter

        self._path = directory
        self._proto: Any = event_pb2
        self._summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue] made at run time
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            # Two starts within a second must not share a file.
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            self._file = RecordWriter(str(directory / name))
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))

    def write(self, line: Mapping[str, Any]) -> None:
        scalars = [
            self._summary.Value(tag=f"{line['split']}/{name}", simple_value=value) for name, value in _scalars(line)
        ]
        self._add(step=line["step"], summary=self._summary(value=scalars))

    def _add(self, **content: Any) -> None:
        with writing(self._path):
            self._file.write(self._proto.Event(wall_time=time.time(), **content).SerializeToString())

    def flush(self) -> None:
        with writing(self._path):
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class ProgressBar:
    """A bar with ETA on a terminal; elsewhere one plain line every ten seconds or so."""

    def __init__(self, label: str, *, step: int, total: int, enabled: bool = True):
        self._label, self._step, self._total = label, step, total
        self.validation_accuracy: float | None = None
        self._start_step, self._start = step, time.monotonic()
        self._spoke = self._start
        self._bar = None
        self._enabled = enabled and is_main()
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(desc=label, total=total, initial=step, bar_format=_BAR, dynamic_ncols=True, smoothing=0.1)

    def update(self, step: int, *, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show how far training is."""
        advanced, self._step = step - self._step, step
        if self._bar is not None:
            held_out = "" if self.validation_accuracy is None else f", val {self.validation_accuracy:.1%}"
            figures = f"{images_per_second:,.0f} img/s, loss {loss:.2f}, acc {accuracy:.1%}{held_out}"
            self._bar.set_postfix_str(figures)
            self._bar.update(advanced)
        elif self._enabled and time.monotonic() - self._spoke >= PLAIN_LINE_SECONDS:
            self._spoke = time.monotonic()
            rate = (step - self._start_step) / (self._spoke - self._start)
            eta = _duration((self._total - step) / rate) if rate > 0 else "?"
            figures = self._figures(loss, accuracy, images_per_second)
            print(f"{self._label}: step {step:,}/{self._total:,}, ETA {eta}, {figures}", flush=True)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _figures(self, loss: float, accuracy: float, images_per_second: float) -> str:
        held_out = "" if self.validation_accuracy is None else f", validation {self.validation_accuracy:.1%}"
        return f"{images_per_second:,.0f} images/s, loss {loss:.3f}, accuracy {accuracy:.1%}{held_out}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _scalars(line: Mapping[str, Any], prefix: str = "") -> list[tuple[str, int | float]]:
    scalars = []
    for name, value in line.items():
        if isinstance(value, Mapping):
            scalars += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            scalars.append((prefix + name, value))
    return scalars
