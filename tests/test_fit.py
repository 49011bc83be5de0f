"""How a recipe becomes steps, dispatches and evaluations, and what the loop over them leaves alone."""

import jax
import numpy as np
import pytest
from helpers import tiny_config

import gompertz_jax as gj
from gompertz_jax.training import fit
from gompertz_jax.training.data import load
from gompertz_jax.training.feed import Feed, Images
from gompertz_jax.training.sharding import data_mesh
from gompertz_jax.training.writer import read_metrics


def test_dispatches_divide_the_steps_and_evaluation_follows_the_epochs():
    config = tiny_config()
    for count, batch, epochs in ((1337, 96, 3), (45_000, 128, 7), (353 * 8, 8, 5)):
        config.recipe.update({"batch_size": batch, "epochs": epochs})
        plan = fit.Plan.of(config.recipe, config, count)
        assert plan.steps == epochs * (count // batch)
        assert plan.steps % plan.steps_per_dispatch == 0
        ends = range(plan.steps_per_dispatch, plan.steps + 1, plan.steps_per_dispatch)
        assert sum(map(plan.evaluates_at, ends)) == epochs
        assert plan.evaluates_at(plan.steps)


def linear_apply(params, stats, images, *, train, key=None):
    pooled = images.reshape(images.shape[0], -1)
    return gj.Outputs(pooled @ params, (images,), pooled), stats


def run(workdir, **changes):
    """A network that compiles in no time, through the whole loop."""
    config = tiny_config(**changes)
    dataset, mesh = load("digits", validation=100), data_mesh()
    plan = fit.Plan.of(config.recipe, config, len(dataset.train.labels))
    return fit.fit(
        config,
        config.recipe,
        plan,
        label="student",
        workdir=workdir,
        network=gj.Network(linear_apply, jax.numpy.zeros((64, 10)), {}, 0.0, 1.0),
        objective=gj.student_alone(),
        teacher=None,
        data=Images.of(dataset, config.data, mesh),
        seed=0,
        mesh=mesh,
    )


def test_after_the_first_dispatch_nothing_is_compiled_moved_or_kept(tmp_path, monkeypatch):
    """Over ten evaluations and checkpoints: programs, bytes on the device, copies of the images, open transfers."""
    compiled, seen, original = [], [], fit.MetricsReader.take
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )

    def take(self, metrics):
        original(self, metrics)
        alive = jax.live_arrays()
        images = sum(array.shape == (1338, 8, 8, 1) for array in alive)
        seen.append((len(compiled), sum(array.nbytes for array in alive), images, jax.config.jax_transfer_guard))

    monkeypatch.setattr(fit.MetricsReader, "take", take)
    fitted = run(tmp_path, **{"recipe.epochs": 10, "data.placement": "device"})
    assert fitted.best_accuracy > 0.8
    programs, memory, images, guard = zip(*seen[2:], strict=True)
    assert len(seen) == 10 * 13 / 5 and compiled
    assert set(programs) == {len(compiled)}
    # A copy of the state more or less may be on its way to the disk; one kept at each evaluation would make five more.
    state = 3 * 64 * 10 * 4  # weights, momentum, best weights
    early, late = memory[: len(memory) // 2], memory[len(memory) // 2 :]
    assert max(late) < max(early) + 2 * state
    assert set(images) == {1}
    assert set(guard) == {"disallow"}


def test_what_comes_from_the_host_inside_the_loop_is_refused(tmp_path, monkeypatch):
    original = Feed.__call__
    calls = []

    def forgotten(self, step):
        calls.append(step)
        arrays = original(self, step)
        return arrays if len(calls) < 4 else jax.device_get(arrays)

    monkeypatch.setattr(Feed, "__call__", forgotten)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path)


def test_the_loop_writes_the_same_numbers_wherever_the_images_live(tmp_path):
    fitted = [run(tmp_path / place, **{"data.placement": place}) for place in ("device", "host")]
    np.testing.assert_array_equal(*(network.last.params for network in fitted))
    lines = [
        [
            {key: value for key, value in line.items() if key != "timing"}
            for line in read_metrics(tmp_path / place / "metrics.jsonl")
        ]
        for place in ("device", "host")
    ]
    assert lines[0] == lines[1]


def test_of_equal_evaluations_the_later_one_is_kept(tmp_path):
    """With a learning rate of 0 every evaluation is as good as the first."""
    config = {"recipe.learning_rate": 1e-30, "recipe.epochs": 2}
    fitted = run(tmp_path, **config)
    assert fitted.best_step == 2 * 13
