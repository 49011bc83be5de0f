"""Stochastic Sobolev training (Czarnecki et al., 2017, https://arxiv.org/abs/1706.04859).

python train.py --config configs/methods/sobolev.py[:cifar100]

The paper adds it with weight 1 to a loss between the networks' outputs; here it is beside the labels' cross-entropy
alone. `config.objective.terms.kd = {"loss": "soft_targets", "weight": "1", "temperature": "1"}` adds such a loss.
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    return add(start(base), "sobolev", "sobolev")
