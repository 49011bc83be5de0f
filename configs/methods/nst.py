"""Neuron selectivity transfer, NST (Huang and Wang, 2017, https://arxiv.org/abs/1707.01219).

    python train.py --config configs/methods/nst.py[:cifar100]

Published on cifar100: 73.30 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "nst", "neuron_selectivity")
