"""Knowledge distillation in JAX whose weight follows a Gompertz curve over training.

Importing this package loads JAX and Optax only. Entropic transport (OTT-JAX) and the networks (Flax) are loaded on
first use: `gompertz_jax.sinkhorn_distance` and `gompertz_jax.models` are looked up by `__getattr__` (PEP 562).
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .losses.closed_forms import gaussian_wasserstein as gaussian_wasserstein
from .losses.closed_forms import sliced_wasserstein as sliced_wasserstein
from .losses.closed_forms import wasserstein_gaussians as wasserstein_gaussians
from .losses.costs import class_distances as class_distances
from .losses.features import attention_map as attention_map
from .losses.features import attention_transfer as attention_transfer
from .losses.features import hierarchical_context as hierarchical_context
from .losses.features import hint_distance as hint_distance
from .losses.features import neuron_selectivity as neuron_selectivity
from .losses.features import pool_map as pool_map
from .losses.features import variational_information as variational_information
from .losses.gradients import contribution_map as contribution_map
from .losses.gradients import cross_entropy_direction as cross_entropy_direction
from .losses.gradients import gradient_attention_transfer as gradient_attention_transfer
from .losses.gradients import gradient_distance as gradient_distance
from .losses.gradients import gradient_matching as gradient_matching
from .losses.gradients import input_gradient as input_gradient
from .losses.gradients import jacobian_matching as jacobian_matching
from .losses.gradients import label_class as label_class
from .losses.gradients import pool_gradient as pool_gradient
from .losses.gradients import random_direction as random_direction
from .losses.gradients import sobolev_matching as sobolev_matching
from .losses.gradients import top_class as top_class
from .losses.logits import cross_entropy as cross_entropy
from .losses.logits import decoupled_kl as decoupled_kl
from .losses.logits import interclass_correlation as interclass_correlation
from .losses.logits import multi_temperature_kl as multi_temperature_kl
from .losses.logits import soft_target_kl as soft_target_kl
from .losses.logits import standardize_logits as standardize_logits
from .losses.logits import target_cross_entropy as target_cross_entropy
from .losses.relations import batch_correlation as batch_correlation
from .losses.relations import class_correlation as class_correlation
from .losses.relations import contrastive_representation as contrastive_representation
from .losses.relations import correlation_congruence as correlation_congruence
from .losses.relations import intraclass_correlation as intraclass_correlation
from .losses.relations import probabilistic_transfer as probabilistic_transfer
from .losses.relations import relational_angle as relational_angle
from .losses.relations import relational_distance as relational_distance
from .losses.relations import similarity_preserving as similarity_preserving
from .network import Network as Network
from .network import Outputs as Outputs
from .objective import Objective as Objective
from .objective import Progress as Progress
from .objective import Term as Term
from .objective import agreement as agreement
from .objective import gompertz_objective as gompertz_objective
from .objective import relative_accuracy as relative_accuracy
from .objective import student_alone as student_alone
from .projections import Projection as Projection
from .record import Record as Record
from .schedules import ByProgress as ByProgress
from .schedules import Schedule as Schedule
from .schedules import by_progress as by_progress
from .schedules import constant_schedule as constant_schedule
from .schedules import cosine_schedule as cosine_schedule
from .schedules import gompertz_schedule as gompertz_schedule
from .schedules import gompertz_through as gompertz_through
from .schedules import linear_schedule as linear_schedule
from .schedules import logistic_schedule as logistic_schedule
from .schedules import matched_constant as matched_constant
from .schedules import mean_weight as mean_weight
from .schedules import reversed_schedule as reversed_schedule
from .state import TrainState as TrainState
from .state import init_state as init_state
from .step import make_eval_step as make_eval_step
from .step import make_gradient_report as make_gradient_report
from .step import make_train_step as make_train_step

if TYPE_CHECKING:
    from . import models as models
    from .losses.wasserstein import SinkhornDiagnostics as SinkhornDiagnostics
    from .losses.wasserstein import class_sinkhorn_distance as class_sinkhorn_distance
    from .losses.wasserstein import sinkhorn_distance as sinkhorn_distance
    from .losses.wasserstein import wasserstein_logits as wasserstein_logits

__version__ = "0.1.0"

# name -> (module, attribute); an attribute of None is the module itself
_LAZY = {
    "models": (".models", None),
    "SinkhornDiagnostics": (".losses.wasserstein", "SinkhornDiagnostics"),
    "class_sinkhorn_distance": (".losses.wasserstein", "class_sinkhorn_distance"),
    "sinkhorn_distance": (".losses.wasserstein", "sinkhorn_distance"),
    "wasserstein_logits": (".losses.wasserstein", "wasserstein_logits"),
}

_NOT_OURS = {"importlib", "Any", "ModuleType", "TYPE_CHECKING"}

# What `from gompertz_jax import *` gives: all of the above, and none of the modules that importing them has loaded.
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    *(
        name
        for name, value in globals().items()
        if not name.startswith("_") and name not in _NOT_OURS and not isinstance(value, ModuleType)
    ),
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name, __name__)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY} - _NOT_OURS)
