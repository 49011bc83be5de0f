"""Gaussian Wasserstein distance between maps, WKD-F (Lv, Yang and Li, 2024, https://arxiv.org/abs/2412.08139).

python train.py --config configs/methods/wkd_f.py[:cifar100]

The weight is from a copy of the authors' code, whose own repository could not be read (`wasserstein_gaussians`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "wkd", "wasserstein_features")
