"""Relational distillation, RKD (Park et al., 2019, https://arxiv.org/abs/1904.05068).

    python train.py --config configs/methods/rkd.py[:cifar100]

Published on cifar100: 71.90 % (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    config = add(start(base), "distance", "relational_distance")
    return add(config, "angle", "relational_angle")
