"""Variational information distillation, VID (Ahn et al., 2019, https://arxiv.org/abs/1904.05835).

    python train.py --config configs/methods/vid.py[:cifar100]

Published on cifar100: 73.09 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "vid", "variational_information")
