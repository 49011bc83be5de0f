"""The arms of a comparison as data: named changes of a config's objective.

An arm keeps some of the config's distillation terms and changes the curve that stands over them. `{curve}` is the
config's own. A new arm is one more entry of `ARMS`; an arm that is more than that is a config of its own.
"""

from collections.abc import Mapping
from typing import NamedTuple

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
