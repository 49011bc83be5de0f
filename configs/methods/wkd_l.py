"""Wasserstein distance between class probabilities, WKD-L (Lv, Yang and Li, 2024, https://arxiv.org/abs/2412.08139).

python train.py --config configs/methods/wkd_l.py[:cifar100]

The weight is from copies of the authors' code, and belongs to a loss of 10 iterations with another cost between
classes; here transport runs to convergence, and its pull hardly fades near the teacher (`docs/wasserstein.md`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    config = add(start(base), "target", "target_cross_entropy")
    return add(config, "wkd", "wasserstein_logits")
