"""What a run writes: whole JSON, metrics that can be cut and continued, progress for terminals and for logs."""

import errno
import json
import struct

import numpy as np
import pytest

from gompertz_jax.training import writer
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.writer import read_metrics


def train(step, **values):
    return {"step": step, "split": "train", **values}


def validation(step, **values):
    return {"step": step, "split": "validation", **values}


def test_lines_are_json_and_what_is_not_finite_is_null(tmp_path):
    with writer.MetricsWriter(tmp_path, step=0) as metrics:
        metrics.write(train(np.int32(0), loss=np.float32(0.5), kd=float("nan"), timing={"images_per_second": np.inf}))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 0, "split": "train", "loss": 0.5, "kd": None, "timing": {"images_per_second": None}
    }  # fmt: skip


def test_lines_past_the_restored_step_are_cut(tmp_path):
    """A state after n steps has the training lines of steps 0 to n - 1, and the validation line of n."""
    with writer.MetricsWriter(tmp_path, step=0) as metrics:
        for step in range(4):
            metrics.write(train(step))
            metrics.write(validation(step + 1))
    with writer.MetricsWriter(tmp_path, step=2) as metrics:
        metrics.write(train(2, again=1))
    lines = writer.read_metrics(tmp_path / "metrics.jsonl")
    expected = [train(0), validation(1), train(1), validation(2), train(2, again=1)]
    assert lines == expected


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "split": "train"}\n{"step": 1, "spl')
    with writer.MetricsWriter(tmp_path, step=1) as metrics:
        metrics.write(train(1))
    assert [line["step"] for line in writer.read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_committed_lines_are_on_disk_before_the_writer_closes(tmp_path):
    with writer.MetricsWriter(tmp_path, step=0) as metrics:
        metrics.write(train(0))
        metrics.commit()
        assert len(writer.read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_progress_speaks_plainly_when_nobody_watches(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 20.0, 20.0])
    monkeypatch.setattr(writer.time, "monotonic", lambda: next(clock))
    with writer.ProgressBar("student", step=0, total=400) as progress:
        progress.update(50, loss=2.0, accuracy=0.1, images_per_second=640.0)
        progress.validation_accuracy = 0.875
        progress.update(100, loss=1.5, accuracy=0.25, images_per_second=1234.0)
    out = capsys.readouterr().out
    assert out == ("student: step 100/400, ETA 1:00, 1,234 images/s, loss 1.500, accuracy 25.0%, validation 87.5%\n")


def test_progress_draws_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(writer.sys.stderr, "isatty", lambda: True, raising=False)
    with writer.ProgressBar("student", step=0, total=10) as progress:
        progress.update(10, loss=2.0, accuracy=0.5, images_per_second=64.0)
    err = capsys.readouterr().err
    assert "student 100%|██████| 10/10" in err
    assert "64 img/s, loss 2.00, acc 50.0%" in err


def test_tensorboard_events_follow_where_the_extra_is_installed(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra [tensorboard] is not installed")
    from tensorboardX.proto.event_pb2 import Event

    for step in (3, 2):  # a second start, from an earlier step, within the same second
        with writer.MetricsWriter(tmp_path, step=step) as metrics:
            metrics.write(train(step, loss=0.5, kd=None, timing={"images_per_second": 10.0}))
    files = sorted((tmp_path / "events").iterdir())
    assert len(files) == 2
    for path, step in zip(files, (3, 2), strict=True):
        events = [Event.FromString(record) for record in records(path)]
        assert [event.file_version for event in events[:1]] == ["brain.Event:2"]
        assert (events[1].step, events[1].session_log.status) == (step + 1, 1)  # START: hides what is past the step
        (line,) = events[2:]
        assert line.step == step
        assert [(value.tag, value.simple_value) for value in line.summary.value] == [
            ("train/loss", 0.5),
            ("train/timing/images_per_second", 10.0),
        ]


def records(path):
    """The records of a TFRecord file: length, its checksum, the bytes, theirs."""
    raw, at = path.read_bytes(), 0
    while at < len(raw):
        (length,) = struct.unpack("<Q", raw[at : at + 8])
        yield raw[at + 12 : at + 12 + length]
        at += 16 + length


def test_a_disk_that_is_full_for_events_alone_ends_the_run_in_words(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX", reason="the extra [tensorboard] is not installed")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(RunError, match=r"events cannot be written \(No space left on device\); make room"),
        writer.MetricsWriter(tmp_path, step=0) as metrics,
    ):
        monkeypatch.setattr(metrics._events._file, "write", full)
        metrics.write(train(0, loss=0.5))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
