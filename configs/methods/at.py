"""Attention transfer, AT (Zagoruyko and Komodakis, 2017, https://arxiv.org/abs/1612.03928).

    python train.py --config configs/methods/at.py[:cifar100]

Published on cifar100: 73.44 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "at", "attention_transfer")
