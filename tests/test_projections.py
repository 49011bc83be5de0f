"""Projections against loops in float64 NumPy, their derivatives and statistics, and their use inside a scan."""

import itertools
import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gompertz_jax as gj
from gompertz_jax import projections as room

KEY = jax.random.key(3)

# These programs run for microseconds and compile for seconds.
compiled_fast = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def outputs(seed, *stages, pooled, batch=3, dtype=jnp.float32):
    """A network's outputs: stages as (channels, height, width)."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((batch, *shape)).astype(np.float32), dtype)  # noqa: E731
    return gj.Outputs(draw(5), tuple(draw(h, w, c) for c, h, w in stages), draw(pooled))


# The last stages are 16@16 -> 64@8, 16@8 -> 32@16, 10@4 -> 12@1 and 4@5x6 -> 5@3x6.
NETWORKS = {
    "twice": (
        {"stages": [(3, 16, 16), (8, 16, 16), (16, 16, 16)], "pooled": 16},
        [(3, 16, 16), (6, 16, 16), (64, 8, 8)],
    ),
    "half": ({"stages": [(3, 16, 16), (8, 16, 16), (16, 8, 8)], "pooled": 20}, [(3, 16, 16), (6, 8, 8), (32, 16, 16)]),
    "one": (
        {"stages": [(3, 8, 8), (6, 8, 8), (10, 4, 4)], "pooled": 10},
        [(3, 8, 8), (7, 4, 4), (12, 1, 1), (9, 1, 1)],
    ),
    "odd": ({"stages": [(3, 7, 6), (2, 7, 6), (4, 5, 6)], "pooled": 4}, [(3, 7, 6), (3, 4, 5), (5, 3, 6)]),
}
KINDS = {
    "linear": room.Projection(2, 2),
    "regressor": room.Regressor(),
    "variational": room.VariationalRegressor(),
    "variational, one pair": room.VariationalRegressor(((-1, 1),), hidden=3),
    "embedding": room.Embedding(8),
    "review": room.Review(),
    "review, narrow, crossed": room.Review(((2, 1), (1, 2)), width=3),
}


def networks(name, **options):
    student, teacher = NETWORKS[name]
    return (
        outputs(0, *student["stages"], pooled=student["pooled"], **options),
        outputs(1, *teacher, pooled=7, **options),
    )


@cache
def started(kind, pair):
    """Fresh parameters and statistics; and the parameters moved off the values where half of them do nothing."""
    params, stats = KINDS[kind].init(KEY, *networks(pair))
    rng = np.random.default_rng(2)
    moved = jax.tree.map(lambda p: np.asarray(p + 0.3 * rng.standard_normal(p.shape), np.float32), params)
    return params, moved, stats


@partial(compiled_fast, static_argnums=0)
def trained(projection, params, stats, student, teacher):
    """What `apply` returns in training, and gradients of a linear function of all views to parameters and networks.

    Compiled once per kind and pair of networks: that eager evaluation agrees is tested below.
    """

    def total(params, student, teacher):
        *views, stats_ = projection.apply(params, stats, student, teacher, train=True)
        slopes = (jnp.vdot(jnp.cos(jnp.arange(view.size)), view) for view in jax.tree.leaves(views))
        return sum(slopes), (*views, stats_)

    slopes, results = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(params, student, teacher)
    return results, slopes


@partial(compiled_fast, static_argnums=0)
def evaluated(projection, params, stats, student, teacher):
    return projection.apply(params, stats, student, teacher, train=False)


# --- the same in NumPy, one element at a time -------------------------------------------------------------------------


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def reference_convolution(x, kernel, stride=1, padding=0):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    kh, kw, _, filters = kernel.shape
    height, width = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    y = np.zeros((len(x), height, width, filters))
    for i, j in np.ndindex(height, width):
        window = x[:, stride * i : stride * i + kh, stride * j : stride * j + kw]
        y[:, i, j] = np.tensordot(window, kernel, axes=3)
    return y


def reference_transposed(x, kernel):
    """Every input element adds the kernel, turned by 180 degrees, to the 4x4 elements around its double position."""
    batch, height, width, _ = x.shape
    padded = np.zeros((batch, 2 * height + 2, 2 * width + 2, kernel.shape[-1]))
    for i, j in np.ndindex(height, width):
        padded[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("bc,yxco->byxo", x[:, i, j], kernel[::-1, ::-1])
    return padded[:, 1:-1, 1:-1]


def reference_norm(p, y):
    centred = y - y.mean((0, 1, 2))
    return centred / np.sqrt((centred**2).mean((0, 1, 2)) + 1e-5) * p["scale"] + p["bias"]


def reference_nearest(x, height, width):
    y = np.zeros((len(x), height, width, x.shape[-1]))
    for i, j in np.ndindex(height, width):
        y[:, i, j] = x[:, int(np.floor(i * x.shape[1] / height)), int(np.floor(j * x.shape[2] / width))]
    return y


def reference_review(projection, params, student, teacher):
    joined = [(student.features[i], teacher.features[j]) for i, j in projection.stages(student, teacher)]
    joined = [(f"pair{n}", a, b) for n, (a, b) in enumerate(joined)]
    deepest, *rest = [*joined, ("pooled", student.pooled[:, None, None], teacher.pooled[:, None, None])][::-1]
    fused = reference_norm(params["pooled"]["inner"], deepest[1] @ params["pooled"]["inner"]["kernel"][0, 0])
    results = [reference_norm(params["pooled"]["outer"], fused @ params["pooled"]["outer"]["kernel"][0, 0])]
    for name, a, b in rest:
        p = params[name]
        x = reference_norm(p["inner"], a @ p["inner"]["kernel"][0, 0])
        y = reference_nearest(fused, *a.shape[1:3])
        scores = np.concatenate([x, y], -1) @ p["attention"]["kernel"] + p["attention"]["bias"]
        gates = 1 / (1 + np.exp(-scores))
        fused = reference_nearest(gates[..., 0:1] * x + gates[..., 1:2] * y, *b.shape[1:3])
        kernel = p["outer"]["kernel"]
        # on a map of 1x1 the reference's other eight taps meet only padding
        kernel = kernel if b.shape[1:3] != (1, 1) else np.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))
        results.insert(0, reference_norm(p["outer"], reference_convolution(fused, kernel, padding=1)))
    return results


# --- all kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind, pair):
    projection = KINDS[kind]
    student, teacher = jax.eval_shape(lambda s, t: (s, t), *networks(pair))
    params, stats = jax.eval_shape(lambda key: projection.init(key, student, teacher), KEY)
    for path, leaf in jax.tree_util.tree_leaves_with_path((params, stats)):
        assert leaf.dtype == jnp.float32
        assert all(isinstance(step.key, str) for step in path[1:])

    ours, theirs, new = jax.eval_shape(partial(projection.apply, train=True), params, stats, student, teacher)
    assert jax.tree.structure(new) == jax.tree.structure(stats)
    stages = [(student.features[i], teacher.features[j]) for i, j in projection.stages(student, teacher)]
    smaller = [
        (3, *(min(sides) for sides in zip(a.shape[1:3], b.shape[1:3], strict=True)), b.shape[3]) for a, b in stages
    ]
    if kind.startswith("variational"):
        assert [mean.shape for mean, _ in ours] == [a.shape for a in theirs] == smaller
        assert [variance.shape for _, variance in ours] == [shape[3:] for shape in smaller]
    elif kind.startswith("review"):
        shapes = [*(b.shape for _, b in stages), (3, 1, 1, 7)]
        assert [a.shape for a in ours] == [a.shape for a in theirs] == shapes
    elif kind == "linear":
        ((a, b),) = stages
        assert ours.shape == (*a.shape[:3], b.shape[3]) and theirs.shape == b.shape
    else:
        assert ours.shape == theirs.shape == ((3, 8) if kind == "embedding" else stages[0][1].shape)


# Each kind on networks that it is trained with below, so that all forms of a kind are met.
TRAINED = [
    ("linear", "odd"),
    ("regressor", "twice"),
    ("regressor", "half"),
    ("regressor", "one"),
    ("regressor", "odd"),
    ("variational", "half"),
    ("embedding", "odd"),
    ("review", "one"),
    ("review, narrow, crossed", "odd"),
]


@pytest.mark.parametrize(("kind", "pair"), TRAINED)
def test_gradients_reach_every_parameter_and_the_student_but_not_the_teacher(kind, pair):
    projection, (student, teacher) = KINDS[kind], networks(pair)
    _, params, stats = started(kind, pair)
    _, (to_params, to_student, to_teacher) = trained(projection, params, stats, student, teacher)
    for path, leaf in jax.tree_util.tree_leaves_with_path(to_params):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-3, path
    for leaf in jax.tree.leaves(to_teacher):
        np.testing.assert_array_equal(leaf, 0.0)
    reached = {i for i, leaf in enumerate((*to_student.features, to_student.pooled)) if np.abs(leaf).max() > 1e-5}
    expected = {i for i, _ in projection.stages(student, teacher)}
    if kind == "embedding" or kind.startswith("review"):
        expected.add(len(student.features))
    assert reached == expected


@pytest.mark.parametrize(("kind", "pair"), TRAINED)
def test_extremes_give_finite_views_and_gradients(kind, pair):
    params, _, stats = started(kind, pair)
    for scale in (0.0, 1e4, -1e4):
        scaled = jax.tree.map(lambda leaf, scale=scale: scale * leaf, networks(pair))
        results = trained(KINDS[kind], params, stats, *scaled)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results)), scale


@pytest.mark.parametrize(("kind", "pair"), TRAINED)
def test_products_are_in_full_precision_where_the_default_is_not(kind, pair):
    # An accelerator's default rounds to bfloat16 or TF32; a CPU's does not, so only the program shows it.
    _, params, stats = started(kind, pair)
    student, teacher = networks(pair)

    def total(params):
        views = KINDS[kind].apply(params, stats, student, teacher, train=True)[:2]
        return sum(jnp.sum(view) for view in jax.tree.leaves(views))

    program = str(jax.make_jaxpr(jax.grad(total))(params))
    products = re.findall(r"dot_general\[(.*?)\]\s", program, re.DOTALL)
    assert products and all("Precision.HIGHEST" in product for product in products)


def test_a_batch_of_one_position_is_normalised_to_the_bias():
    student, teacher = networks("one", batch=1)
    _, params, stats = started("regressor", "one")
    (view, _, _), slopes = trained(KINDS["regressor"], params, stats, student, teacher)
    np.testing.assert_allclose(view[0, 0, 0], np.maximum(params["bias"], 0.0), atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("kind", ["linear", "regressor", "variational, one pair", "embedding"])
def test_narrow_outputs_are_raised_and_eager_evaluation_is_the_compiled_one(kind):
    student, teacher = networks("odd", dtype=jnp.bfloat16)
    raised = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (student, teacher))
    params, _, stats = started(kind, "odd")
    eager = KINDS[kind].apply(params, stats, student, teacher, train=True)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(eager))
    compiled = trained(KINDS[kind], params, stats, *raised)[0]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), eager, compiled)


# --- each kind --------------------------------------------------------------------------------------------------------


def test_the_linear_projection_and_the_standardised_teacher():
    student, teacher = networks("odd")
    projection = KINDS["linear"]
    fresh, params, stats = started("linear", "odd")
    np.testing.assert_array_equal(fresh["kernel"], jax.random.normal(KEY, (4, 5), jnp.float32) * 4**-0.5)
    stats = room.measure_teacher({"a": projection}, {"a": stats}, [(teacher, np.zeros(len(teacher.logits)))])["a"]
    (ours, theirs, _), _ = trained(projection, params, stats, student, teacher)
    expected = reference_norm(wide(params), wide(student.features[2]) @ wide(params["kernel"]))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    t = wide(teacher.features[2])
    np.testing.assert_allclose(theirs, (t - t.mean((0, 1, 2))) / t.std((0, 1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pair", "kernel", "form"),
    [
        ("twice", (3, 3, 16, 64), "3x3 convolution at stride 2"),
        ("half", (4, 4, 16, 32), "4x4 transposed convolution at stride 2"),
        ("one", (4, 4, 10, 12), "4x4 convolution"),
        ("odd", (3, 1, 4, 5), "3x1 convolution"),
    ],
)
def test_the_regressors_forms(pair, kernel, form):
    student, teacher = networks(pair)
    projection = KINDS["regressor"]
    fresh, params, stats = started("regressor", pair)
    assert params["kernel"].shape == kernel
    numbers = jax.random.normal(KEY, (math.prod(kernel),), jnp.float32).reshape(kernel)
    np.testing.assert_allclose(fresh["kernel"], numbers * math.prod(kernel[:3]) ** -0.5, rtol=1e-6)
    assert projection.describe(student, teacher) == f"{form}, BatchNorm, ReLU"
    (ours, theirs, _), _ = trained(projection, params, stats, student, teacher)
    x, k = wide(student.features[2]), wide(params["kernel"])
    if pair == "twice":
        y = reference_convolution(x, k, stride=2, padding=1)
    elif pair == "half":
        y = reference_transposed(x, k)
    else:
        y = reference_convolution(x, k)
    expected = np.maximum(reference_norm(wide(params), y), 0.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(theirs, teacher.features[2])


def test_the_variational_head():
    student, teacher = networks("half")
    projection = KINDS["variational"]
    fresh, params, stats = started("variational", "half")
    assert stats == {} and projection.stages(student, teacher) == ((1, 1), (2, 2))
    ((_, (_, variance)), _, _), _ = trained(projection, fresh, stats, student, teacher)
    np.testing.assert_allclose(variance, 5.0, rtol=1e-5)
    for index in (0, 1):  # as wide as the teacher within
        wide_ones = teacher.features[index + 1].shape[-1]
        layers = [fresh[f"pair{index}"][f"kernel{layer}"].shape[-1] for layer in range(3)]
        assert layers == [wide_ones] * 3
    wide_map = gj.Outputs(jnp.zeros((1, 9)), (jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 200))), jnp.zeros((1, 200)))
    drawn, _ = room.VariationalRegressor(hidden=100).init(KEY, wide_map, wide_map)
    for name, fan_in in (("kernel0", 200), ("kernel1", 100), ("kernel2", 100)):
        # uniform within 1 / sqrt(fan-in), PyTorch's default, has a third of 1 / fan-in as its variance
        assert np.std(drawn["pair0"][name]) == pytest.approx((3 * fan_in) ** -0.5, rel=0.03)

    (predicted, targets, _), _ = trained(projection, params, stats, student, teacher)
    halves = lambda a: a.reshape(3, 8, 2, 8, 2, -1).mean((2, 4))  # noqa: E731
    s, t, p = wide(student.features), wide(teacher.features), wide(params)
    for name, x, y, (mean, variance), target in zip(
        ("pair0", "pair1"), (halves(s[1]), s[2]), (t[1], halves(t[2])), predicted, targets, strict=True
    ):
        hidden = np.maximum(x @ p[name]["kernel0"], 0.0)
        hidden = np.maximum(hidden @ p[name]["kernel1"], 0.0)
        np.testing.assert_allclose(mean, hidden @ p[name]["kernel2"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance, np.log1p(np.exp(p[name]["raw_variance"])) + 1e-5, rtol=1e-5)
        np.testing.assert_allclose(target, y, rtol=1e-5, atol=1e-6)


def test_the_embeddings():
    student, teacher = networks("odd")
    _, params, stats = started("embedding", "odd")
    assert params["student"]["kernel"].shape == (4, 8) and params["teacher"]["kernel"].shape == (7, 8)
    (ours, theirs, new), _ = trained(KINDS["embedding"], params, stats, student, teacher)
    assert new == stats == {}
    for view, network, p in ((ours, student, params["student"]), (theirs, teacher, params["teacher"])):
        y = wide(network.pooled) @ wide(p["kernel"]) + wide(p["bias"])
        np.testing.assert_allclose(view, y / np.linalg.norm(y, axis=-1, keepdims=True), rtol=1e-4, atol=1e-6)
    default = jax.eval_shape(lambda key: room.Embedding().init(key, student, teacher), KEY)[0]
    assert default["student"]["kernel"].shape == (4, 128)


@pytest.mark.parametrize(("kind", "pair"), [("review", "one"), ("review, narrow, crossed", "odd")])
def test_the_review(kind, pair):
    student, teacher = networks(pair)
    projection = KINDS[kind]
    _, params, stats = started(kind, pair)
    width = 3 if "narrow" in kind else student.pooled.shape[-1]
    assert params["pooled"]["inner"]["kernel"].shape == (1, 1, student.pooled.shape[-1], width)
    assert params["pooled"]["outer"]["kernel"].shape == (1, 1, width, 7)
    (ours, theirs, _), _ = trained(projection, params, stats, student, teacher)
    expected = reference_review(projection, wide(params), wide(student), wide(teacher))
    for view, result in zip(ours, expected, strict=True):
        np.testing.assert_allclose(view, result, rtol=1e-3, atol=1e-4)
    for view, (_, stage) in zip(theirs, projection.stages(student, teacher), strict=False):
        np.testing.assert_array_equal(view, teacher.features[stage])
    np.testing.assert_array_equal(theirs[-1][:, 0, 0], teacher.pooled)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_running_statistics_are_tracked_in_training_and_used_in_evaluation():
    student, teacher = networks("odd")
    projection = KINDS["regressor"]
    params, _, stats = started("regressor", "odd")
    (_, _, new), _ = trained(projection, params, stats, student, teacher)
    y = reference_convolution(wide(student.features[2]), wide(params["kernel"]))
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    np.testing.assert_allclose(new["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * var, rtol=1e-4)
    ours, _, kept = evaluated(projection, params, new, student, teacher)
    jax.tree.map(np.testing.assert_array_equal, kept, new)
    expected = np.maximum((y - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-5), 0.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_review_evaluated_on_a_batchs_statistics_is_the_review_trained_on_that_batch():
    student, teacher = networks("odd")
    projection = KINDS["review, narrow, crossed"]
    params, _, stats = started("review, narrow, crossed", "odd")
    (*expected, once), _ = trained(projection, params, stats, student, teacher)
    batch = jax.tree.map(lambda new, old: (np.asarray(new) - 0.9 * np.asarray(old)) / 0.1, once, stats)
    *views, kept = evaluated(projection, params, batch, student, teacher)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), kept, batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), views, expected)


def test_teacher_statistics_are_those_of_all_batches_together_and_survive_a_dead_channel():
    maps = np.random.default_rng(5).normal(3.0, 2.0, size=(7, 2, 2, 3)).astype(np.float32)
    maps[..., 1] = 0.0
    deep = np.random.default_rng(6).normal(size=(7, 1, 1, 2)).astype(np.float32)
    projections = {"first": room.Projection(-1, 0), "last": room.Projection(), "hint": room.Regressor()}
    fresh = {
        name: {"teacher_mean": jnp.zeros(width), "teacher_std": jnp.ones(width), "mean": jnp.full(width, 7.0)}
        for name, width in (("first", 3), ("last", 2))
    }
    fresh["hint"] = {"mean": jnp.zeros(4)}

    def batches():
        for part in (slice(0, 4), slice(4, 7)):
            logits, stages = jnp.zeros((len(maps[part]), 2)), (jnp.asarray(maps[part]), jnp.asarray(deep[part]))
            yield gj.Outputs(logits, stages, stages[-1].mean((1, 2))), np.zeros(len(logits))

    measured = room.measure_teacher(projections, fresh, batches())  # a generator: one pass serves all
    np.testing.assert_allclose(measured["first"]["teacher_mean"], maps.mean((0, 1, 2)), rtol=1e-5)
    deviation = np.asarray(measured["first"]["teacher_std"])
    np.testing.assert_allclose(deviation[[0, 2]], maps.std((0, 1, 2))[[0, 2]], rtol=1e-5)
    np.testing.assert_allclose(deviation[1], 1e-2 * np.sqrt(maps.var((0, 1, 2)).mean()), rtol=1e-5)
    np.testing.assert_allclose(measured["last"]["teacher_std"], deep.std((0, 1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(measured["last"]["mean"], 7.0)
    assert measured["hint"] is fresh["hint"]


def test_a_teachers_channels_far_from_zero_are_measured_exactly_and_a_dead_layer_keeps_its_scale():
    """The variance is the small difference of two large moments, which float32 would lose."""
    rng = np.random.default_rng(8)
    maps = (1000.0 + rng.normal(size=(50, 4, 4, 2))).astype(np.float32)
    for teacher_maps, mean, deviation in (
        (maps, wide(maps).mean((0, 1, 2)), wide(maps).std((0, 1, 2))),
        (np.zeros_like(maps), np.zeros(2), np.ones(2)),
    ):
        outputs = gj.Outputs(jnp.zeros((50, 2)), (jnp.asarray(teacher_maps),), jnp.zeros((50, 2)))
        fresh = {"last": {"teacher_mean": jnp.zeros(2), "teacher_std": jnp.ones(2)}}
        found = room.measure_teacher({"last": room.Projection()}, fresh, [(outputs, np.zeros(50))])["last"]
        np.testing.assert_allclose(found["teacher_mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(found["teacher_std"], deviation, rtol=1e-5)


def test_every_projection_begins_with_numbers_of_its_own_whatever_the_order_of_the_config():
    student, teacher = networks("odd")
    kinds = {name: room.Projection() for name in ("b", "a", "c")}
    params, _ = room.init_projections(kinds, student, teacher, KEY)
    kernels = [np.asarray(params[name]["kernel"]) for name in "abc"]
    for one, other in itertools.combinations(kernels, 2):
        assert (one != other).all()
    again, _ = room.init_projections(dict(sorted(kinds.items())), student, teacher, KEY)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_class_distances_are_those_of_the_classes_mean_pooled_vectors():
    """Centred class means by hand; class 3 has no image and is unrelated to all."""
    rng = np.random.default_rng(7)
    pooled, labels = rng.normal(size=(9, 4)), np.array([0, 1, 2, 0, 1, 0, 2, 2, 4])
    batches = [
        (gj.Outputs(jnp.zeros((len(part), 5)), (), jnp.asarray(pooled[part], jnp.float32)), labels[part])
        for part in (np.arange(5), np.arange(5, 9))
    ]
    projections = {"classes": room.ClassDistances(sharpness=2.0)}
    params, fresh = room.init_projections(projections, batches[0][0], batches[0][0], KEY)
    assert params == {"classes": {}}
    np.testing.assert_array_equal(fresh["classes"]["class_cost"], 1.0 - np.eye(5))
    stats = room.measure_teacher(projections, fresh, batches)
    means = np.zeros((5, 4))
    for label in (0, 1, 2, 4):
        means[label] = pooled[labels == label].mean(0) - pooled.mean(0)
    for k in range(5):
        for other in range(5):
            norms = np.linalg.norm(means[k]) * np.linalg.norm(means[other])
            related = means[k] @ means[other] / norms if norms else 0.0
            expected = 0.0 if k == other else 1 - np.exp(-2.0 * (1 - related))
            np.testing.assert_allclose(stats["classes"]["class_cost"][k, other], expected, rtol=1e-5, atol=1e-6)
    ours, theirs, _ = room.project(projections, params, stats, batches[0][0], batches[0][0])
    assert ours["classes"] is None
    np.testing.assert_array_equal(theirs["classes"], stats["classes"]["class_cost"])


def test_a_regressor_of_width_alone_keeps_the_students_size():
    student, teacher = networks("twice")
    projection = room.Regressor(2, 2, resize=False)
    params, stats = projection.init(KEY, student, teacher)
    ours, theirs, _ = projection.apply(params, stats, student, teacher, train=True)
    assert ours.shape[1:3] == student.features[2].shape[1:3] and ours.shape[-1] == theirs.shape[-1]
    expected = reference_norm(wide(params), wide(student.features[2]) @ wide(params["kernel"][0, 0]))
    np.testing.assert_allclose(ours, np.maximum(expected, 0.0), rtol=1e-4, atol=1e-5)
    assert projection.describe(student, teacher) == "1x1 convolution, sizes kept, BatchNorm, ReLU"


def test_a_teacher_that_nobody_measures_is_not_passed_through():
    def batches():
        raise AssertionError("was read")
        yield

    stats = {"hint": {"mean": jnp.zeros(4)}}
    assert room.measure_teacher({"hint": room.Regressor()}, stats, batches()) == stats


# --- inside a scan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["regressor", "review, narrow, crossed"])
def test_training_inside_a_scan(kind):
    student, teacher = networks("odd")
    projection = KINDS[kind]

    def loss(params, stats):
        ours, theirs, stats = projection.apply(params, stats, student, teacher, train=True)
        errors = [((a - b) ** 2).mean() for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)]
        return sum(errors), stats

    def step(carry, _):
        params, stats = carry
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats)
        return (jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), stats), value

    params, _, stats = started(kind, "odd")
    (_, tracked), values = compiled_fast(lambda carry: jax.lax.scan(step, carry, length=5))((params, stats))
    (ours, theirs, once), _ = trained(projection, params, stats, student, teacher)
    errors = [((a - b) ** 2).mean() for a, b in zip(*map(jax.tree.leaves, wide((ours, theirs))), strict=True)]
    np.testing.assert_allclose(values[0], sum(errors), rtol=1e-4)
    assert (values[1:] < values[:-1]).all()
    for last, first, fresh in zip(*map(jax.tree.leaves, (tracked, once, stats)), strict=True):
        assert (np.abs(last - fresh) > np.abs(first - fresh)).any()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_pairs_of_stages():
    student, teacher = networks("one")
    assert room.stage_pairs((), student, teacher) == ((1, 1), (2, 2))
    assert room.stage_pairs([[-1, -1], [0, 2]], student, teacher) == ((2, 3), (0, 2))
    assert room.Projection().stages(student, teacher) == ((2, 3),)
    assert room.Embedding().stages(student, teacher) == ()
    assert room.Review(((1, -2),)).stages(student, teacher) == ((1, 2),)
    for pairs, message in (
        (((3, 0),), r"the student has stages 0 to 2 \(or -1 to -3 from the end\), got 3"),
        (((0, -5),), r"the teacher has stages 0 to 3 \(or -1 to -4 from the end\), got -5"),
    ):
        with pytest.raises(ValueError, match=message):
            room.stage_pairs(pairs, student, teacher)
    alone = student._replace(features=student.features[:1])
    with pytest.raises(ValueError, match="pairs must be given: after the stem, the networks have 0 and 3 stages"):
        room.stage_pairs((), alone, teacher)


def test_what_is_refused():
    small, large = outputs(0, (4, 4, 4), pooled=4), outputs(1, (4, 4, 12), pooled=4)
    with pytest.raises(ValueError, match="at least as large as the teacher's, or half as large, got 4x4 and 4x12"):
        room.Regressor(0, 0).init(KEY, small, large)
    for projection, message in (
        (room.Embedding(0), "width must be a positive integer, got 0"),
        (room.Review(((0, 0),), width=-1), "width must be a positive integer, got -1"),
        (room.VariationalRegressor(((0, 0),), hidden=-2), "hidden must be a positive integer, got -2"),
    ):
        with pytest.raises(ValueError, match=message):
            projection.init(KEY, small, large)


def test_descriptions():
    student, teacher = networks("one")
    shapes = jax.eval_shape(lambda s, t: (s, t), student, teacher)
    assert "standardised" in room.Projection().describe(*shapes)
    assert "averaged to the smaller size" in room.VariationalRegressor().describe(*shapes)
    assert room.Embedding(9).describe(*shapes).startswith("pooled vectors of 10 and 7 by affine maps to 9")
    assert "at width 10" in room.Review().describe(*shapes) and "at width 4" in room.Review(width=4).describe(*shapes)
