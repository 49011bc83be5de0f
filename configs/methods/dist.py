"""Correlations instead of divergences, DIST (Huang et al., 2022, https://arxiv.org/abs/2205.10536).

python train.py --config configs/methods/dist.py[:cifar100]
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    config = add(start(base), "inter", "interclass_correlation")
    return add(config, "intra", "intraclass_correlation")
