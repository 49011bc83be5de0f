"""Decoupled knowledge distillation, DKD (Zhao et al., 2022, https://arxiv.org/abs/2203.08679).

    python train.py --config configs/methods/dkd.py[:cifar100]

Published on cifar100: 76.32 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "dkd", "decoupled", alpha=1.0, beta=8.0, temperature="4")
