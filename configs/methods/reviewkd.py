"""Knowledge review, ReviewKD (Chen et al., 2021, https://arxiv.org/abs/2104.09044).

    python train.py --config configs/methods/reviewkd.py[:cifar100]

Published on cifar100: 75.63 % (see `configs/methods/base.py`), with the teacher's maps before their last ReLU; here
both networks' maps are after it.
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "review", "review")
