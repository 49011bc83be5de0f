"""Stochastic Sobolev training (Czarnecki et al., 2017, https://arxiv.org/abs/1706.04859).

python train.py --config configs/methods/sobolev.py[:cifar100]
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "sobolev", "sobolev")
