"""Every exported loss, at what is extreme and legal: finite values, finite gradients, in any surroundings.

A loss is in this test by being exported: its arguments are made from the names of its parameters. What those names mean
is `ARGUMENTS`; a parameter of another name fails here until it is given a meaning.
"""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gompertz_jax as gj

LOSSES = {
    name: getattr(gj, name)
    for name in dir(gj)
    if inspect.isfunction(getattr(gj, name)) and getattr(gj, name).__module__.startswith("gompertz_jax.losses.")
}


class Case:
    """One extreme: how many images and classes, and what the arrays of each side are like."""

    def __init__(self, *, batch=4, classes=5, dtype=jnp.float32, student="random", teacher="random"):
        self.batch, self.classes, self.dtype, self.sides = batch, classes, dtype, (student, teacher)
        self.labels = np.arange(batch) % classes

    def filled(self, side, shape):
        """An array of the student (0) or the teacher (1)."""
        random = np.random.default_rng([side, len(shape)]).normal(size=shape)
        kind = self.sides[side]
        if kind == "large" or kind == "certain":
            if shape == (self.batch, self.classes):
                random = np.eye(self.classes)[self.labels] * 1e4 * (1 if kind == "certain" else (-1) ** side)
            else:
                random = 1e4 * random
        if kind == "equal":
            random = np.random.default_rng([0, len(shape)]).normal(size=shape)
        if kind == "constant":
            random = np.full(shape, 0.3)
        if kind == "zero":
            random = np.zeros(shape)
        return jnp.asarray(random, self.dtype)


CASES = {
    "random": Case(),
    "1e4": Case(student="large", teacher="large"),
    "certain of the label": Case(student="certain", teacher="certain"),
    "a certain teacher": Case(teacher="certain"),
    "two classes": Case(classes=2),
    "constant": Case(student="constant", teacher="constant"),
    "a constant student": Case(student="constant"),
    "a constant teacher": Case(teacher="constant"),
    "zeros": Case(student="zero", teacher="zero"),
    "student and teacher equal": Case(student="equal", teacher="equal"),
    "one image": Case(batch=1),
    "bfloat16": Case(dtype=jnp.bfloat16),
}


def logits_function(weight):
    return lambda images: jnp.tanh(images.reshape(len(images), -1).astype(weight.dtype) @ weight)


def function(case, side, pick):
    """A network of these images: how its weights, which are differentiated, make a function of it."""
    weight = case.filled(side, (4 * 4 * 2, case.classes))
    return weight, lambda weight: lambda images: pick(logits_function(weight)(images))


# Of a case: (array that is differentiated, or None if nothing is; what the loss is given, as a function of it)
def plain(shape_of, side=0):
    return lambda case: (case.filled(side, shape_of(case)), lambda array: array)


def fixed(make):
    return lambda case: (None, lambda _: make(case))


LOGITS = lambda case: (case.batch, case.classes)  # noqa: E731
VECTORS = lambda case: (case.batch, 6)  # noqa: E731
MAPS = lambda case: (case.batch, 4, 4, 3)  # noqa: E731
CLOUDS = lambda case: (case.batch, 5, 3)  # noqa: E731

ARGUMENTS = {
    "logits": plain(LOGITS),
    "student_logits": plain(LOGITS),
    "teacher_logits": plain(LOGITS, 1),
    "student_features": plain(VECTORS),
    "teacher_features": plain(VECTORS, 1),
    "student_embeddings": plain(VECTORS),
    "teacher_embeddings": plain(VECTORS, 1),
    "class_vectors": lambda case: (case.filled(1, (case.classes, 6)), lambda array: array),
    "class_cost": fixed(lambda case: jnp.asarray(1.0 - np.eye(case.classes), case.dtype)),
    "student_map": plain(MAPS),
    "teacher_map": plain(MAPS, 1),
    "feature_map": plain(MAPS),
    "student_mean": plain(MAPS),
    "student_variance": fixed(lambda case: jnp.full(3, 0.5, case.dtype)),
    "gradient": plain(MAPS, 1),
    "student_gradient": plain(MAPS),
    "teacher_gradient": plain(MAPS, 1),
    "x": plain(CLOUDS),
    "y": plain(CLOUDS, 1),
    "images": fixed(lambda case: jnp.asarray(np.random.default_rng(9).uniform(size=(case.batch, 4, 4, 2)), case.dtype)),
    "score_fn": lambda case: function(case, 0, lambda logits: logits[:, 0]),
    "student_score_fn": lambda case: function(case, 0, lambda logits: logits[:, 0]),
    "teacher_score_fn": lambda case: function(case, 1, lambda logits: logits[:, 0]),
    "student_fn": lambda case: function(case, 0, lambda logits: logits),
    "teacher_fn": lambda case: function(case, 1, lambda logits: logits),
    "labels": fixed(lambda case: jnp.asarray(case.labels)),
    "key": fixed(lambda case: jax.random.key(0)),
    "size": fixed(lambda case: 2),
}


def needed(loss):
    parameters = inspect.signature(loss).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
    unknown = [name for name in names if name not in ARGUMENTS]
    assert not unknown, f"{loss.__name__} takes {unknown}: say in ARGUMENTS what that is"
    return names


def made_for(loss, case):
    """Of each argument: (array that is differentiated, or None, and what is given as a function of it)."""
    made = {argument: ARGUMENTS[argument](case) for argument in needed(loss)}
    if "x" in made and "labels" in made:  # clouds of one point per image of a batch
        made["labels"] = (None, lambda _: jnp.asarray(np.tile(np.arange(5) % 3, (case.batch, 1))))
    return made


def test_the_losses_are_found():
    assert {"soft_target_kl", "sinkhorn_distance", "gradient_matching", "relational_angle", "hint_distance"} <= {
        *LOSSES
    }
    assert len(LOSSES) >= 40


@pytest.mark.parametrize("name", LOSSES)
def test_extremes_give_finite_values_and_gradients(name):
    """Cases of one shape and dtype share a compiled program."""
    loss = LOSSES[name]
    programs = {}
    for label, case in CASES.items():
        made = made_for(loss, case)
        arrays = {argument: array for argument, (array, _) in made.items() if array is not None}

        def total(arrays, made=made):
            arguments = {argument: make(arrays.get(argument)) for argument, (_, make) in made.items()}
            values = loss(**arguments)
            return values.astype(jnp.float32).sum(), values

        signature = case.batch, case.classes, case.dtype
        if signature not in programs:
            # labels and images depend on these three only
            programs[signature] = jax.jit(jax.value_and_grad(total, has_aux=True))
        (_, values), gradients = programs[signature](arrays)
        assert np.isfinite(values.astype(jnp.float32)).all(), label
        for argument, gradient in gradients.items():
            assert np.isfinite(gradient.astype(jnp.float32)).all(), f"{label}: {argument}"


@pytest.mark.parametrize("name", ["relational_distance", "relational_angle", "sinkhorn_distance", "wasserstein_logits"])
def test_a_loss_with_a_loop_compiles_once_outside_of_jit_too(name):
    compiled = []

    def listener(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    arguments = [make(array) for array, make in (ARGUMENTS[each](Case()) for each in needed(LOSSES[name]))]
    LOSSES[name](*arguments)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        LOSSES[name](*arguments)
        assert compiled == []
        jax.jit(lambda x: x + 1.5)(arguments[0])
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize("name", [name for name in LOSSES if not any("_fn" in each for each in needed(LOSSES[name]))])
def test_products_are_in_full_precision_where_the_default_is_not(name):
    # An accelerator's default rounds to bfloat16 or TF32; a CPU's does not, so only the program shows it.
    arguments = {each: make(array) for each, (array, make) in made_for(LOSSES[name], Case()).items()}
    first = next(iter(arguments))

    def loss(array):
        return LOSSES[name](**(arguments | {first: array})).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(arguments[first]))
    products = re.findall(r"dot_general\[(.*?)\]\s", program, re.DOTALL)
    assert len(products) == program.count("dot_general[")
    assert all("Precision.HIGHEST" in product for product in products)
    assert products or name not in PRODUCTS


PRODUCTS = ["batch_correlation", "relational_angle", "similarity_preserving", "sinkhorn_distance", "class_distances"]


OPTIONS = {
    "sinkhorn_distance": {"marginal_penalty": 1.0, "debiased": True},
    "cross_entropy": {"label_smoothing": 0.1},
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_traced_in_a_code_base_with_strict_promotion(name, dtype):
    made = made_for(LOSSES[name], Case(dtype=dtype))
    arrays = {argument: array for argument, (array, _) in made.items() if array is not None}

    def total(arrays, **options):
        arguments = {argument: make(arrays.get(argument)) for argument, (_, make) in made.items()}
        return LOSSES[name](**arguments, **options).astype(jnp.float32).sum()

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for options in ({}, OPTIONS.get(name)):
            if options is not None:
                jax.make_jaxpr(jax.value_and_grad(partial(total, **options)))(arrays)
