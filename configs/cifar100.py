"""The reference experiment on CIFAR-100: ResNet-50 -> MobileNetV2 (width 0.5), 240 epochs.

    python train.py --config configs/cifar100.py [--config.data.data_dir=DIR]

Everything but the data set and the teacher's floor is that of `configs/cifar10.py`.
"""

from configs import cifar10


def get_config():
    config = cifar10.get_config()
    config.data.name = "cifar100"
    config.teacher.min_accuracy = 0.65
    return config
