"""The published losses as configs: each is described before it starts, and trains a student, all in one program."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT, smallest_networks, train

import gompertz_jax as gj
from gompertz_jax.network import output_shapes
from gompertz_jax.projections import measure_teacher
from gompertz_jax.training import preflight
from gompertz_jax.training.objectives import LOSSES, build_objective

METHODS = sorted(path.stem for path in (ROOT / "configs" / "methods").glob("*.py") if path.stem != "base")
SHAPE, BATCH = (8, 8, 3), 8


def config_of(method):
    return importlib.import_module(f"configs.methods.{method}").get_config()


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@functools.cache
def shapes(name):
    network = jax.eval_shape(lambda: gj.models.create(name, num_classes=10, key=jax.random.key(0)))
    return output_shapes(network, (32, 32, 3), batch_size=BATCH)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_matched_and_how_is_told_before_the_start(method):
    """On ResNet-50 -> MobileNetV2, where channels, heights and widths all differ."""
    theirs, ours = shapes("resnet50"), shapes("mobilenetv2")
    objective = build_objective(config_of(method), 240)
    preflight.check_projections(objective, ours, theirs)
    preflight.check_terms(objective, ours, theirs, (32, 32, 3))
    matched = list(preflight.matches(objective, ours, theirs))
    for term in objective.terms:
        bridged = term.bridge or "projection" in term.loss.keywords
        assert bool(bridged) == any(line.startswith(f"{term.name}: ") for line in matched), term.name
    expected = {
        "at": "12@16 -> 256@32, 16@8 -> 512@16, 48@4 -> 1024@8, 160@2 -> 2048@4; channels summed",
        "fitnet": "hint: 16@8 -> 512@16 by projection 'hint' (4x4 transposed convolution at stride 2",
        "wkd_f": "1280@2 -> 2048@4 by projection 'width' (1x1 convolution, sizes kept",
        "sp": "sp: 1280@2 -> 2048@4; similarities between images",
        "crd": "pooled vectors of 1280 and 2048 by affine maps to 128",
    }
    assert expected.get(method, "") in "\n".join(matched)


def test_the_page_of_losses_names_them_all():
    page = (ROOT / "docs" / "losses.md").read_text()
    for name in LOSSES:
        assert name == "cross_entropy" or f"`{name}`" in page, name


def every_term():
    """All terms of all methods as one objective; at step n only the n-th counts."""
    listed, projections = [], {}
    for method in METHODS:
        objective = build_objective(config_of(method), 240)
        projections |= objective.projections
        listed += [(f"{method}_{term.name}", term) for term in objective.terms if term.name != "ce"]
    count = len(listed)

    def only_at(index):
        return lambda step: jnp.where(step % count == index, 1.0, 0.0)

    terms = tuple(term._replace(name=name, weight=only_at(index)) for index, (name, term) in enumerate(listed))
    return gj.Objective(terms, projections)


def test_every_term_of_every_method_trains_the_student_and_nothing_is_infinite():
    objective = every_term()
    names = smallest_networks()
    student, teacher = (
        gj.models.create(name, num_classes=10, key=jax.random.key(index)) for index, name in enumerate(names)
    )
    for name in names:
        del gj.models._RECIPES[name]
    # two stages after the stem are what hints and reviews are taken at; these networks have one
    hint = objective.projections["hint"]._replace(student_stage=1, teacher_stage=1)
    objective = objective._replace(projections={**objective.projections, "hint": hint})
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.uniform(size=(BATCH, *SHAPE)), jnp.float32),
        "label": jnp.asarray(np.arange(BATCH) % 10, jnp.int32),
    }
    optimizer = optax.sgd(1e-3)
    state = gj.init_state(student, optimizer, objective, SHAPE, teacher=teacher)
    outputs, _ = teacher.forward(batch["image"], train=False)
    stats = measure_teacher(objective.projections, state.projection_stats, [(outputs, batch["label"])])
    state = state._replace(projection_stats=stats)
    step = gj.make_train_step(student, optimizer, objective)
    for term in objective.terms:
        before = jax.tree.map(np.asarray, state.params)
        state, metrics = step(state, teacher, batch)
        assert metrics["failed_term"][0] == -1, term.name
        assert np.isfinite(metrics[f"{term.name}/raw"]).all(), term.name
        moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, state.params, before))
        assert 0 < moved < 1e3, f"{term.name} moved the student by {moved}"


def test_data_that_a_method_does_not_know_is_one_line():
    run = train(f"--config={ROOT / 'configs' / 'methods' / 'crd.py'}:mnist")
    assert run.returncode == 1
    assert run.stderr == "error: --config: a method runs on digits or cifar100, got 'mnist'\n"
