"""Correlation congruence, CC (Peng et al., 2019, https://arxiv.org/abs/1904.01802).

    python train.py --config configs/methods/cc.py[:cifar100]

Published on cifar100: 72.97 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "cc", "correlation_congruence")
