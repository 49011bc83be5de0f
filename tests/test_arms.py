"""The arms as data: what each does to the objective of the default config."""

import numpy as np
import pytest

from gompertz_jax.arms import ARMS, arm
from gompertz_jax.training.config import get_default
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.objectives import LOSSES, build_objective, sampled
from gompertz_jax.training.optim import rate_by_step

STEPS = 480


@pytest.fixture(scope="module")
def weights():
    """By arm and term, the weight at every step."""
    return {
        name: {
            term.name: np.float64(sampled(term.weight, STEPS))
            for term in build_objective(arm(get_default(), name), STEPS).terms
        }
        for name in ARMS
    }


def test_every_arm_has_the_terms_that_it_keeps(weights):
    scores, whole = {"ce", "kd"}, {"ce", "kd", "wasserstein", "gradient"}
    others = {"student": {"ce"}, "transport": whole - {"gradient"}, "gradients": whole - {"wasserstein"}}
    for name, terms in weights.items():
        assert set(terms) == others.get(name, whole if name.startswith("full") else scores), name


def test_no_two_arms_are_the_same(weights):
    for name, terms in weights.items():
        for other, those in weights.items():
            same = terms.keys() == those.keys() and all(np.allclose(terms[t], those[t]) for t in terms)
            # Progress is drawn as if it went with the clock.
            assert (
                not same
                or name == other
                or {name, other} <= {"gompertz", "progress"}
                or {name, other} <= {"full", "full_progress"}
            ), (name, other)


def test_controls_have_the_areas_that_they_are_to_have(weights):
    curve, rate = weights["gompertz"]["kd"], np.float64(rate_by_step(get_default().recipe, STEPS)(np.arange(STEPS)))
    for prefix, term, factor in (("", "kd", 1.0), ("full_", "wasserstein", 4.0), ("full_", "gradient", 0.7)):
        of = {name: weights[f"{prefix}{name}"][term] / factor for name in ("matched", "matched_lr", "reversed")}
        np.testing.assert_allclose(of["matched"], curve.mean(), rtol=1e-5)
        np.testing.assert_allclose(of["matched_lr"], (curve * rate).sum() / rate.sum(), rtol=1e-5)
        np.testing.assert_allclose(of["reversed"], curve[::-1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(weights["budget"]["ce"] + weights["budget"]["kd"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights["budget"]["kd"], 0.9 * curve, rtol=1e-5)
    assert set(weights["kd"]["ce"]) == {np.float64(np.float32(0.1))}
    assert set(weights["kd"]["kd"]) == {np.float64(np.float32(0.9))}
    tau = np.arange(STEPS) / STEPS
    half_cosine = (1 - np.cos(np.pi * tau)) / 2
    shapes = {
        "linear": tau, "cosine": half_cosine, "decay": 1 - half_cosine, "logistic": 1 / (1 + np.exp(-10 * (tau - 0.5))),
        "constant": np.ones(STEPS),
    }  # fmt: skip
    for name, expected in shapes.items():
        np.testing.assert_allclose(weights[name]["kd"], expected, rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(weights[f"full_{name}"]["gradient"], 0.7 * expected, rtol=1e-5, atol=1e-7)


def test_an_arm_that_the_config_cannot_give_is_refused():
    with pytest.raises(RunError, match="the arm 'gompert' is unknown; there are student, kd"):
        arm(get_default(), "gompert")
    config = get_default()
    config.objective.curve = "linear()"
    with pytest.raises(RunError, match=r"the arm 'gompertz' is one under objective.curve = 'linear\(\)'"):
        arm(config, "gompertz")
    config.objective.terms.other = {"loss": "intraclass_correlation"}
    for name in ("kd", "budget"):
        with pytest.raises(RunError, match=f"the arm '{name}' shares one weight .* there are 2: kd, other; leave"):
            arm(config, name)
    arm(config, "constant")


def test_weights_may_be_numbers(weights):
    config = get_default()
    with config.ignore_type():
        config.objective.terms.ce.weight = 1
        config.objective.terms.kd.weight = 1.0
    for name in ("kd", "budget", "constant"):
        built = build_objective(arm(config, name), STEPS).terms
        for term in built:
            np.testing.assert_allclose(sampled(term.weight, STEPS), weights[name][term.name], rtol=1e-6)


def test_a_term_that_the_config_switched_off_stays_off(weights):
    """Whether its weight is written as 0 or comes out as 0; only a curve of 0 may be another in another arm."""
    for off in ("0", "0.0", "0 * curve", "curve - curve"):
        config = get_default()
        config.objective.terms.other = {"loss": "decoupled", "weight": off}
        for name in ("kd", "budget", "gompertz", "full"):
            built = build_objective(arm(config, name), STEPS).terms
            assert {term.name for term in built} == set(weights[name]), (name, off)
            for term in built:
                np.testing.assert_allclose(sampled(term.weight, STEPS), weights[name][term.name], rtol=1e-6)
        del config.objective.terms["other"]
        config.objective.terms.kd.weight = off
        with pytest.raises(RunError, match=r"'kd' keeps terms of class scores; .* has none, or at weight 0"):
            arm(config, "kd")
    config = get_default()
    config.objective.curve = "0"
    assert {term.name for term in build_objective(arm(config, "constant"), STEPS).terms} == {"ce", "kd"}
    del config.objective.terms["wasserstein"]
    with pytest.raises(RunError, match="the arm 'transport' keeps terms of transport"):
        arm(config, "transport")


LOGITS = (
    "soft_targets", "decoupled", "multi_temperature", "batch_correlation", "class_correlation",
    "interclass_correlation", "intraclass_correlation", "wasserstein_logits", "target_cross_entropy",
)  # fmt: skip
FAMILIES = {
    "gompertz": LOGITS,
    "transport": (*LOGITS, "wasserstein", "gaussian", "wasserstein_features"),
    "gradients": (*LOGITS, "gradient_match", "jacobian", "sobolev", "gradient_attention"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_arm_keeps_every_loss_of_its_families(name):
    config = get_default()
    for loss in LOSSES:
        config.objective.terms[f"own_{loss}"] = {"loss": loss, "weight": "1"}
    before = config.to_json()
    kept = [spec.loss for key, spec in arm(config, name).objective.terms.items() if key.startswith("own_")]
    assert set(kept) == {"cross_entropy", *FAMILIES[name]}
    assert config.to_json() == before
