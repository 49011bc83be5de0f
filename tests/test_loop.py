"""A whole run: what it leaves behind, and what it refuses."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, small_config, tiny_config, train

from gompertz_jax.training import feed, fit, loop, teacher
from gompertz_jax.training.data import Dataset, load
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.networks import load_network, save_network
from gompertz_jax.training.sharding import data_mesh
from gompertz_jax.training.stop import Stop
from gompertz_jax.training.workdir import frozen
from gompertz_jax.training.writer import read_metrics


def run_config(**changes):
    """All four terms on the smallest networks, for two epochs of small batches: its student learns enough to teach."""
    default = tiny_config().objective.terms
    terms = {f"objective.terms.{name}.weight": default[name].weight for name in ("wasserstein", "gradient")}
    batches = {"recipe.epochs": 2, "recipe.batch_size": 32}
    # a large epsilon takes few iterations
    return small_config(**batches | {"objective.terms.wasserstein.epsilon": "1"} | terms | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, loop.train_and_evaluate(run_config(), workdir)


def without_timing(value):
    if isinstance(value, dict):
        return {key: without_timing(item) for key, item in value.items() if key != "timing"}
    return value


def metrics_of(workdir):
    return [without_timing(line) for line in read_metrics(workdir / "metrics.jsonl")]


def test_a_run_leaves_what_it_promises(finished):
    workdir, result = finished
    expected = {"result.json", "metrics.jsonl", "curves.png", "config.json", "checkpoints", "network", "network.json"}
    assert expected | {"teacher"} <= {path.name for path in workdir.iterdir()}
    assert {"teacher.json", "network.json", "metrics.jsonl"} <= {path.name for path in (workdir / "teacher").iterdir()}
    assert not list((workdir / "teacher").rglob("result.json"))
    assert json.loads((workdir / "result.json").read_text()) == result
    needed = {"dataset", "teacher", "student", "seed", "steps", "teacher_test_accuracy", "test_accuracy_last"}
    assert needed | {"test_accuracy_best", "config", "versions", "commit", "timing"} <= result.keys()
    assert result["not_converged_steps"] == {}
    assert {"train_seconds", "teacher_seconds", "images_per_second"} <= result["timing"].keys()
    assert result["timing"]["train_seconds"] > 0
    assert result["teacher_test_accuracy"] > 0.5
    card = json.loads((workdir / "teacher" / "teacher.json").read_text())
    assert result["teacher_validation_accuracy"] == card["validation_accuracy"] > 0.5


def test_metrics_hold_every_step_once_with_every_term_and_schedule(finished):
    workdir, result = finished
    lines = [line for line in metrics_of(workdir) if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(result["steps"]))
    for line in lines:
        for term in ("ce", "kd", "wasserstein", "gradient"):
            assert {f"{term}/raw", f"{term}/weight", f"{term}/weighted"} <= line.keys()
        parts = sum(line[f"{term}/weighted"] for term in ("ce", "kd", "wasserstein", "gradient"))
        np.testing.assert_allclose(line["loss"], parts, rtol=1e-5)
        curve = np.exp(-5 * np.exp(-8 * line["step"] / result["steps"]))
        np.testing.assert_allclose(line["kd/weight"], curve, rtol=1e-5)
        assert {"kd/temperature", "wasserstein/epsilon", "wasserstein/converged", "learning_rate"} <= line.keys()
        assert {"accuracy", "agreement", "gradient_norm"} <= line.keys()
    held_out = [line for line in metrics_of(workdir) if line["split"] == "validation"]
    assert held_out[-1]["step"] == result["steps"]
    assert max(line["accuracy"] for line in held_out) == result["best_validation_accuracy"]


def test_equal_seeds_of_teacher_and_student_give_different_weights_and_batches(finished):
    """Also where both are the same network: nothing they have in common may come from the random numbers."""
    workdir, result = finished
    assert result["seed"] == result["config"]["teacher"]["seed"]
    dataset = load("digits", validation=100)
    spec = result["config"]["student"]
    seeds = result["seed"], loop.student_seed(result["seed"])
    params = [loop.network_from(spec, dataset, seed=seed).params for seed in seeds]
    kernels = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(p) if leaf.ndim == 4]) for p in params]
    assert abs(np.corrcoef(*kernels)[0, 1]) < 0.05
    losses = [metrics_of(directory)[0]["ce/raw"] for directory in (workdir, workdir / "teacher")]
    assert losses[0] != losses[1]


def test_an_exchanged_teacher_is_refused_on_resume(finished, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir / "teacher", tmp_path / "teacher")
    changes = {"teacher.dir": str(tmp_path / "teacher"), "recipe.epochs": 1, "teacher.cache.views": 2}
    loop.train_and_evaluate(small_config(**changes), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    network, card = load_network(tmp_path / "teacher"), json.loads((tmp_path / "teacher" / "network.json").read_text())
    shutil.rmtree(tmp_path / "teacher" / "network")
    other = network.replace(params=jax.tree.map(lambda leaf: leaf * np.float32(1.0001), network.params))
    save_network(tmp_path / "teacher", other, card)
    stored = {path: path.read_bytes() for path in (tmp_path / "run" / "outputs").rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="the teacher is not the one"):
        loop.train_and_evaluate(small_config(**changes), tmp_path / "run")
    assert stored and all(path.read_bytes() == content for path, content in stored.items())


def test_a_finished_run_is_shown_and_not_repeated(finished, capsys):
    workdir, result = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    assert loop.train_and_evaluate(run_config(), workdir) == result
    assert "test accuracy" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == before


def test_another_config_is_refused_with_the_keys_that_differ(finished):
    workdir, _ = finished
    with pytest.raises(RunError, match=re.escape("recipe.epochs: 2 -> 4; seed: 0 -> 1")):
        loop.train_and_evaluate(run_config(**{"seed": 1, "recipe.epochs": 4}), workdir)


def test_a_trained_network_teaches_another_run(finished, tmp_path, capsys):
    """From the workdir of a run (its student) or from its teacher's; the same seed gives the same student."""
    workdir, result = finished
    again = loop.train_and_evaluate(run_config(**{"teacher.dir": str(workdir / "teacher")}), tmp_path / "a")
    assert again["test_accuracy_last"] == result["test_accuracy_last"]
    # The same bits twice in one process; tests/test_reliability.py compares two.
    networks = [load_network(directory) for directory in (workdir, tmp_path / "a")]
    jax.tree.map(np.testing.assert_array_equal, *((network.params, network.stats) for network in networks))
    assert metrics_of(tmp_path / "a") == metrics_of(workdir)
    changes = {"teacher.dir": str(workdir), "data.validation": 0, "recipe.moving_average": 0.9, "recipe.epochs": 1}
    student = loop.train_and_evaluate(small_config(**changes), tmp_path / "b")
    assert student["teacher_test_accuracy"] == result["test_accuracy_best"]
    assert student["test_accuracy_best"] is None
    assert student["evaluated_weights"] == "moving average"
    # No image was held out, so nothing is known of the teacher but what it says of images it was trained on.
    assert student["teacher_validation_accuracy"] is None and result["teacher_validation_accuracy"] > 0
    assert "on training images, as none are held out" in capsys.readouterr().out


def test_a_student_alone_needs_no_teacher_and_a_batch_must_fit_the_data(tmp_path):
    alone = loop.train_and_evaluate(
        small_config(**{"objective.terms.kd.weight": "0", "recipe.epochs": 1}), tmp_path / "alone"
    )
    assert alone["teacher"] is alone["teacher_test_accuracy"] is None
    assert not (tmp_path / "alone" / "teacher").exists()
    assert "kd/raw" not in metrics_of(tmp_path / "alone")[0]
    with pytest.raises(RunError, match=r"recipe\.batch_size = 5000 exceeds the 1,338 training images: take 1338"):
        loop.train_and_evaluate(run_config(**{"recipe.batch_size": 5000}), tmp_path / "large")
    with pytest.raises(RunError, match=r"augment\.padding = 8: a crop may miss an image of 8 pixels altogether"):
        loop.train_and_evaluate(run_config(**{"augment.padding": 8}), tmp_path / "padded")


def test_a_loss_that_blows_up_stops_the_run_and_is_not_saved(finished, tmp_path):
    workdir, _ = finished
    (tmp_path / "config.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from helpers import small_config\n"
        "def get_config():\n"
        f"    return small_config(**{{'teacher.dir': {str(workdir / 'teacher')!r}, 'recipe.warmup_epochs': 0.0}})\n"
    )
    done = train(
        "--config", tmp_path / "config.py", "--workdir", tmp_path / "run", "--config.recipe.learning_rate=1e30"
    )
    assert done.returncode == 1
    assert re.search(r"error: the (term '\w+'|gradient|update) was not finite at step \d+", done.stderr)
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert None in metrics_of(tmp_path / "run")[-1].values()  # the failing step itself is on record, and nothing after
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(len(metrics_of(tmp_path / "run"))))


def test_a_workdir_that_cannot_be_written_is_refused_before_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        loop.train_and_evaluate(run_config(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.recipe.epoch=3"], "there is no key 'epoch'; did you mean 'epochs'?"),
        (["--config.recipe.epochs=many"], "error: --config.recipe.epochs=many: must be an integer"),
        (
            ["--config.objective.terms.kd.other=1"],
            "there is no key 'other'; the command line changes keys of the config file, new ones go into the file",
        ),
        (["--config.objective.terms.other.weight=1"], "error: --config: there is no key 'other'; the command line"),
        (["--config.objective.terms.kd.temperature=0"], "must stay above 0"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config=nowhere.py"], "there is no file nowhere.py"),
        (
            [f"--config={ROOT}/configs/digits.py:foo", "--config.seed=3"],
            "configs/digits.py takes no variant, got ':foo'",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_one_clear_line(tmp_path, arguments, message):
    done = train("--config", ROOT / "configs/digits.py", "--workdir", tmp_path / "run", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_result_says_of_each_network_what_it_does_on_the_test_images_read_once(tmp_path, monkeypatch):
    config, data = small_config(), load("digits", validation=100)
    seeds = (("student", 1), ("student", 2), ("teacher", 5))
    last, best, taught = (loop.network_from(config[role].to_dict(), data, seed=seed) for role, seed in seeds)
    reads, read = [], Dataset.test
    monkeypatch.setattr(Dataset, "test", lambda self: reads.append(1) or read(self))
    monkeypatch.setattr(loop, "obtain_teacher", lambda *_: teacher.Teacher(taught, "it", 0.5, 1.0))
    monkeypatch.setattr(feed, "PART", 100)  # the test images come in four parts

    def fitted(*_, **__):
        assert not reads
        return fit.Fitted(last, best, 0.25, 27, 9.0, 5.0, {"kd": 3})

    monkeypatch.setattr(loop, "fit", fitted)
    result, test = loop.train_and_evaluate(config, tmp_path), read(data)
    images = jnp.asarray(test.images / 255.0, jnp.float32)
    a, b, t = (np.asarray(net.forward(images, train=False)[0].logits).argmax(-1) for net in (last, best, taught))
    expected = {
        "test_accuracy_last": (a == test.labels).mean(),
        "test_accuracy_best": (b == test.labels).mean(),
        "teacher_test_accuracy": (t == test.labels).mean(),
        "test_agreement_last": (a == t).mean(),
    }
    assert len({*expected.values(), (b == t).mean()}) == 5  # or a mix-up would not be seen
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    assert reads == [1] and (result["best_validation_accuracy"], result["best_step"]) == (0.25, 27)
    assert result["not_converged_steps"] == {"kd": 3}
    jax.tree.map(np.testing.assert_array_equal, load_network(tmp_path).params, best.params)


def test_the_teacher_is_its_best_network_and_a_student_may_begin_as_a_whole_one(tmp_path, monkeypatch):
    config, dataset = small_config(), load("digits", validation=100)
    spec, shift = config.teacher.to_dict(), lambda leaf: leaf + np.float32(0.5)
    last = loop.network_from(spec, dataset, seed=1)
    best = last.replace(params=jax.tree.map(shift, last.params), stats=jax.tree.map(shift, last.stats))
    monkeypatch.setattr(teacher, "fit", lambda *_, **__: fit.Fitted(last, best, 0.25, 27, 9.0, 5.0, {}))
    images = feed.Images.of(dataset, config.data, data_mesh())
    arguments = dataset, images, tmp_path, data_mesh(), Stop()
    trained, _ = teacher.train_teacher(config, frozen(config), *arguments)
    begun = loop.init_from(tmp_path, last)
    for network in (trained, begun):
        jax.tree.map(np.testing.assert_array_equal, (network.params, network.stats), (best.params, best.stats))
    card = json.loads((tmp_path / "teacher.json").read_text())
    assert (card["selected_step"], card["validation_accuracy"]) == (27, 0.25)


def test_the_teachers_own_recipe_smooths_its_own_labels(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def reached(*_, objective, **__):
        (term,) = objective.terms
        assert term.loss.keywords == {"label_smoothing": 0.3}
        raise Reached

    monkeypatch.setattr(teacher, "fit", reached)
    with pytest.raises(Reached):
        loop.train_and_evaluate(small_config(**{"teacher.recipe.label_smoothing": 0.3}), tmp_path)
