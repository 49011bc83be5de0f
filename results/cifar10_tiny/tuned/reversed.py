"""The arm 'reversed': the best of 4 trials by validation (62.74%).

gompertz.displacement 2.596, gompertz.rate 17.53, kd.weight 1.651, kd.temperature 2.389
"""

import ml_collections

from gompertz_jax.training.config import get_default

CHANGES = {
    "augment.padding": 2,
    "data.data_dir": "",
    "data.image_size": 16,
    "data.train_images": 10000,
    "evaluate_every_epochs": 2,
    "objective.curve": "reversed(gompertz(displacement=2.596, rate=17.53))",
    "recipe.epochs": 8,
    "recipe.warmup_epochs": 0.5,
    "teacher.min_accuracy": 0.6,
    "teacher.recipe.epochs": 30,
    "teacher.recipe.warmup_epochs": 0.5,
}
TERMS = {
    "ce": {"loss": "cross_entropy", "weight": "1"},
    "kd": {"loss": "soft_targets", "temperature": "2.389", "weight": "1.651 * (1 * curve)"},
}
PROJECTIONS = {"last": {"student_stage": -1, "teacher_stage": -1}}


def get_config():
    config = get_default()
    config.update_from_flattened_dict(CHANGES)
    config.objective.terms = ml_collections.ConfigDict(TERMS)
    config.objective.projections = ml_collections.ConfigDict(PROJECTIONS)
    return config
