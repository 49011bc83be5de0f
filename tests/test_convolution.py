"""The convolution rules against direct sums in float64 NumPy, and their derivatives against XLA's own in float64.

The rectifiers against their definition.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from gompertz_jax.models.convolution import conv, depthwise_conv, relu, relu6

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# image, kernel, strides, padding
GEOMETRIES = [
    ((6, 5), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((6, 6), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((7, 5), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((9, 8), (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((5, 6), (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((5, 6), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((6, 6), (2, 3), (3, 2), ((0, 2), (1, 0))),
    ((8, 7), (3, 3), (1, 1), ((0, 0), (0, 0))),
    ((4, 4), (1, 1), (1, 1), ((1, 1), (1, 1))),
    ((7, 7), (2, 2), (3, 3), ((0, 0), (0, 0))),
]
DEPTHWISE_GEOMETRIES = [GEOMETRIES[i] for i in (0, 2, 6, 9)]
WINOGRAD_GEOMETRIES = [(image, (3, 3), (1, 1), ((1, 1), (1, 1))) for image in ((4, 3), (8, 5))]
DEPTHWISE, WINOGRAD = {"depthwise": True}, {"channels": 32, "filters": 33}


def reference(x, w, strides, padding):
    """Correlate channel by channel with SciPy at stride 1, then keep every stride-th position."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    out = sum(
        np.stack(
            [
                [signal.correlate(image[:, :, c], w[:, :, c, o], mode="valid", method="direct") for image in x]
                for o in range(w.shape[3])
            ],
            axis=-1,
        )
        for c in range(w.shape[2])
    )
    return out[:, :: strides[0], :: strides[1]]


def depthwise_reference(x, w, strides, padding):
    channels = [reference(x[..., c : c + 1], w[..., c : c + 1], strides, padding) for c in range(x.shape[3])]
    return np.concatenate(channels, axis=3)


def stock(x, w, strides, padding):
    groups = x.shape[3] // w.shape[2]
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def draw(image, kernel, *, batch=2, channels=3, filters=4, depthwise=False, dtype=np.float64, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(batch, *image, channels)).astype(dtype)
    w = generator.normal(size=(*kernel, 1, channels) if depthwise else (*kernel, channels, filters)).astype(dtype)
    return x, w


CASES = [(conv, reference, {}, geometry) for geometry in GEOMETRIES]
CASES += [(depthwise_conv, depthwise_reference, DEPTHWISE, geometry) for geometry in DEPTHWISE_GEOMETRIES]
CASES += [(conv, reference, WINOGRAD, geometry) for geometry in WINOGRAD_GEOMETRIES]
cases = pytest.mark.parametrize(("function", "expected", "sizes", "geometry"), CASES)
# Second order takes long to compile; these have every stride, every kind of padding and every rule.
some_cases = pytest.mark.parametrize(
    ("function", "expected", "sizes", "geometry"), [CASES[i] for i in (0, 2, 5, 6, 8, 12, 15)]
)
functions = pytest.mark.parametrize(
    ("function", "sizes", "geometry"),
    [(conv, {}, GEOMETRIES[1]), (depthwise_conv, DEPTHWISE, GEOMETRIES[1]), (conv, WINOGRAD, WINOGRAD_GEOMETRIES[1])],
    ids=["dense", "depthwise", "winograd"],
)


@cases
def test_output_is_the_direct_sum(function, expected, sizes, geometry):
    image, kernel, strides, padding = geometry
    with jax.enable_x64(True):
        x, w = draw(image, kernel, **sizes)
        got = jax.jit(partial(function, strides=strides, padding=padding))(x, w)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected(x, w, strides, padding), rtol=1e-12, atol=1e-12)


def test_stride_two_reads_the_positions_that_pytorch_reads():
    # torch.nn.functional.conv2d(arange(16).view(1, 1, 4, 4), one at the kernel's centre, stride=2, padding=1)
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    w = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    np.testing.assert_array_equal(
        conv(x, w, strides=(2, 2), padding=((1, 1), (1, 1)))[0, :, :, 0], [[0.0, 2.0], [8.0, 10.0]]
    )


@cases
def test_gradients_agree_with_finite_differences(function, expected, sizes, geometry):
    """Along one random direction: the sums below are polynomials of low degree, exact to rounding by differences."""
    image, kernel, strides, padding = geometry
    with jax.enable_x64(True):
        x, w = draw(image, kernel, **sizes)
        dx, dw = draw(image, kernel, **sizes, seed=1)

        def value(x, w):
            return 0.5 * (expected(x, w, strides, padding) ** 2).sum()

        gradient_x, gradient_w = jax.jit(
            jax.grad(lambda x, w: 0.5 * (function(x, w, strides=strides, padding=padding) ** 2).sum(), (0, 1))
        )(x, w)
        h = 1e-4
        np.testing.assert_allclose(
            np.vdot(gradient_x, dx), (value(x + h * dx, w) - value(x - h * dx, w)) / (2 * h), rtol=1e-8
        )
        np.testing.assert_allclose(
            np.vdot(gradient_w, dw), (value(x, w + h * dw) - value(x, w - h * dw)) / (2 * h), rtol=1e-8
        )


def gradients(f, x, w, order):
    """Gradients of every order up to `order`, of x and w in every sequence, each contracted to a scalar by tanh."""
    result = {}
    scalars = {(): lambda x, w: jnp.tanh(f(x, w)).sum()}
    for length in range(1, order + 1):
        scalars = {
            (*path, argument): jax.grad(scalar, argument) for path, scalar in scalars.items() for argument in (0, 1)
        }
        result |= {path: gradient(x, w) for path, gradient in scalars.items()}
        if length < order:
            scalars = {path: lambda x, w, g=g: jnp.tanh(g(x, w)).sum() for path, g in scalars.items()}
    return result


@some_cases
def test_first_and_second_derivatives_in_any_sequence(function, expected, sizes, geometry):
    image, kernel, strides, padding = geometry
    with jax.enable_x64(True):
        x, w = map(jnp.asarray, draw(image, kernel, **sizes))

        def both(x, w):
            ours = gradients(lambda x, w: function(x, w, strides=strides, padding=padding), x, w, 2)
            return ours, gradients(lambda x, w: stock(x, w, strides, padding), x, w, 2)

        ours, theirs = jax.jit(both)(x, w)
        assert set(ours) == {p for n in (1, 2) for p in itertools.product((0, 1), repeat=n)}
        for path, gradient in ours.items():
            np.testing.assert_allclose(gradient, theirs[path], rtol=1e-9, atol=1e-9, err_msg=str(path))


@functions
def test_third_derivative(function, sizes, geometry):
    image, kernel, strides, padding = geometry
    with jax.enable_x64(True):
        x, w = map(jnp.asarray, draw(image, kernel, **sizes))

        def third(f):
            inner = jax.grad(lambda x, w: jnp.tanh(f(x, w)).sum())
            middle = jax.grad(lambda x, w: jnp.tanh(inner(x, w)).sum(), 1)
            return jax.grad(lambda x, w: jnp.tanh(middle(x, w)).sum(), (0, 1))

        ours = third(lambda x, w: function(x, w, strides=strides, padding=padding))
        theirs = third(lambda x, w: stock(x, w, strides, padding))
        for got, want in zip(jax.jit(ours)(x, w), jax.jit(theirs)(x, w), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def input_gradient_penalty(f):
    """The shape of a gradient-matching step: parameters' gradient of a function of the images' pull-back."""

    def penalty(w, x):
        y, pull_back = jax.vjp(lambda x: jnp.tanh(f(x, w)), x)
        (gradient,) = pull_back(jnp.ones_like(y))
        return (gradient**2).sum() + y.sum()

    return jax.grad(penalty)


CONTEXTS = {
    "jit": lambda f, w, x: f(w, x),
    "scan": lambda f, w, x: jax.lax.scan(lambda total, x: (total + f(w, x), None), jnp.zeros_like(w), x[None])[0],
    "map": lambda f, w, x: jax.lax.map(lambda x: f(w, x), x[None])[0],
    "cond": lambda f, w, x: jax.lax.cond(x.sum() < 1e9, f, lambda w, x: jnp.zeros_like(w), w, x),
    "vmap of images": lambda f, w, x: jax.vmap(f, (None, 0))(w, x[None])[0],
    "vmap of kernels": lambda f, w, x: jax.vmap(f, (0, None))(jnp.stack([w, 2 * w]), x)[0],
    "checkpoint": lambda f, w, x: jax.checkpoint(f)(w, x),
}


@functions
def test_second_order_in_every_context(function, sizes, geometry):
    image, kernel, strides, padding = geometry
    with jax.enable_x64(True):
        x, w = map(jnp.asarray, draw(image, kernel, **sizes))
        ours = input_gradient_penalty(lambda x, w: function(x, w, strides=strides, padding=padding))
        theirs = input_gradient_penalty(lambda x, w: stock(x, w, strides, padding))
        got = jax.jit(lambda w, x: {name: context(ours, w, x) for name, context in CONTEXTS.items()})(w, x)
        want = jax.jit(theirs)(w, x)
        for name in CONTEXTS:
            np.testing.assert_allclose(got[name], want, rtol=1e-10, atol=1e-10, err_msg=name)


@functions
def test_jit_is_eager(function, sizes, geometry):
    image, kernel, strides, padding = geometry
    x, w = map(jnp.asarray, draw(image, kernel, **sizes, dtype=np.float32))

    def gradient(x, w):
        return jax.grad(lambda x, w: (function(x, w, strides=strides, padding=padding) ** 2).sum(), (0, 1))(x, w)

    for eager, jitted in zip(gradient(x, w), jax.jit(gradient)(x, w), strict=True):
        np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=5e-6 * np.abs(eager).max())


@pytest.mark.parametrize(("function", "depthwise"), [(conv, False), (depthwise_conv, True)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_bfloat16_stays_and_is_close(function, depthwise, strides):
    padding = ((1, 1), (1, 1))
    x, w = draw((8, 8), (3, 3), depthwise=depthwise)
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)

    def value(x, w):
        return (function(x, w, strides=strides, padding=padding).astype(jnp.float32) ** 2).sum()

    gradient = jax.jit(jax.grad(value, (0, 1)))
    assert function(x, w, strides=strides, padding=padding).dtype == jnp.bfloat16
    for got, want in zip(gradient(x, w), gradient(x.astype(jnp.float32), w.astype(jnp.float32)), strict=True):
        assert got.dtype == jnp.bfloat16
        assert float(jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max()) < 2e-2


def test_winograd_rounds_like_float32():
    """Root mean square error of the three maps against float64; directly they have 4e-7, on XLA's convolution."""
    x, w = draw((16, 16), (3, 3), batch=8, channels=64, filters=64)
    g, _ = draw((16, 16), (3, 3), batch=8, channels=64, filters=64, seed=1)

    def maps(x, w, g):
        y, pull_back = jax.vjp(lambda x, w: conv(x, w, padding=((1, 1), (1, 1))), x, w)
        return y, *pull_back(g)

    rounded = jax.jit(maps)(*(np.float32(a) for a in (x, w, g)))
    with jax.enable_x64(True):
        exact = jax.jit(maps)(x, w, g)
    for got, want in zip(rounded, exact, strict=True):
        assert got.dtype == np.float32
        assert np.linalg.norm(got - np.asarray(want)) < 3e-6 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("dtype", "height", "channels", "convolutions"),
    [
        (jnp.float32, 16, 32, 6),
        (jnp.float32, 16, 31, 1),
        (jnp.float32, 18, 64, 1),
        (jnp.float32, 32, 32, 1),
        (jnp.bfloat16, 16, 32, 1),
    ],
)
def test_where_winograd_is_chosen(dtype, height, channels, convolutions):
    x = jax.ShapeDtypeStruct((2, height, 7, 64), dtype)
    w = jax.ShapeDtypeStruct((3, 3, 64, channels), dtype)
    traced = jax.jit(partial(conv, padding=((1, 1), (1, 1)))).trace(x, w)
    assert traced.lower(lowering_platforms=("cpu",)).as_text().count("stablehlo.convolution") == convolutions
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.convolution") == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("function", "depthwise"), [(conv, False), (depthwise_conv, True)])
def test_other_backends_get_the_stock_program(function, depthwise, platform):
    """Lowered for an accelerator, the weight gradient is XLA's one dilated convolution: no transposes, no products."""
    x, w = map(jnp.asarray, draw((8, 8), (3, 3), depthwise=depthwise, dtype=np.float32))
    gradient = jax.grad(lambda w, x: function(x, w, strides=(2, 2), padding=((1, 1), (1, 1))).sum())
    text = jax.jit(gradient).trace(w, x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") >= 1
    assert "stablehlo.dot_general" not in text
    assert "rhs_dilate = [2, 2]" in text


@pytest.mark.parametrize("depthwise", [False, True])
def test_no_branch_is_left_in_the_cpu_program(depthwise):
    x, w = map(jnp.asarray, draw((8, 8), (3, 3), depthwise=depthwise, dtype=np.float32))
    function = depthwise_conv if depthwise else conv
    gradient = input_gradient_penalty(lambda x, w: function(x, w, padding=((1, 1), (1, 1))))

    def steps(w, x):
        return jax.lax.scan(lambda w, _: (w - gradient(w, x), None), w, length=2)[0]

    assert "conditional" not in jax.jit(steps).lower(w, x).compile().as_text()


@pytest.mark.parametrize("sizes", [{"channels": 3, "filters": 3}, DEPTHWISE, {"channels": 32, "filters": 32}])
def test_gradients_of_gradients_of_a_scan_over_kernels(sizes):
    """JAX misplaces the residuals of a rule there that are arguments as they are."""
    function = depthwise_conv if sizes is DEPTHWISE else conv
    generator = np.random.default_rng(2)
    with jax.enable_x64(True):
        x, w = map(jnp.asarray, draw((4, 4), (3, 3), **sizes))
        kernels = jnp.asarray(generator.normal(size=(3, *w.shape)) / np.sqrt(w[..., 0].size))

        def layer(function, x, w):
            return jnp.tanh(function(x, w, padding=((1, 1), (1, 1))))

        def in_scan(kernels, x):
            return jax.lax.scan(lambda x, w: (layer(function, x, w), None), x, kernels)[0]

        def one_by_one(kernels, x):
            for w in kernels:
                x = layer(partial(stock, strides=(1, 1)), x, w)
            return x

        got, want = (
            jax.jit(input_gradient_penalty(lambda x, w, network=network: network(w, x)))(kernels, x)
            for network in (in_scan, one_by_one)
        )
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_a_kernel_too_large_is_refused():
    x, w = jnp.zeros((1, 4, 4, 1)), jnp.zeros((7, 7, 1, 1))
    with pytest.raises(ValueError, match=r"kernel of \(7, 7\) does not fit"):
        conv(x, w, padding=((1, 1), (1, 1)))


@pytest.mark.parametrize(("rectify", "ceiling"), [(relu, np.inf), (relu6, 6.0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rectifiers_are_their_definition(rectify, ceiling, dtype):
    x = jnp.array([-np.inf, -2, -0.0, 0, 1e-30, 3, 5.5, 6, 7, np.inf], dtype)
    expected = np.clip(np.asarray(x, np.float64), 0, ceiling)
    passes = [0, 0, 0, 0, 1, 1, 1, *([0, 0, 0] if rectify is relu6 else [1, 1, 1])]
    y, pull_back = jax.vjp(rectify, x)
    (gradient,) = pull_back(jnp.full_like(x, 2))
    assert y.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(np.asarray(y, np.float64), expected)
    np.testing.assert_array_equal(np.asarray(gradient, np.float64), 2.0 * np.array(passes))
    _, tangent = jax.jvp(rectify, (x,), (jnp.full_like(x, 2),))
    np.testing.assert_array_equal(tangent, gradient)
    np.testing.assert_array_equal(jax.jit(rectify)(x), y)


def test_a_rectifier_hides_nothing():
    value, gradient = jax.value_and_grad(relu)(jnp.array(jnp.nan))
    assert np.isnan(value)
    assert gradient == 0


@pytest.mark.parametrize(
    ("rectify", "by_cases"),
    [
        (relu, lambda y: jnp.where(y > 0, y, 0.0)),
        (relu6, lambda y: jnp.where(y > 0, jnp.where(y < 6, y, 6.0), 0.0)),
    ],
    ids=["relu", "relu6"],
)
def test_rectifiers_in_every_order_and_context(rectify, by_cases):
    """Between the kinks a rectifier is linear, so that its derivatives are those of the functions around it."""
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, w = (jnp.asarray(generator.normal(3, 4, (3, 5))) for _ in range(2))
        assert min(float(jnp.abs(x * w - kink).min()) for kink in (0, 6)) > 1e-3

        def third(f):
            inner = jax.grad(lambda w, x: jnp.tanh(f(w * x)).sum(), 1)
            middle = jax.grad(lambda w, x: (inner(w, x) ** 3).sum())
            return jax.grad(lambda w, x: jnp.tanh(middle(w, x)).sum())

        ours = third(rectify)
        want = third(by_cases)(w, x)
        assert np.abs(want).max() > 1e-3
        for name, context in CONTEXTS.items():
            np.testing.assert_allclose(jax.jit(partial(context, ours))(w, x), want, rtol=1e-12, err_msg=name)


def residual_blocks(w, x):
    for _ in range(4):
        x = relu(conv(x, w, padding=((1, 1), (1, 1))) / (1 + jnp.abs(x).mean()) + x)
    return x


@pytest.mark.skipif(jax.version.__version_info__ < (0, 12), reason="in JAX 0.10 XLA drops barriers before it fuses")
def test_on_cpu_what_is_rectified_is_computed_once():
    """With `jax.nn.relu`, every reader of a block's output computes the blocks before it again: 52 maxima for 4."""
    x, w = map(jnp.asarray, draw((8, 8), (3, 3), channels=3, filters=3, dtype=np.float32))
    text = jax.jit(input_gradient_penalty(lambda x, w: residual_blocks(w, x))).lower(w, x).compile().as_text()
    assert text.count(" maximum(") == 4


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_backends_may_fuse_rectifiers(platform):
    x, w = map(jnp.asarray, draw((8, 8), (3, 3), channels=3, filters=3, dtype=np.float32))
    traced = jax.jit(jax.grad(lambda w, x: residual_blocks(w, x).sum())).trace(w, x)
    assert "optimization_barrier" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "optimization_barrier" not in traced.lower(lowering_platforms=(platform,)).as_text()
