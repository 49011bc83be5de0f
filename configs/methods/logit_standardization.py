"""Soft targets of standardised logits (Sun et al., 2024, https://arxiv.org/abs/2403.01427).

python train.py --config configs/methods/logit_standardization.py[:cifar100]
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    config = add(start(base), "kd", "soft_targets", standardize=True, temperature="2")
    config.objective.terms.ce.weight, config.objective.terms.kd.weight = "0.1", "9"
    return config
