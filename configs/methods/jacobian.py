"""Jacobian matching (Srinivas and Fleuret, 2018, https://arxiv.org/abs/1803.00443).

python train.py --config configs/methods/jacobian.py[:cifar100]
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "jacobian", "jacobian")
