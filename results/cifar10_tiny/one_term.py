"""Arms of one more term beside strong soft targets: docs/results.md, "A closer look". `FILE:NAME` is an arm.

`soft` is CE + 2.8 KD at temperature 5.15, constant: the tuned `full_equal`, rounded, without its other terms. Each other
arm adds the term of its name, whose gradient has about the norm of the cross-entropy's; `NAME@0.25` takes a quarter of it.
"""

import ml_collections

from gompertz_jax.training.config import get_default

SOFT = {
    "ce": {"loss": "cross_entropy", "weight": "1"},
    "kd": {"loss": "soft_targets", "temperature": "5.15", "weight": "2.8"},
}
GRADIENT = {"loss": "gradient_match", "kind": "cosine", "pool": 1, "images": 0, "stages": (), "every_k_steps": 1}
TRANSPORT = {"loss": "wasserstein", "projection": "last", "epsilon": "0.05", "debiased": False, "cloud": "image"}

# NAME: the term, and the weight at which it pulls as hard as the cross-entropy.
TERMS = {
    "input_1": (GRADIENT, 15.0),
    "input_2": (GRADIENT | {"pool": 2}, 11.0),
    "input_4": (GRADIENT | {"pool": 4}, 8.5),
    "input_2_label": (GRADIENT | {"pool": 2, "target": "label"}, 12.0),
    "stage_2": (GRADIENT | {"stages": (2, 2)}, 8.0),
    "stage_last": (GRADIENT | {"stages": (-1, -1)}, 25.0),
    "transport": (TRANSPORT, 25.0),
    "transport_stage_2": (TRANSPORT | {"projection": "second"}, 39.0),
    "transport_batch": (TRANSPORT | {"cloud": "batch"}, 26.0),
    "gaussian": ({"loss": "gaussian", "projection": "last"}, 14.0),
    "hint": ({"loss": "hint", "projection": "hint"}, 17.0),
}


def get_config(name):
    name, _, share = name.partition("@")
    terms = dict(SOFT)
    if name != "soft":
        term, weight = TERMS[name]
        terms["term"] = term | {"weight": f"{float(share or 1)} * {weight}"}
    config = get_default()
    config.objective.terms = ml_collections.ConfigDict(terms)
    config.objective.projections = ml_collections.ConfigDict(
        {"last": {"student_stage": -1, "teacher_stage": -1}, "second": {"student_stage": 2, "teacher_stage": 2}}
    )
    return config
