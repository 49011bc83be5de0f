"""ResNet-20 -> ResNet-8 on CIFAR-10, for two CPU cores or a coffee break on a GPU.

python train.py --config configs/cifar10_small.py [--config.data.data_dir=DIR]
"""

from gompertz_jax.training.config import get_default


def get_config():
    config = get_default()
    config.data.name = "cifar10"
    config.teacher.model = "resnet20"
    config.teacher.min_accuracy = 0.7
    config.student.model = "resnet8"
    for recipe in (config.teacher.recipe, config.recipe):
        recipe.epochs = 10
        recipe.batch_size = 128
        recipe.learning_rate = 0.1
        recipe.warmup_epochs = 0.5
    return config
