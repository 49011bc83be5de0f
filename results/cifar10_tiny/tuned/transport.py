"""The arm 'transport': the best of 4 trials by validation (61.84%).

gompertz.displacement 11.77, gompertz.rate 18.26, kd.weight 0.5222, kd.temperature 4.775, wasserstein.weight 2.602, wasserstein.epsilon 0.04438
"""

import ml_collections

from gompertz_jax.training.config import get_default

CHANGES = {
    "augment.padding": 2,
    "data.data_dir": "",
    "data.image_size": 16,
    "data.train_images": 10000,
    "evaluate_every_epochs": 2,
    "objective.curve": "gompertz(displacement=11.77, rate=18.26)",
    "recipe.epochs": 8,
    "recipe.warmup_epochs": 0.5,
    "teacher.min_accuracy": 0.6,
    "teacher.recipe.epochs": 30,
    "teacher.recipe.warmup_epochs": 0.5,
}
TERMS = {
    "ce": {"loss": "cross_entropy", "weight": "1"},
    "kd": {"loss": "soft_targets", "temperature": "4.775", "weight": "0.5222 * (1 * curve)"},
    "wasserstein": {
        "cloud": "image",
        "debiased": False,
        "epsilon": "0.04438",
        "loss": "wasserstein",
        "projection": "last",
        "weight": "2.602 * (4 * curve)",
    },
}
PROJECTIONS = {"last": {"student_stage": -1, "teacher_stage": -1}}


def get_config():
    config = get_default()
    config.update_from_flattened_dict(CHANGES)
    config.objective.terms = ml_collections.ConfigDict(TERMS)
    config.objective.projections = ml_collections.ConfigDict(PROJECTIONS)
    return config
