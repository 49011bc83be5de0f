"""Soft targets (Hinton, Vinyals and Dean, 2015, https://arxiv.org/abs/1503.02531).

    python train.py --config configs/methods/kd.py[:cifar100]

Published on cifar100: 73.33 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    config = add(start(base), "kd", "soft_targets", temperature="4")
    config.objective.terms.ce.weight = "0.1"
    return config
