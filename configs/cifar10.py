"""The reference experiment: ResNet-50 -> MobileNetV2 (width 0.5) on CIFAR-10, 240 epochs.

    python train.py --config configs/cifar10.py [--config.data.data_dir=DIR]

The pair is one that the Gompertz-CNN abstract names; the recipe is the field's, but for Nesterov's momentum
and 5,000 held-out images (`docs/coming_from.md` has the flags that undo both): SGD with momentum 0.9, batch 64, weight
decay 5e-4, learning rate 0.01 for MobileNetV2 and 0.05 for ResNet-50, times 0.1 at epochs 150, 180 and 210, T = 4:
Tian, Krishnan, Isola, 2020, https://arxiv.org/abs/1910.10699. The objective is our reconstruction. It is meant for an
accelerator. `--config.data.validation=0` trains on all 50,000 images and reports the last step, as published tables
do.
"""

from gompertz_jax.training.config import get_default


def get_config():
    config = get_default()
    config.data.name = "cifar10"
    config.teacher.model = "resnet50"
    config.teacher.min_accuracy = 0.9
    config.student.model = "mobilenetv2"
    for recipe, learning_rate in ((config.teacher.recipe, 0.05), (config.recipe, 0.01)):
        recipe.epochs = 240
        recipe.batch_size = 64
        recipe.learning_rate = learning_rate
        recipe.decay = "multistep"
        recipe.boundaries = (150, 180, 210)
    config.logging.every_steps = 50
    return config
