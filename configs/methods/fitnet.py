"""Hints, FitNet (Romero et al., 2015, https://arxiv.org/abs/1412.6550).

    python train.py --config configs/methods/fitnet.py[:cifar100]

Published on cifar100: 73.50 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "hint", "hint")
