"""What the configs of published losses start from: data, a pair of networks and a recipe, with cross-entropy alone.

    python train.py --config configs/methods/NAME.py             # digits: a minute or two on two CPU cores
    python train.py --config configs/methods/NAME.py:cifar100    # the field's table; meant for an accelerator

`cifar100` is ResNet-32x4 -> ResNet-8x4, 240 epochs, batch 64, learning rate 0.05 times 0.1 at 150, 180 and 210, weight
decay 5e-4 (Tian, Krishnan, Isola, 2020, https://arxiv.org/abs/1910.10699), but for Nesterov's momentum and 5,000
held-out images (`docs/coming_from.md` has the flags that undo both); on it the teacher is published at 79.42 %, the
student alone at 72.50 %. Weights are as published: constant, but for DKD's and ReviewKD's, which rise at first, and
those of WKD-L and WKD-F, which fall at the end; under the Gompertz curve they are, for instance,
`--config.objective.terms.at.weight='1000 * curve'`.
"""

from ml_collections import ConfigDict

from configs import cifar100, digits
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.objectives import LOSSES


def start(base: str):
    if base == "digits":
        config = digits.get_config()
    elif base == "cifar100":
        config = cifar100.get_config()
        config.teacher.model, config.student.model = "resnet32x4", "resnet8x4"
        config.recipe.learning_rate = 0.05
    else:
        raise RunError(f"a method runs on digits or cifar100, got {base!r}")
    config.objective.terms = ConfigDict({"ce": {"loss": "cross_entropy", "weight": "1"}})
    return config


def add(config, name: str, loss: str, **options):
    """Add a term with the loss's published weight."""
    config.objective.terms[name] = ConfigDict({"loss": loss, "weight": LOSSES[loss].weight, **options})
    return config
