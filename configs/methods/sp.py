"""Similarity-preserving distillation, SP (Tung and Mori, 2019, https://arxiv.org/abs/1907.09682).

    python train.py --config configs/methods/sp.py[:cifar100]

Published on cifar100: 72.94 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "sp", "similarity_preserving")
