"""Handwritten digits of scikit-learn, ResNet-14 -> ResNet-8, the full objective; about a minute on two CPU cores.

    python train.py --config configs/digits.py

1,797 grey images of 8x8 pixels ship with scikit-learn: no download, no accelerator. The teacher is trained first.
"""

from gompertz_jax.training.config import get_default


def get_config():
    config = get_default()
    config.data.name = "digits"
    config.data.validation = 180
    config.augment.padding = 1
    config.augment.flip = False  # a mirrored digit is another sign
    config.teacher.model = "resnet14"
    config.teacher.min_accuracy = 0.9
    config.student.model = "resnet8"
    config.objective.terms.gradient.pool = 2  # 4x4 windows would leave four values of an 8x8 image
    for recipe, epochs in ((config.teacher.recipe, 30), (config.recipe, 60)):
        recipe.epochs = epochs
        recipe.batch_size = 64
        recipe.learning_rate = 0.05
        recipe.warmup_epochs = 1.0
    config.evaluate_every_epochs = 10  # rarely: so few held-out images often choose by chance
    return config
