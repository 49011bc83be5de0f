"""The arm 'full_matched': the best of 4 trials by validation (64.00%).

gradient.weight 3.667, kd.weight 1.492, kd.temperature 1.609, wasserstein.weight 2.699, wasserstein.epsilon 0.2694
"""

import ml_collections

from gompertz_jax.training.config import get_default

CHANGES = {
    "augment.padding": 2,
    "data.data_dir": "",
    "data.image_size": 16,
    "data.train_images": 10000,
    "evaluate_every_epochs": 2,
    "objective.curve": "matched(gompertz(displacement=5, rate=8))",
    "recipe.epochs": 8,
    "recipe.warmup_epochs": 0.5,
    "teacher.min_accuracy": 0.6,
    "teacher.recipe.epochs": 30,
    "teacher.recipe.warmup_epochs": 0.5,
}
TERMS = {
    "ce": {"loss": "cross_entropy", "weight": "1"},
    "gradient": {
        "every_k_steps": 1,
        "images": 0,
        "kind": "cosine",
        "loss": "gradient_match",
        "pool": 2,
        "stages": [],
        "weight": "3.667 * (0.7 * curve)",
    },
    "kd": {"loss": "soft_targets", "temperature": "1.609", "weight": "1.492 * (1 * curve)"},
    "wasserstein": {
        "cloud": "image",
        "debiased": False,
        "epsilon": "0.2694",
        "loss": "wasserstein",
        "projection": "last",
        "weight": "2.699 * (4 * curve)",
    },
}
PROJECTIONS = {"last": {"student_stage": -1, "teacher_stage": -1}}


def get_config():
    config = get_default()
    config.update_from_flattened_dict(CHANGES)
    config.objective.terms = ml_collections.ConfigDict(TERMS)
    config.objective.projections = ml_collections.ConfigDict(PROJECTIONS)
    return config
