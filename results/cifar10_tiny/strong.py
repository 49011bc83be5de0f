"""The objective of docs/results.md, "Round 2": every term pulls. The setting is that of configs/cifar10_tiny.py."""

from gompertz_jax.training.config import get_default

CHANGES = {
    "augment.padding": 2,
    "data.image_size": 16,
    "data.train_images": 10_000,
    "evaluate_every_epochs": 2,
    "objective.projections.last.student_stage": 2,
    "objective.projections.last.teacher_stage": 2,
    "objective.terms.gradient.pool": 1,
    "objective.terms.gradient.stages": (2, 2),
    "objective.terms.gradient.weight": "11.01 * curve",
    "objective.terms.kd.temperature": "5.15",
    "objective.terms.kd.weight": "3.855 * curve",
    "objective.terms.wasserstein.weight": "53.69 * curve",
    "recipe.epochs": 8,
    "recipe.warmup_epochs": 0.5,
    "teacher.min_accuracy": 0.6,
    "teacher.recipe.epochs": 30,
    "teacher.recipe.warmup_epochs": 0.5,
}


def get_config():
    config = get_default()
    config.update_from_flattened_dict(CHANGES)
    config.objective.terms.wasserstein.threshold = 0.01
    return config
