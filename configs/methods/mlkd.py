"""Multi-level logit distillation, MLKD (Jin, Wang and Lin, CVPR 2023).

    python train.py --config configs/methods/mlkd.py[:cifar100]

Published on cifar100: 77.08 % (see `configs/methods/base.py`), at learning rate 0.025 and with a second, strongly
augmented view of each image, which this does not have. The cross-entropy's weight is 0.1, as in the authors' code.
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    config = add(start(base), "instance", "multi_temperature")
    config = add(config, "batch", "batch_correlation")
    config = add(config, "class", "class_correlation")
    config.objective.terms.ce.weight = "0.1"
    return config
