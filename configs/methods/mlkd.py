"""Multi-level logit distillation, MLKD (Jin, Wang and Lin, CVPR 2023).

    python train.py --config configs/methods/mlkd.py[:cifar100]

Published on cifar100: 77.08 % (see `configs/methods/base.py`), at learning rate 0.025 and with a second, strongly
augmented view of each image, which this does not have.
"""

from configs.methods.base import add, start


def get_config(base: str = "digits"):
    config = add(start(base), "instance", "multi_temperature")
    config = add(config, "batch", "batch_correlation")
    return add(config, "class", "class_correlation")
