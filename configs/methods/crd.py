"""Contrastive representation distillation, CRD, in its in-batch form (Tian et al., 2020, https://arxiv.org/abs/1910.10699).

    python train.py --config configs/methods/crd.py[:cifar100]

Published on cifar100: 75.51 % with 16,384 negatives for each image, drawn from a memory bank of the whole
training set (see `configs/methods/base.py`).
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "crd", "contrastive_representation")
