"""Configs: schedules in text, the objective they describe, and each refusal."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import gompertz_jax as gj
from gompertz_jax.training import config as room
from gompertz_jax.training.errors import RunError

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.py"))


def config_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", lambda n: 2.0),
        ("0.25", lambda n: 0.25),
        ("-1", lambda n: -1.0),
        ("linear(start=8, end=2)", lambda n: 8 - 6 * n / 40),
        ("0.5 * curve", lambda n: 0.5 * (n / 40)),
        ("cosine(start=1, end=0)", lambda n: 0.5 * (1 + np.cos(np.pi * n / 40))),
        ("gompertz(displacement=5, rate=8)", lambda n: np.exp(-5 * np.exp(-8 * n / 40))),
        ("logistic(midpoint=0.5, rate=10)", lambda n: 1 / (1 + np.exp(-10 * (n / 40 - 0.5)))),
        ("reversed(curve)", lambda n: (39 - n) / 40),
        ("2 * matched(curve)", lambda n: 2 * np.mean(np.arange(40) / 40)),
        ("gompertz_through(inflection=0.2)", None),
    ],
)
def test_schedules_in_text(text, expected):
    curve = gj.linear_schedule(40)
    schedule = room.parse_schedule(text, 40, curve=curve)
    expected = expected or gj.gompertz_through(40, inflection=0.2)
    for n in (0, 7, 39):
        np.testing.assert_allclose(schedule(n), expected(n), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gompertz",
        "gompertz(8)",
        "gompertz(slope=3)",
        "__import__('os')",
        "1 +",
        "1 + 2",
        "gompertz(rate=-1)",
        "curve",
        "linear(start=open('x'))",
    ],
)
def test_text_that_is_no_schedule_is_refused_with_its_key(text):
    with pytest.raises(RunError, match=r"recipe\.thing"):
        room.parse_schedule(text, 40, where="recipe.thing")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_whole_and_documented(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent.parent))
    config = config_of(path)
    room.check(config)
    objective = room.build_objective(config, 1000)
    assert [term.name for term in objective.terms] == ["ce", "gradient", "kd", "wasserstein"]
    assert f"python train.py --config configs/{path.name}" in path.read_text()


def test_objective_of_a_config_carries_weights_schedules_and_projections():
    config = room.get_default()
    config.objective.curve = "linear()"
    config.objective.terms.kd.weight = "3 * curve"
    config.objective.terms.kd.temperature = "linear(start=8, end=2)"
    config.objective.terms.gradient.weight = "0"
    config.objective.terms.wasserstein.epsilon = "0.1"
    config.objective.terms.wasserstein.every_k_steps = 3
    config.recipe.label_smoothing = 0.1
    objective = room.build_objective(config, 10)
    terms = {term.name: term for term in objective.terms}
    assert set(terms) == {"ce", "kd", "wasserstein"}
    np.testing.assert_allclose(terms["kd"].weight(5), 1.5)
    np.testing.assert_allclose(terms["kd"].schedules["temperature"](5), 5.0)
    np.testing.assert_allclose(terms["wasserstein"].schedules["epsilon"](5), 0.1, rtol=1e-6)
    assert [terms[name].every_k_steps for name in ("ce", "kd", "wasserstein")] == [1, 1, 3]
    assert terms["ce"].loss.keywords == {"label_smoothing": 0.1}
    assert objective.projections == {"last": gj.Projection(-1, -1)}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("objective.terms.kd.temperature", "linear(start=4, end=-1)", "objective.terms.kd.temperature"),
        ("objective.terms.kd.temperature", "-1", "must stay above 0"),
        ("objective.terms.wasserstein.epsilon", "0", "must stay above 0"),
        ("objective.terms.kd.loss", "soft_target", "soft_targets"),
        ("objective.terms.gradient.kind_", "l2", "is no option of gradient_match"),
        ("objective.terms.wasserstein.projection", "middle", "not among objective.projections"),
        ("objective.curve", "gompertz(displacement=-2)", "displacement"),
        ("objective.curve", "gompertz(rate=x)", "must be numbers"),
        ("objective.projections.last", {"student": -1}, "must have the integers"),
        ("objective.terms.extra", 3, "must be a group of keys"),
        ("objective.terms.gradient.every_k_steps", 0, "every_k_steps = 0 must be a whole number of at least 1"),
        ("objective.terms.kd.every_k_steps", 1.5, "every_k_steps = 1.5 must be a whole number"),
        ("objective.terms.ce.every_k_steps", 2, "the cross-entropy is computed at every step"),
    ],
)
def test_objectives_that_cannot_be_are_refused(key, value, message):
    config = room.get_default()
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    with node.unlocked():
        node[last] = value
    with pytest.raises(RunError, match=message):
        room.build_objective(config, 100)


def test_an_objective_of_nothing_is_refused():
    config = room.get_default()
    for term in config.objective.terms.values():
        term.weight = "0"
    with pytest.raises(RunError, match="nothing to learn"):
        room.build_objective(config, 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.model": "resnet21"}, "student.model = 'resnet21'"),
        ({"teacher.model": "vgg"}, "teacher.model = 'vgg'"),
        ({"student.dtype": "float16"}, "student.dtype"),
        ({"recipe.epochs": 0}, "recipe.epochs = 0"),
        ({"recipe.decay": "step"}, "recipe.decay"),
        ({"recipe.decay": "multistep", "recipe.epochs": 100}, "lie beyond training, which has 100 epochs"),
        ({"recipe.decay": "multistep", "recipe.boundaries": (180, 150)}, "must increase"),
        ({"recipe.warmup_epochs": 300.0}, "recipe.warmup_epochs"),
        ({"teacher.recipe.momentum": 1.0}, "teacher.recipe.momentum"),
        ({"teacher.min_accuracy": 93.0}, "is a fraction"),
        ({"steps_per_dispatch": 0}, "steps_per_dispatch = 0"),
        ({"augment.padding": -1}, "augment.padding"),
        ({"data.name": "cifar"}, "data.name = 'cifar'"),
        ({"recipe.weight_decay": float("inf")}, "recipe.weight_decay = inf: must be finite"),
        ({"recipe.projection_rate": -1.0}, "recipe.projection_rate"),
        ({"seed": -1}, "seed = -1"),
        ({"logging.term_gradients": -1}, "logging.term_gradients"),
        ({"objective.curve": "gompetz()"}, "objective.curve"),
        ({"objective.skip_below": -0.1}, "objective.skip_below = -0.1"),
        ({"data.placement": "gpu"}, "data.placement = 'gpu': must be auto, device or host"),
        ({"data.device_fraction": 25.0}, "data.device_fraction = 25.0: is a fraction"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes, message):
    config = room.get_default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(RunError, match=message):
        room.check(config)


def test_unknown_keys_and_other_types_are_refused():
    config = room.get_default()
    with pytest.raises(AttributeError, match='Did you mean "epochs"'):
        config.recipe.epoch = 3
    with pytest.raises(TypeError):
        config.seed = "one"


def test_differing_keys_are_listed_without_those_that_may_change():
    old = {"seed": 0, "recipe": {"epochs": 1}, "logging": {"every_steps": 1}, "data": {"data_dir": "a", "name": "x"}}
    new = {"seed": 1, "recipe": {"epochs": 1}, "logging": {"every_steps": 5}, "data": {"data_dir": "b", "name": "y"}}
    assert room.differing_keys(old, new) == ["data.name: 'x' -> 'y'", "seed: 0 -> 1"]
