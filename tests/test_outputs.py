"""A teacher's outputs on disk: the same training without the teacher, and what they are held to."""

import json
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config, without_timing

import gompertz_jax as gj
from gompertz_jax.training import drive, fit, outputs
from gompertz_jax.training.augment import augmented_view
from gompertz_jax.training.data import load
from gompertz_jax.training.drive import Plan
from gompertz_jax.training.feed import Images
from gompertz_jax.training.sharding import data_mesh
from gompertz_jax.training.stop import Stop, Stopped
from gompertz_jax.training.writer import read_metrics

VIEWS = 2


def linear_apply(params, stats, images, *, train, key=None):
    """Another function in training, as dropout or a batch normalisation would be."""
    pooled = images.reshape(images.shape[0], -1) * (0.5 if train else 1.0)
    return gj.Outputs(pooled @ params, (images,), pooled), stats


def network(seed):
    return gj.Network(linear_apply, jax.random.normal(jax.random.key(seed), (64, 10)) / 8, {}, 0.3, 0.4)


def settings():
    """What `stored_outputs` and `fit` share: 1,338 images of 8x8."""
    config = tiny_config(**{"augment.flip": True, "logging.term_gradients_every": 1})
    dataset, mesh = load("digits", validation=100), data_mesh()
    return config, Images.of(dataset, config.data, mesh), mesh


def stored(directory, teacher=None, *, seed=7, parts=("logits",), padding=1, flip=True, darker=0):
    config, data, mesh = settings()
    config.augment.update({"padding": padding, "flip": flip})
    data = data._replace(images=data.images - np.uint8(darker))
    return outputs.stored_outputs(
        directory, teacher or network(5), data, parts=parts, views=VIEWS, seed=seed, augment=config.augment, mesh=mesh
    )


class StopAt(Stop):
    """A run that is asked to stop after so many dispatches."""

    def __init__(self, dispatches):
        super().__init__()
        self._left = dispatches

    def requested(self):
        self._left -= 1
        self._asked = signal.SIGTERM if self._left == 0 else self._asked
        return super().requested()


def trained(workdir, stop=None):
    """Soft targets and a term that reads the pooled vectors, for twice as many epochs as there are views."""
    config, data, mesh = settings()
    config.recipe.epochs = 2 * VIEWS
    kd = gj.gompertz_objective(52, wasserstein_weight=0.0, gradient_weight=0.0)

    def to_pooled(record):
        return (record.student.logits.mean(-1) - record.taught().pooled.mean(-1)) ** 2

    pooled = gj.Term("pooled", gj.constant_schedule(0.1), to_pooled)
    fitted = fit.fit(
        config,
        config.recipe,
        Plan.of(config.recipe, config, len(data.labels)),
        label="student",
        workdir=workdir,
        network=network(1),
        objective=kd._replace(terms=(*kd.terms, pooled)),
        teacher=network(5),
        data=data,
        seed=7,
        mesh=mesh,
        views=VIEWS,
        stop=stop,
    )
    return fitted.last, [without_timing(line) for line in read_metrics(workdir / "metrics.jsonl")]


def test_losses_are_those_with_the_teacher_at_work_and_no_step_has_it_also_on_resume(tmp_path, monkeypatch):
    """Every term, metric and gradient of every step, and the held-out agreement; only rounding differs."""
    with monkeypatch.context() as patch:
        patch.setattr(drive, "stored_outputs", lambda *args, **kwargs: {})
        expected, expected_lines = trained(tmp_path / "live")
    compiled, original = [], fit.make_train_step

    def watched(*arguments, **options):
        step = original(*arguments, **options)
        return SimpleNamespace(lower=lambda *arguments: compiled.append(arguments) or step.lower(*arguments))

    monkeypatch.setattr(fit, "make_train_step", watched)
    student, lines = trained(tmp_path / "stored")
    assert [teacher for _, teacher, _ in compiled] == [None]  # beside the state and what the batch is made of
    assert len(lines) == len(expected_lines) == 52 + 4
    for line, live in zip(lines, expected_lines, strict=True):
        assert line.pop("split") == live.pop("split")
        assert line == pytest.approx(live, rel=1e-4, abs=1e-6), live["step"]
    np.testing.assert_allclose(student.params, expected.params, rtol=1e-4, atol=1e-5)
    with pytest.raises(Stopped):
        trained(tmp_path / "again", StopAt(3))
    again, _ = trained(tmp_path / "again")
    np.testing.assert_array_equal(again.params, student.params)
    directory = tmp_path / "stored" / "outputs"
    assert sorted(path.name for path in directory.iterdir()) == ["0", "1", "card.json"]
    assert json.loads((directory / "card.json").read_text())["parts"] == ["logits", "pooled"]


def test_they_are_what_the_teacher_says_of_the_views(tmp_path):
    found = stored(tmp_path / "outputs", parts=("logits", "pooled"))
    images = jnp.asarray(load("digits", validation=100).train.images)
    for view in range(VIEWS):
        seen = augmented_view(images, jnp.arange(len(images)), view, seed=7, padding=1, flip=True)
        expected, _ = network(5).forward(seen, train=False)
        np.testing.assert_allclose(found["logits"][view], expected.logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["pooled"][view], expected.pooled, rtol=1e-6)


def test_a_view_that_is_missing_or_damaged_is_computed_again_and_the_others_are_not(tmp_path, capsys):
    """As after a kill while one was saved, or a flipped bit."""
    first = stored(tmp_path / "outputs")
    times = {view: (tmp_path / "outputs" / view / "SHA256SUMS").stat().st_mtime_ns for view in "01"}
    victim = max((tmp_path / "outputs" / "1").rglob("*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    capsys.readouterr()
    again = stored(tmp_path / "outputs")
    said = capsys.readouterr().out
    assert "are computed once, for 1 x 1,338 images" in said and "was altered or cut off" in said
    np.testing.assert_array_equal(again["logits"], first["logits"])
    assert (tmp_path / "outputs" / "0" / "SHA256SUMS").stat().st_mtime_ns == times["0"]
    stored(tmp_path / "outputs")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 8}, "seed"),
        ({"padding": 2}, "augment.padding"),
        ({"flip": False}, "augment.flip"),
        ({"darker": 1}, "images"),
        ({"teacher": network(6)}, "teacher"),
        ({"parts": ("logits", "pooled")}, "parts"),
    ],
)
def test_outputs_of_something_else_are_set_aside(tmp_path, capsys, changes, key):
    old = stored(tmp_path / "outputs")["logits"]
    new = stored(tmp_path / "outputs", **changes)["logits"]
    assert f"holds other outputs (by {key} in its card.json) and is kept as" in capsys.readouterr().out
    assert (tmp_path / "set_aside" / "outputs" / "0" / "SHA256SUMS").exists()
    assert np.array_equal(new, old) == (key == "parts")


@pytest.mark.parametrize("damage", ["of another JAX", "cut in half"])
def test_outputs_that_may_be_of_other_views_are_computed_again(tmp_path, capsys, damage):
    old = stored(tmp_path / "outputs")["logits"]
    path = tmp_path / "outputs" / "card.json"
    card = path.read_text()
    path.write_text(card.replace(jax.__version__, "0.0.1") if damage == "of another JAX" else card[: len(card) // 2])
    np.testing.assert_array_equal(stored(tmp_path / "outputs")["logits"], old)
    told = capsys.readouterr().out
    assert "are computed once, for 2 x 1,338 images" in told and "is kept as" in told
    assert damage == "cut in half" or "by jax in its card.json" in told
    assert path.read_text() == card
