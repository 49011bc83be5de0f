"""Learning rate and optimiser from the named scalars of a recipe, all by Optax."""

from typing import Any

import jax
import optax

from ..schedules import Schedule
from .config import Config

FINE = 1000  # steps per epoch where a run is not whole epochs


def learning_rate(recipe: Config, *, steps_per_epoch: int) -> Schedule:
    """The learning rate by step: a linear warm-up from 0, then cosine to 0, steps down, or constant.

    Args:
      recipe: see `config.get_recipe`.
      steps_per_epoch: turns the recipe's epochs into steps.

    Returns:
      step -> rate.
    """
    total, warmup = recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)
    peak = recipe.learning_rate
    if recipe.decay == "cosine":
        main = optax.cosine_decay_schedule(peak, max(total - warmup, 1))
    elif recipe.decay == "multistep":
        # Boundaries are counted from the start of training, whatever the warm-up takes.
        boundaries = {epoch * steps_per_epoch - warmup: recipe.factor for epoch in recipe.boundaries}
        main = optax.piecewise_constant_schedule(peak, boundaries)
    else:
        main = optax.constant_schedule(peak)
    if warmup == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def rate_by_step(recipe: Config, total_steps: int) -> Schedule:
    """The learning rate over `total_steps`; if these are not whole epochs, an epoch counts as a thousand steps."""
    if total_steps % recipe.epochs == 0:
        return learning_rate(recipe, steps_per_epoch=total_steps // recipe.epochs)
    finely = learning_rate(recipe, steps_per_epoch=FINE)
    return lambda step: finely(step * (recipe.epochs * FINE / total_steps))


def make_optimizer(recipe: Config, rate: Schedule) -> optax.GradientTransformation:
    """SGD with momentum over `{"student": ..., "projections": ...}`.

    Coupled decay is added to the gradient before the momentum, as PyTorch's SGD does; decoupled decay is added after
    it and scaled by the learning rate (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101).

    Args:
      recipe: see `config.get_recipe`; `projection_rate` scales the projections' updates where the recipe has it.
      rate: step -> learning rate.

    Returns:
      The gradient transformation.
    """
    decay = optax.add_decayed_weights(recipe.weight_decay, mask=None if recipe.decay_everything else _kernels)
    momentum = optax.trace(recipe.momentum, nesterov=recipe.nesterov) if recipe.momentum else optax.identity()
    clip = optax.clip_by_global_norm(recipe.clip_norm) if recipe.clip_norm else optax.identity()
    inner = [momentum, decay] if recipe.decoupled_decay else [decay, momentum]
    projections = optax.masked(optax.scale(recipe.get("projection_rate", 1.0)), {"student": False, "projections": True})
    return optax.chain(clip, *inner, optax.scale_by_learning_rate(rate), projections)


def _kernels(tree: Any) -> Any:
    """True for what multiplies features across channels or positions, False for biases and BatchNorm."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
