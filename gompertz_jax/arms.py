"""The arms of a comparison: named changes of a config's objective, as data, and the config that each makes.

An arm keeps some of the config's distillation terms and changes the curve over them. `{curve}` is the config's own. A
new arm is one more entry of `ARMS`; an arm that changes more is a separate config.
"""

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

from .training.config import Config
from .training.errors import RunError
from .training.objectives import switched_off

STUDENT = "student"  # the arm without a teacher, which every comparison has

SCORES = frozenset(
    {
        "soft_targets",
        "decoupled",
        "multi_temperature",
        "batch_correlation",
        "class_correlation",
        "interclass_correlation",
        "intraclass_correlation",
        "wasserstein_logits",
        "target_cross_entropy",
    }
)
TRANSPORT = frozenset({"wasserstein", "gaussian", "wasserstein_features"})
GRADIENTS = frozenset({"gradient_match", "jacobian", "sobolev", "gradient_attention"})


class Arm(NamedTuple):
    """One arm.

    Attributes:
      about: what it is, for tables.
      keeps: the losses whose terms it keeps besides the cross-entropy, of those that the config has; None for all.
      curve: the text of the curve.
      cross_entropy: the text of the cross-entropy's weight; "" for the config's.
      scores: the text of the weight of the terms on class scores; "" for the config's.
    """

    about: str
    keeps: frozenset[str] | None
    curve: str = "{curve}"
    cross_entropy: str = ""
    scores: str = ""


_CURVES = {
    "constant": ("at full weight throughout", "1"),
    "matched": ("at the constant weight of the curve's mean", "matched({curve})"),
    "matched_lr": ("at the constant weight of the curve's mean, weighted by the learning rate", "matched_lr({curve})"),
    "linear": ("under a line from 0 to 1", "linear(start=0, end=1)"),
    "cosine": ("under half a cosine from 0 to 1", "cosine(start=0, end=1)"),
    "decay": ("under half a cosine from 1 to 0", "cosine(start=1, end=0)"),
    "logistic": ("under a logistic curve", "logistic()"),
    "reversed": ("under the curve in reverse", "reversed({curve})"),
    "progress": ("under the curve, read at the student's progress", "progress({curve})"),
}

ARMS: Mapping[str, Arm] = {
    "student": Arm("the student alone", frozenset()),
    "kd": Arm("soft targets at their published weights, 0.1 CE + 0.9 KD", SCORES, "1", "0.1", "0.9"),
    **{name: Arm(f"soft targets {about}", SCORES, curve) for name, (about, curve) in _CURVES.items()},
    "gompertz": Arm("soft targets under the config's curve", SCORES),
    "budget": Arm(
        "soft targets, the weights' sum fixed: (1 - 0.9 G) CE + 0.9 G KD",
        SCORES,
        cross_entropy="1 - 0.9 * curve",
        scores="0.9 * curve",
    ),
    "transport": Arm("soft targets and transport under the curve", SCORES | TRANSPORT),
    "gradients": Arm("soft targets and gradient matching under the curve", SCORES | GRADIENTS),
    "full": Arm("all terms under the curve", None),
    **{f"full_{name}": Arm(f"all terms {about}", None, curve) for name, (about, curve) in _CURVES.items()},
}


def arm(config: Config, name: str) -> Config:
    """The config with the objective of an arm of `ARMS`.

    Raises:
      RunError: there is no such arm, or the config's objective lacks what it needs.
    """
    if name not in ARMS:
        raise RunError(
            f"the arm {name!r} is unknown; there are {', '.join(ARMS)}, and NAME=FILE, of a config of its own"
        )
    changed = config.copy_and_resolve_references()
    with changed.ignore_type():  # a weight may be a text or a number
        _change(changed.objective, name, ARMS[name])
    return changed


def about(config: Config, name: str, of_arm: Config) -> str:
    """What an arm is, in words; a separate config may have the name of a known arm and be something else."""
    with contextlib.suppress(RunError):
        if arm(config, name).objective == of_arm.objective:
            return ARMS[name].about
    return "an objective of its own"


def with_student(config: Config, arms: Mapping[str, Config]) -> dict[str, Config]:
    """The arms and, first, the student alone, if it is not among them."""
    return dict(arms) if STUDENT in arms else {STUDENT: arm(config, STUDENT), **arms}


def _change(objective: Config, name: str, change: Arm) -> None:
    """Change an objective to that of an arm."""
    terms, own = objective.terms, objective.curve
    for key in list(terms):
        loss = terms[key].loss
        if loss == "cross_entropy":
            if change.cross_entropy:
                terms[key].weight = change.cross_entropy
        elif (change.keeps is not None and loss not in change.keeps) or switched_off(terms[key].to_dict()):
            del terms[key]
        elif loss in SCORES and change.scores:
            terms[key].weight = change.scores
    kept = {spec.loss for spec in terms.values()}
    for family, what in ((SCORES, "class scores"), (TRANSPORT, "transport"), (GRADIENTS, "gradients")):
        if change.keeps is not None and family & change.keeps and not family & kept:
            raise RunError(f"the arm {name!r} keeps terms of {what}; the config's objective has none, or at weight 0")
    scores = [key for key, spec in terms.items() if spec.loss in SCORES]
    if change.scores and len(scores) > 1:
        raise RunError(
            f"the arm {name!r} shares one weight between the cross-entropy and one term on class scores, and there are "
            f"{len(scores)}: {', '.join(scores)}; leave the arm out, or give it a config of its own"
        )
    if name.split("_")[-1] == "gompertz" and "gompertz" not in own:
        raise RunError(f"the arm {name!r} is one under objective.curve = {own!r}, which is no Gompertz curve")
    objective.curve = change.curve.format(curve=own)
