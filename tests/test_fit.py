"""How a recipe becomes steps, dispatches and evaluations, and what the loop over them leaves alone."""

import gc
import json
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_tree, tiny_config
from test_outputs import StopAt

import gompertz_jax as gj
from gompertz_jax import terms
from gompertz_jax.training import drive, fit, reader
from gompertz_jax.training.data import load
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.feed import Feed, Images
from gompertz_jax.training.sharding import data_mesh, replicate
from gompertz_jax.training.stop import Stopped
from gompertz_jax.training.writer import MetricsWriter, ProgressBar, read_metrics


def test_dispatches_divide_the_steps_and_evaluation_follows_the_epochs():
    config = tiny_config()
    for count, batch, epochs in ((1337, 96, 3), (45_000, 128, 7), (353 * 8, 8, 5)):
        config.recipe.update({"batch_size": batch, "epochs": epochs})
        plan = drive.Plan.of(config.recipe, config, count)
        assert plan.steps == epochs * (count // batch)
        assert plan.steps % plan.steps_per_dispatch == 0
        ends = range(plan.steps_per_dispatch, plan.steps + 1, plan.steps_per_dispatch)
        assert sum(map(plan.evaluates_at, ends)) == epochs
        assert plan.evaluates_at(plan.steps)


def test_a_dispatch_ends_at_every_evaluation_of_a_small_set():
    """500 images make 7 steps an epoch: a dispatch of 35 would pass over four evaluations."""
    config = tiny_config(steps_per_dispatch=50, **{"recipe.batch_size": 64, "recipe.epochs": 10})
    plan = drive.Plan.of(config.recipe, config, 500)
    assert plan.steps_per_dispatch == 7
    assert [step for step in range(7, 71, 7) if plan.evaluates_at(step)] == list(range(7, 71, 7))
    config.evaluate_every_epochs = 5
    assert drive.Plan.of(config.recipe, config, 500).steps_per_dispatch == 35
    again = drive.Plan.of(config.recipe, config, 500, begun=1)  # the program is that of the first start
    assert again.steps_per_dispatch == 7 and [step for step in range(7, 71, 7) if again.evaluates_at(step)] == [35, 70]


def linear_apply(params, stats, images, *, train, key=None):
    pooled = images.reshape(images.shape[0], -1)
    return gj.Outputs(pooled @ params, (images,), pooled), stats


def linear_network(seed=None):
    params = jax.numpy.zeros((64, 10)) if seed is None else jax.random.normal(jax.random.key(seed), (64, 10))
    return gj.Network(linear_apply, params, {}, 0.0, 1.0)


def run(workdir, *, objective=None, teacher=None, seed=0, stop=None, **changes):
    """A network that compiles in no time, through the whole loop: dispatches of 3 steps, evaluations at 15, 27, 39."""
    config = tiny_config(**changes)
    dataset, mesh = load("digits", validation=100), data_mesh()
    plan = drive.Plan.of(config.recipe, config, len(dataset.train.labels))
    return fit.fit(
        config,
        config.recipe,
        plan,
        label="student",
        workdir=workdir,
        network=linear_network(),
        objective=objective or gj.student_alone(),
        teacher=teacher,
        data=Images.of(dataset, config.data, mesh),
        seed=seed,
        mesh=mesh,
        stop=stop,
    )


def test_after_the_first_dispatch_nothing_is_compiled_moved_or_kept(tmp_path, monkeypatch):
    """Over ten evaluations and checkpoints: programs, bytes on the device, copies of the images, open transfers."""
    compiled, seen, original = [], [], reader.MetricsReader.take
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )

    def take(self, metrics):
        original(self, metrics)
        alive = jax.live_arrays()
        images = sum(array.shape == (1338, 8, 8, 1) for array in alive)
        seen.append((len(compiled), sum(array.nbytes for array in alive), images, jax.config.jax_transfer_guard))

    monkeypatch.setattr(reader.MetricsReader, "take", take)
    gc.collect()  # what earlier tests left alive is not this run's
    fitted = run(tmp_path, **{"recipe.epochs": 10, "data.placement": "device"})
    assert fitted.best_accuracy > 0.8
    programs, _, _, guard = zip(*seen, strict=True)
    _, memory, images, _ = zip(*seen[2:], strict=True)
    assert len(seen) == 10 * 13 / 5 and compiled
    assert set(programs) == {len(compiled)}
    # A copy of the state more or less may be on its way to the disk; one kept at each evaluation would make five more.
    state = 3 * 64 * 10 * 4  # weights, momentum, best weights
    early, late = memory[: len(memory) // 2], memory[len(memory) // 2 :]
    assert max(late) < max(early) + 2 * state
    assert set(images) == {1}
    assert set(guard) == {"disallow"}


def test_the_weights_of_the_start_do_not_stay_in_memory(tmp_path, monkeypatch):
    begun, kept, call, init_state = [], [], Feed.__call__, fit.init_state

    def watched(*given, **options):
        state = init_state(*given, **options)
        begun.append(weakref.ref(state.params))
        return state

    def fed(self, step):
        kept.append(begun[0]() is not None)
        return call(self, step)

    monkeypatch.setattr(fit, "init_state", watched)
    monkeypatch.setattr(Feed, "__call__", fed)
    run(tmp_path, **{"recipe.epochs": 1})
    assert len(kept) > 3 and not kept[-1]


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


def test_the_same_seed_writes_the_same_numbers_wherever_the_images_live_and_another_does_not(tmp_path):
    fitted = [run(tmp_path / place, **{"data.placement": place}) for place in ("device", "host")]
    np.testing.assert_array_equal(*(network.last.params for network in fitted))
    other = run(tmp_path / "other", seed=1)
    assert np.abs(other.last.params - fitted[0].last.params).max() > 1e-3
    lines = [
        [
            {key: value for key, value in line.items() if key != "timing"}
            for line in read_metrics(tmp_path / place / "metrics.jsonl")
        ]
        for place in ("device", "host")
    ]
    assert lines[0] == lines[1]


def test_the_rate_of_a_run_counts_what_follows_the_last_step(tmp_path, monkeypatch):
    """On a clock by which writing the last checkpoint takes an hour, and all else next to nothing."""
    now, original = [0.0], drive.Checkpoints.wait

    def monotonic():
        now[0] += 0.1
        return now[0]

    def wait(self):
        now[0] += 3600.0 * (self.latest_step == 27)
        original(self)

    monkeypatch.setattr(drive.Checkpoints, "wait", wait)
    for module in (drive, reader):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))
    assert run(tmp_path).images_per_second == pytest.approx(39 * 96 / 3600, rel=0.01)


def test_of_equal_evaluations_the_later_one_is_kept(tmp_path):
    """With a learning rate of 0 every evaluation is as good as the first."""
    config = {"recipe.learning_rate": 1e-30, "recipe.epochs": 2}
    fitted = run(tmp_path, **config)
    assert fitted.best_step == 2 * 13


@pytest.mark.parametrize("step", [16, 26])
def test_what_is_not_finite_ends_the_run_one_dispatch_later_and_is_never_saved(tmp_path, monkeypatch, step):
    """Step 26 is in the dispatch that ends with an evaluation, which is queued before anything is known of it."""
    poison = lambda now: jax.numpy.where(now == step, jax.numpy.nan, 1.0)  # noqa: E731
    objective = gj.Objective((gj.student_alone().terms[0]._replace(weight=poison),))
    issued, original = [], Feed.__call__
    monkeypatch.setattr(Feed, "__call__", lambda self, first: issued.append(first) or original(self, first))
    with pytest.raises(RunError, match=f"the term 'ce' was not finite at step {step}; .*nothing of it saved"):
        run(tmp_path, objective=objective)
    assert max(issued) == step // 3 * 3 + 3
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert saved == {"15"}
    lines = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["split"] == "train"]
    assert lines == list(range(step + 1))


def test_transport_that_does_not_converge_is_counted_and_told_once_and_the_teacher_stays_as_it_was(tmp_path, capsys):
    """Five iterations suffice at a large epsilon, which the odd steps have, and not at a small one."""

    def transport(record, *, epsilon):
        x, y = record.student.features[0][..., 0], record.taught().features[0][..., ::-1, 0]
        distance, health = gj.sinkhorn_distance(x, y, epsilon=epsilon, max_iterations=5, return_diagnostics=True)
        return distance, {"converged": health.converged * 1.0, "marginal_error": health.marginal_error}

    epsilon = lambda step: jax.numpy.where(step % 2, 10.0, 1e-3)  # noqa: E731
    one = gj.constant_schedule(1.0)
    ce, kd = gj.gompertz_objective(13, wasserstein_weight=0.0, gradient_weight=0.0).terms
    objective = gj.Objective((ce, kd, gj.Term("wasserstein", one, transport, {"epsilon": epsilon})))
    # On the devices already, so that the arrays that teach are these and no copies.
    teacher = replicate(linear_network(seed=5), data_mesh())
    before = [np.array(leaf) for leaf in jax.tree.leaves(teacher)]
    fitted = run(tmp_path, objective=objective, teacher=teacher, **{"recipe.epochs": 1})
    assert fitted.not_converged == {"wasserstein": 7}  # of the steps 0 to 12
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["split"] == "train"]
    assert [line["wasserstein/converged"] == 1 for line in lines] == [step % 2 == 1 for step in range(13)]
    assert all((line["wasserstein/marginal_error"] < 1e-3) == (line["step"] % 2 == 1) for line in lines)
    out = capsys.readouterr().out
    assert out.count("did not converge") == 1
    share = 1 - lines[0]["wasserstein/converged"]
    assert f"warning: at step 0 the transport of {share:.1%} of the images in the term 'wasserstein'" in out
    assert f"mean marginal error {lines[0]['wasserstein/marginal_error']:.1e}" in out
    assert "A larger objective.terms.wasserstein.epsilon converges sooner" in out
    for leaf, was in zip(jax.tree.leaves(teacher), before, strict=True):
        assert np.asarray(leaf).tobytes() == was.tobytes()


def test_a_step_whose_gradients_are_measured_has_a_line_and_no_other_line_has_their_names(tmp_path):
    run(tmp_path, **{"logging.every_steps": 4, "logging.term_gradients_every": 6})
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in lines] == [step for step in range(39) if step % 4 == 0 or step % 6 == 0]
    for line in lines:
        assert ("ce/gradient_norm" in line) == ("ce/gradient_cosine" in line) == (line["step"] % 6 == 0)
        assert "gradient_norm" in line
        if "ce/gradient_norm" in line:  # of the only term, at weight 1
            np.testing.assert_allclose(line["ce/gradient_norm"], line["gradient_norm"], rtol=1e-5)


def test_the_teachers_channels_are_measured_before_the_first_step(tmp_path):
    transport = gj.Term("w", gj.constant_schedule(0.1), terms.gaussian)
    objective = gj.Objective((*gj.student_alone().terms, transport), {"last": gj.Projection()})
    run(tmp_path, objective=objective, teacher=linear_network(5), **{"recipe.epochs": 1})
    state, _ = load_tree(tmp_path / "checkpoints" / "last")
    seen = load("digits", validation=100).train.images[:200] / 255.0  # teacher_statistics_images
    found = state["projection_stats"]["last"]
    np.testing.assert_allclose(found["teacher_mean"], seen.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["teacher_std"], seen.std((0, 1, 2)), rtol=1e-5)


def test_a_run_evaluates_the_moving_average_and_rests_under_the_cutoff(tmp_path):
    objective = gj.gompertz_objective(39, wasserstein_weight=0.0, gradient_weight=0.0)
    changes = {"recipe.moving_average": 0.9, "objective.skip_below": 0.1}
    fitted = run(tmp_path, objective=objective, teacher=linear_network(5), **changes)
    state, _ = load_tree(tmp_path / "checkpoints" / "last")
    average = state["average"][0]
    np.testing.assert_array_equal(fitted.last.params, average)
    assert np.abs(average - state["params"]).max() > 1e-3
    lines = read_metrics(tmp_path / "metrics.jsonl")
    held = load("digits", validation=100).validation
    said = (held.images.reshape(100, -1) / 255.0 @ np.asarray(average, np.float64)).argmax(-1)
    assert lines[-1]["accuracy"] == pytest.approx((said == held.labels).mean())
    rests = [line["kd/raw"] is None for line in lines if line["split"] == "train"]
    assert rests == [np.exp(-5 * np.exp(-8 * n / 39)) < 0.1 for n in range(39)] and 0 < sum(rests) < 39


def test_what_validation_chose_are_the_weights_of_that_step(tmp_path):
    # Uphill from step 15: the best evaluation is the first.
    turns = gj.student_alone().terms[0]._replace(weight=lambda step: jnp.where(step < 15, 1.0, -10.0))
    fitted = run(tmp_path, objective=gj.Objective((turns,)))
    held = [line["accuracy"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["split"] == "validation"]
    assert held[0] > max(held[1:])
    assert (fitted.best_step, fitted.best_accuracy) == (15, held[0])
    assert fitted.selected is fitted.best
    split = load("digits", validation=100).validation
    for network, accuracy in ((fitted.best, held[0]), (fitted.last, held[-1])):
        said = (split.images.reshape(100, -1) / 255.0 @ np.asarray(network.params, np.float64)).argmax(-1)
        assert (said == split.labels).mean() == pytest.approx(accuracy)


def test_metrics_are_on_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    seen, original = [], drive.Checkpoints.save

    def save(self, step, state, record):
        lines = read_metrics(tmp_path / "metrics.jsonl")
        last = max(line["step"] + (line["split"] == "train") for line in lines)
        seen.append((step, len(lines) == record["lines"], last))
        original(self, step, state, record)

    monkeypatch.setattr(drive.Checkpoints, "save", save)
    run(tmp_path)
    assert seen == [(step, True, step) for step in (15, 27, 39)]


def test_of_several_students_one_that_fails_ends_alone_and_the_last_one_ends_the_run(tmp_path):
    objective = gj.gompertz_objective(6, wasserstein_weight=0.0, gradient_weight=0.0)

    def dispatch(first, ends):
        for name, end in ends.items():
            steps = np.arange(first, first + 3)
            failed = (end >= 0) & (steps >= end)
            metrics = {
                "step": np.where(failed, end, steps),
                "loss": np.ones(3),
                "accuracy": np.ones(3),
                "failed_term": np.where(failed, 1, -1),
                "failed_step": np.where(failed, end, -1),
            }
            yield reader.StudentMetrics({"arm": name, "seed": 0}, objective, metrics)

    logging, shown = tiny_config().logging, ProgressBar("x", step=0, total=9, enabled=False)
    with MetricsWriter(tmp_path, step=0) as writer:
        taking = reader.MetricsReader(
            lambda metrics: metrics,
            batch_size=96,
            logging=logging,
            clock=reader.Clock(),
            not_converged={},
            failed=set(),
            writer=writer,
            progress=shown,
        )
        for first in (0, 3):
            taking.take(list(dispatch(first, {"a": 1, "b": -1})))
        taking.drain()
        writer.commit()
        lines = read_metrics(tmp_path / "metrics.jsonl")
        steps = {name: [line["step"] for line in lines if line["arm"] == name] for name in "ab"}
        assert steps == {"a": [0, 1], "b": [0, 1, 2, 3, 4, 5]}
        taking.take(list(dispatch(6, {"a": 1, "b": 7})))
        with pytest.raises(RunError, match="no student of 2 is left: b/0: the term 'kd' was not finite at step 7"):
            taking.drain()


def test_a_plan_evaluates_every_so_many_epochs_and_at_the_end():
    config = tiny_config(evaluate_every_epochs=2)
    plan = drive.Plan.of(config.recipe, config, 1337)
    assert [step for step in range(3, 40, 3) if plan.evaluates_at(step)] == [27, 39]


def test_counts_and_seconds_go_on_after_a_stop(tmp_path):
    def transport(record, *, epsilon):
        x, y = record.student.features[0][..., 0], record.taught().features[0][..., ::-1, 0]
        distance, health = gj.sinkhorn_distance(x, y, epsilon=epsilon, max_iterations=5, return_diagnostics=True)
        return distance, {"converged": health.converged * 1.0, "marginal_error": health.marginal_error}

    # At every other step the regularisation is too small for so few iterations.
    epsilon = {"epsilon": lambda step: jnp.where(step % 2, 10.0, 1e-3)}
    term = gj.Term("w", gj.constant_schedule(1.0), transport, epsilon)
    objective = gj.Objective((*gj.student_alone().terms, term))
    changes = {"recipe.epochs": 1, "steps_per_dispatch": 1}
    with pytest.raises(Stopped):
        run(tmp_path, objective=objective, teacher=linear_network(5), stop=StopAt(6), **changes)
    before = json.loads((tmp_path / "checkpoints" / "6" / "record.json").read_text())
    assert before["not_converged"] == {"w": 3}
    whole = run(tmp_path, objective=objective, teacher=linear_network(5), **changes)
    assert whole.not_converged == {"w": 7}
    assert whole.seconds > before["timing"]["total_seconds"]
