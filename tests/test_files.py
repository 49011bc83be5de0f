"""Files that are whole or absent."""

import errno
import re

import numpy as np
import pytest

from gompertz_jax.training import files
from gompertz_jax.training.errors import RunError


def test_json_files_are_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": np.float32(1.5), "b": [float("nan"), (1, 2)]})
    assert files.read_json(path) == {"a": 1.5, "b": [None, [1, 2]]}
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert files.read_json(path)["a"] == 1.5
    path.write_text('{"a": 1')
    with pytest.raises(RunError, match=re.escape(str(path))):
        files.read_json(path)


def test_a_full_disk_is_told_by_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match=r"result.json cannot be written \(No space left on device\); make room"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}


def test_what_is_set_aside_overwrites_nothing(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "card.json").write_text(content)
        files.set_aside(tmp_path / "card.json")
    kept = sorted((tmp_path / files.ASIDE).iterdir())
    assert [(path.name, path.read_text()) for path in kept] == [("card.json", "first"), ("card.json.1", "second")]
