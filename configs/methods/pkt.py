"""Probabilistic knowledge transfer, PKT (Passalis and Tefas, 2018, https://arxiv.org/abs/1803.10837).

    python train.py --config configs/methods/pkt.py[:cifar100]

Published on cifar100: 73.64 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "pkt", "probabilistic_transfer")
