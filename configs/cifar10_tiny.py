"""ResNet-20 -> ResNet-8 on a fifth of CIFAR-10 at half its resolution: comparisons of many students on two CPU cores.

    python train.py --config configs/cifar10_tiny.py [--config.data.data_dir=DIR]
    gompertz-jax compare --config configs/cifar10_tiny.py --seeds 10 --workdir WORKDIR [--config.data.data_dir=DIR]

10,000 training images, drawn by the data's seed, brought to 16x16; teacher and student see the same ones. The test set
is whole, at 16x16 too. docs/results.md is made with it. What holds here need not hold at full size.
"""

from gompertz_jax.training.config import get_default


def get_config():
    config = get_default()
    config.data.name = "cifar10"
    config.data.image_size = 16
    config.data.train_images = 10_000
    config.augment.padding = 2
    config.teacher.model = "resnet20"
    config.teacher.min_accuracy = 0.6
    config.student.model = "resnet8"
    config.objective.terms.gradient.pool = 2  # 4x4 windows of a 32x32 image are 2x2 of these
    for recipe, epochs in ((config.teacher.recipe, 30), (config.recipe, 8)):
        recipe.epochs = epochs
        recipe.batch_size = 64
        recipe.learning_rate = 0.05
        recipe.warmup_epochs = 0.5
    config.evaluate_every_epochs = 2
    return config
