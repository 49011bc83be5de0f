"""Gradient-based attention transfer (Zagoruyko and Komodakis, 2017, https://arxiv.org/abs/1612.03928).

python train.py --config configs/methods/gradient_attention.py[:cifar100]

The paper gives no weight for it; 1 is ours.
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "gradient", "gradient_attention", weight="1")
