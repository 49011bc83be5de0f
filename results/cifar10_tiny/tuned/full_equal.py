"""The arm 'full_equal': the tuned 'full' with its curve replaced by the constant of equal mean. Of 'full':

gompertz.displacement 8.942, gompertz.rate 17.1, gradient.weight 0.3303, kd.weight 3.316, kd.temperature 5.15, wasserstein.weight 0.4421, wasserstein.epsilon 0.1645
"""

import ml_collections

from gompertz_jax.training.config import get_default

CHANGES = {
    "augment.padding": 2,
    "data.data_dir": "",
    "data.image_size": 16,
    "data.train_images": 10000,
    "evaluate_every_epochs": 2,
    "objective.curve": "gompertz(displacement=8.942, rate=17.1)",
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
        "weight": "0.3303 * (0.7 * curve)",
    },
    "kd": {"loss": "soft_targets", "temperature": "5.15", "weight": "3.316 * (1 * curve)"},
    "wasserstein": {
        "cloud": "image",
        "debiased": False,
        "epsilon": "0.1645",
        "loss": "wasserstein",
        "projection": "last",
        "weight": "0.4421 * (4 * curve)",
    },
}
PROJECTIONS = {"last": {"student_stage": -1, "teacher_stage": -1}}


def get_config():
    config = get_default()
    config.update_from_flattened_dict(CHANGES)
    config.objective.terms = ml_collections.ConfigDict(TERMS)
    config.objective.projections = ml_collections.ConfigDict(PROJECTIONS)
    config.objective.curve = f"matched({config.objective.curve})"
    return config
