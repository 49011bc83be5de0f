"""Networks by name: sizes, values against NumPy, normalisation, dtypes, identity, and what is refused."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import SMALLEST
from scipy import signal

import gompertz_jax as gj
from gompertz_jax.models import vgg
from gompertz_jax.models.layers import (
    BatchNorm,
    Draws,
    GroupedPointwise,
    Linear,
    channel_shuffle,
    in_turn,
    max_pool_2x2,
    mean_pool_3x3,
)
from gompertz_jax.models.mobilenet import InvertedResidual, _multiple_of_eight
from gompertz_jax.models.resnet import BasicBlock, Bottleneck
from gompertz_jax.models.shufflenet import HalvingUnit, ShuffleUnit, SplitUnit
from gompertz_jax.models.wrn import PreactivationBlock, WideResNet

THIN = ["16@32", "16@32", "32@16", "64@8"]
THIN_X4 = ["32@32", "64@32", "128@16", "256@8"]
WIDE = ["64@32", "64@32", "128@16", "256@8", "512@4"]
BOTTLENECK = ["64@32", "256@32", "512@16", "1024@8", "2048@4"]
VGG = ["64@32", "128@16", "256@8", "512@4", "512@4"]

# name -> parameters at 100 classes as published or as counted by PyTorch, maps of a 32x32 image, pooled
NETWORKS = {
    "resnet8": (83_892, THIN, 64),
    "resnet14": (181_108, THIN, 64),
    "resnet20": (278_324, THIN, 64),
    "resnet32": (472_756, THIN, 64),
    "resnet44": (667_188, THIN, 64),
    "resnet56": (861_620, THIN, 64),
    "resnet110": (1_736_564, THIN, 64),
    "resnet8x4": (1_233_540, THIN_X4, 256),
    "resnet32x4": (7_433_860, THIN_X4, 256),
    "resnet18": (11_220_132, WIDE, 512),
    "resnet34": (21_328_292, WIDE, 512),
    "resnet50": (23_705_252, BOTTLENECK, 2048),
    "mobilenetv2": (812_836, ["16@16", "12@16", "16@8", "48@4", "160@2", "1280@2"], 1280),
    "wrn_16_1": (180_916, THIN, 64),
    "wrn_16_2": (703_284, ["16@32", "32@32", "64@16", "128@8"], 128),
    "wrn_40_1": (569_780, THIN, 64),
    "wrn_40_2": (2_255_156, ["16@32", "32@32", "64@16", "128@8"], 128),
    "vgg8": (3_965_028, VGG, 512),
    "vgg13": (9_462_180, VGG, 512),
    "shufflenetv1": (949_258, ["24@32", "240@16", "480@8", "960@4"], 960),
    "shufflenetv2": (1_355_528, ["24@32", "116@16", "232@8", "464@4", "1024@4"], 1024),
}


def abstract(name, **options):
    options = {"num_classes": 100, **options}
    return jax.eval_shape(lambda key: gj.models.create(name, key=key, **options), jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes(network, size=32, channels=3, train=False):
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    outputs, _ = jax.eval_shape(lambda network, images: network.forward(images, train=train), network, images)
    return outputs


def small(name="resnet8", classes=10, size=8, channels=1, seed=0, **options):
    network = gj.models.create(name, num_classes=classes, in_channels=channels, key=jax.random.key(seed), **options)
    images = jax.random.uniform(jax.random.key(seed + 1), (4, size, size, channels))
    return network, images


def test_every_network_has_its_row():
    assert {*gj.models.names()} - {*SMALLEST} == {*NETWORKS}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_maps(name):
    parameters, maps, pooled = NETWORKS[name]
    network = abstract(name)
    outputs = shapes(network)
    assert count(network.params) == parameters
    assert [f"{feature.shape[3]}@{feature.shape[1]}" for feature in outputs.features] == maps
    assert outputs.pooled.shape == (2, pooled)
    assert outputs.logits.shape == (2, 100)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((network.params, network.stats)))


@pytest.mark.parametrize(
    ("name", "options", "parameters", "maps"),
    [
        # torchvision's counts at 1000 classes
        ("resnet18", {"stem": "imagenet"}, 11_689_512, ["64@56", "64@56", "128@28", "256@14", "512@7"]),
        ("resnet34", {"stem": "imagenet"}, 21_797_672, ["64@56", "64@56", "128@28", "256@14", "512@7"]),
        ("resnet50", {"stem": "imagenet"}, 25_557_032, ["64@56", "256@56", "512@28", "1024@14", "2048@7"]),
        (
            "mobilenetv2",
            {"stem": "imagenet", "width": 1.0},
            3_504_872,
            ["32@112", "24@56", "32@28", "96@14", "320@7", "1280@7"],
        ),
    ],
)
def test_imagenet_stems(name, options, parameters, maps):
    network = abstract(name, num_classes=1000, **options)
    assert count(network.params) == parameters
    outputs = shapes(network, size=224)
    assert [f"{feature.shape[3]}@{feature.shape[1]}" for feature in outputs.features] == maps


def test_mobilenetv2_stems_on_small_images():
    assert count(abstract("mobilenetv2", stem="imagenet", width=1.0).params) == 2_351_972
    ends = {stem: shapes(abstract("mobilenetv2", stem=stem)).features[-1].shape[1:3] for stem in ("strided", "cifar")}
    assert ends == {"strided": (2, 2), "cifar": (4, 4)}


@pytest.mark.parametrize("name", ["resnet8", "resnet50", "mobilenetv2"])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (33, 4)])
def test_other_image_sizes(name, size, channels):
    outputs = shapes(abstract(name, in_channels=channels), size=size, channels=channels, train=True)
    assert outputs.logits.shape == (2, 100)


@pytest.mark.parametrize("name", ["wrn_16_1", "vgg8", "shufflenetv1", "shufflenetv2"])
def test_odd_images_in_bfloat16(name):
    outputs = shapes(abstract(name, in_channels=4, dtype=jnp.bfloat16), size=33, channels=4, train=True)
    assert {feature.dtype for feature in outputs.features} == {jnp.dtype(jnp.bfloat16)}
    assert outputs.logits.dtype == outputs.pooled.dtype == jnp.float32


# An independent forward pass in NumPy, float64.


def np_conv(x, kernel, stride=1):
    pad = kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    full = np.stack(
        [
            sum(
                np.stack([signal.correlate(image[:, :, c], kernel[:, :, c, o], "valid", "direct") for image in x])
                for c in range(kernel.shape[2])
            )
            for o in range(kernel.shape[3])
        ],
        axis=-1,
    )
    return full[:, ::stride, ::stride]


def np_norm(x, params, stats, train):
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def np_conv_norm(x, params, stats, train, stride=1):
    return np_norm(np_conv(x, params["conv"]["kernel"], stride), params["norm"], stats["norm"], train)


def np_resnet8(params, stats, x, train):
    x = np.maximum(np_conv_norm(x, params["stem"], stats["stem"], train), 0)
    features = [x]
    for stage, stride in (("stage1_block1", 1), ("stage2_block1", 2), ("stage3_block1", 2)):
        p, s = params[stage], stats[stage]
        shortcut = np_conv_norm(x, p["shortcut"], s["shortcut"], train, stride) if "shortcut" in p else x
        x = np.maximum(np_conv_norm(x, p["first"], s["first"], train, stride), 0)
        x = np.maximum(np_conv_norm(x, p["second"], s["second"], train) + shortcut, 0)
        features.append(x)
    pooled = x.mean((1, 2))
    return pooled @ params["head"]["kernel"] + params["head"]["bias"], features, pooled


def scrambled(network, seed=2):
    """The network with positive random scales, biases, means and variances, in float64 NumPy."""
    generator = np.random.default_rng(seed)

    def scramble(leaf):
        leaf = np.asarray(leaf, np.float64)
        return generator.uniform(0.5, 1.5, leaf.shape) if leaf.ndim == 1 else leaf

    return network.replace(params=jax.tree.map(scramble, network.params), stats=jax.tree.map(scramble, network.stats))


@pytest.mark.parametrize("train", [False, True])
def test_resnet8_is_the_numpy_network(train):
    network, images = small()
    with jax.enable_x64(True):
        network, images = scrambled(network), np.asarray(images, np.float64)
        arrays = jax.tree.map(jnp.asarray, (network.params, network.stats, images))
        outputs, _ = jax.jit(network.apply, static_argnames="train")(*arrays, train=train)
        logits, features, pooled = np_resnet8(network.params, network.stats, images, train)
        assert outputs.logits.dtype == jnp.float64
        np.testing.assert_allclose(outputs.logits, logits, rtol=1e-10)
        np.testing.assert_allclose(outputs.pooled, pooled, rtol=1e-10)
        for got, want in zip(outputs.features, features, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("stride", "filters"), [(1, 3), (1, 4), (2, 3)])
@pytest.mark.parametrize("relu6", [False, True])
def test_inverted_residual_is_the_numpy_block(stride, filters, relu6):
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        numbers = jnp.asarray(generator.normal(size=1000), jnp.float32)
        block = InvertedResidual(3, filters, expansion=2, stride=stride, relu6=relu6, draws=Draws(numbers))
        _, params, stats = nnx.split(block, nnx.Param, nnx.BatchStat)
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))
        s = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(stats))
        x = 4 * generator.normal(size=(2, 5, 6, 3))
        ceiling = 6 if relu6 else np.inf
        hidden = np.clip(np_conv_norm(x, p["expand"], s["expand"], False), 0, ceiling)
        kernel = p["depthwise"]["kernel"]
        hidden = np.concatenate(
            [np_conv(hidden[..., c : c + 1], kernel[..., c : c + 1], stride) for c in range(6)], axis=-1
        )
        hidden = np.clip(np_norm(hidden, p["depthwise_norm"], s["depthwise_norm"], False), 0, ceiling)
        want = np_conv_norm(hidden, p["project"], s["project"], False)
        want = want + x if stride == 1 and filters == 3 else want
        np.testing.assert_allclose(jax.jit(lambda x: block(x, train=False))(x), want, rtol=1e-10, atol=1e-12)


def test_vgg_halves_large_images_once_more_and_refuses_the_smallest():
    assert shapes(abstract("vgg8"), size=64).features[-1].shape[1:3] == (4, 4)
    assert shapes(abstract("vgg8"), size=63).features[-1].shape[1:3] == (7, 7)
    network = abstract("vgg8")
    for size, last in (((64, 32), (8, 4)), ((32, 64), (4, 8))):  # the shorter side counts
        images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        outputs = jax.eval_shape(lambda network, images: network.forward(images, train=False)[0], network, images)
        assert outputs.features[-1].shape[1:3] == last
    with pytest.raises(ValueError, match="images must be at least 8x8 for VGG, got 7x7"):
        shapes(abstract("vgg8"), size=7)


def test_pools_groups_and_shuffles_are_the_numpy_ones():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 5, 7, 6)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), (1, 2))[:, ::2, ::2]
    np.testing.assert_array_equal(max_pool_2x2(jnp.asarray(x)), windows.max((-1, -2)))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
    np.testing.assert_allclose(mean_pool_3x3(jnp.asarray(x)), windows.sum((-1, -2)) / 9, rtol=1e-5, atol=1e-6)
    # channel 0 1 2 | 3 4 5 in two groups -> 0 3 1 4 2 5
    np.testing.assert_array_equal(channel_shuffle(jnp.asarray(x), 2), x[..., [0, 3, 1, 4, 2, 5]])
    layer = GroupedPointwise(6, 9, 3, draws=Draws(jnp.asarray(generator.normal(size=18), jnp.float32)))
    kernel = np.asarray(layer.kernel[0, 0])
    want = np.concatenate([x[..., 2 * g : 2 * g + 2] @ kernel[:, 3 * g : 3 * g + 3] for g in range(3)], -1)
    np.testing.assert_allclose(layer(jnp.asarray(x)), want, rtol=1e-5, atol=1e-6)


def test_the_max_pool_of_the_imagenet_stem():
    network = gj.models.create("resnet18", num_classes=2, key=jax.random.key(0), stem="imagenet")
    images = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
    pooled = jax.jit(lambda network: network.forward(images, train=False)[0].features[0])(network)
    params, stats = (jax.tree.map(np.asarray, tree["stem"]) for tree in (network.params, network.stats))
    stem = np.maximum(np_conv_norm(np.asarray(images), params, stats, False, stride=2), 0)
    padded = np.pad(stem, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
    np.testing.assert_allclose(pooled, windows.max((-1, -2)), rtol=1e-4, atol=1e-5)


def test_second_order_agrees_with_finite_differences():
    """The gradient, by the parameters, of a function of logits and input gradients in training mode."""
    network, images = small(classes=3)
    with jax.enable_x64(True):
        network = scrambled(network)
        params, stats, images = jax.tree.map(jnp.asarray, (network.params, network.stats, np.asarray(images, "f8")))

        def value(params):
            logits, pull_back, _ = jax.vjp(
                lambda images: (lambda o, s: (o.logits, s))(*network.apply(params, stats, images, train=True)),
                images,
                has_aux=True,
            )
            (gradient,) = pull_back(jnp.ones_like(logits))
            return (jnp.tanh(gradient) ** 2).sum() + jnp.tanh(logits).sum()

        generator = np.random.default_rng(3)
        direction = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape), params)
        h = 1e-6

        value, gradient = jax.jit(value), jax.jit(jax.grad(value))(params)
        slope = sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        ahead = value(jax.tree.map(lambda p, d: p + h * d, params, direction))
        behind = value(jax.tree.map(lambda p, d: p - h * d, params, direction))
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-5)


# Normalisation


def run_norm(x, train, mean=0.0, var=1.0):
    norm = BatchNorm(x.shape[-1])
    norm.mean[...] = jnp.full(x.shape[-1], mean, jnp.float32)
    norm.var[...] = jnp.full(x.shape[-1], var, jnp.float32)
    norm.scale[...] = jnp.full(x.shape[-1], 2.0, jnp.float32)
    norm.bias[...] = jnp.full(x.shape[-1], 0.5, jnp.float32)
    return norm(x, train=train), norm


def test_batch_norm_in_training_mode():
    x = np.random.default_rng(0).normal(3.0, 2.0, (4, 3, 3, 5)).astype(np.float32)
    y, norm = run_norm(jnp.asarray(x), True, mean=1.0, var=4.0)
    z = x.astype(np.float64)
    want = (z - z.mean((0, 1, 2))) / np.sqrt(z.var((0, 1, 2)) + 1e-5) * 2 + 0.5
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    # torch.nn.BatchNorm2d: momentum 0.1, and the running variance is the unbiased one
    np.testing.assert_allclose(norm.mean[...], 0.9 * 1.0 + 0.1 * z.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 * 4.0 + 0.1 * z.var((0, 1, 2), ddof=1), rtol=1e-6)


def test_batch_norm_in_evaluation_mode():
    x = jnp.asarray(np.random.default_rng(0).normal(3.0, 2.0, (4, 3, 3, 5)), jnp.float32)
    y, norm = run_norm(x, False, mean=1.0, var=4.0)
    np.testing.assert_allclose(y, (x - 1.0) / np.sqrt(4.0 + 1e-5) * 2 + 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(norm.mean[...], np.full(5, 1.0))


def test_batch_norm_far_from_zero_and_of_one_position():
    x = jnp.asarray(np.random.default_rng(0).normal(300.0, 0.1, (8, 4, 4, 2)), jnp.float32)
    y, _ = run_norm(x, True)
    np.testing.assert_allclose(jnp.std(y, (0, 1, 2)), 2.0, rtol=2e-2)
    y, norm = run_norm(jnp.ones((1, 1, 1, 2)), True)
    assert jnp.isfinite(y).all() and jnp.isfinite(norm.var[...]).all()
    gradient = jax.grad(lambda x: run_norm(x, True)[0].sum())(jnp.ones((2, 2, 2, 2)))
    assert jnp.isfinite(gradient).all()


def test_batch_norm_sums_bfloat16_in_float32():
    """65,536 values of 1.0: a sum in bfloat16 stalls at 256."""
    x = jnp.ones((16, 64, 64, 1), jnp.bfloat16) * jnp.asarray(1.5, jnp.bfloat16)
    y, norm = run_norm(x, True, mean=1.5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(norm.mean[...], 1.5, rtol=1e-6)
    assert norm.mean[...].dtype == norm.var[...].dtype == norm.scale[...].dtype == jnp.float32


# dtypes, statistics, identity


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(name):
    network = abstract(name, dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def loss(params, network, images):
        outputs, stats = network.replace(params=params).forward(images, train=True)
        return outputs.logits.sum(), (outputs, stats)

    gradient, (outputs, stats) = jax.eval_shape(jax.grad(loss, has_aux=True), network.params, network, images)
    assert all(feature.dtype == jnp.bfloat16 for feature in outputs.features)
    assert outputs.logits.dtype == outputs.pooled.dtype == jnp.float32
    for tree in (network.params, network.stats, stats, gradient):
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))


def test_bfloat16_is_close_to_float32():
    network, images = small()
    rounded, _ = small(dtype=jnp.bfloat16)
    logits = [jax.jit(lambda n: n.forward(images, train=False)[0].logits)(n) for n in (network, rounded)]
    assert logits[1].dtype == jnp.float32
    assert float(jnp.abs(logits[0] - logits[1]).max()) < 0.05 * float(jnp.abs(logits[0]).max())


def test_statistics_change_in_training_mode_only():
    network, images = small()
    _, after_training = jax.jit(lambda network: network.forward(images, train=True))(network)
    _, after_evaluation = network.forward(images, train=False)
    assert after_evaluation is network.stats
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, after_training, network.stats)
    assert all(jax.tree.leaves(same))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), after_training, network.stats)))


def test_statistics_survive_scan_in_either_precision():
    for dtype in (jnp.float32, jnp.bfloat16):
        network, images = small(dtype=dtype)

        def step(stats, _, network=network, images=images):
            return network.replace(stats=stats).forward(images, train=True)[1], None

        stats, _ = jax.jit(lambda stats, step=step: jax.lax.scan(step, stats, length=2))(network.stats)
        assert jax.tree.structure(stats) == jax.tree.structure(network.stats)


def test_params_are_plain_dicts_of_strings():
    def check(tree):
        assert type(tree) is dict
        for name, child in tree.items():
            assert type(name) is str
            if not isinstance(child, jax.Array):
                check(child)

    network, _ = small()
    check(network.params)
    check(network.stats)


def test_one_apply_per_name_and_options():
    first, images = small(seed=0)
    second, _ = small(seed=5)
    implicit = abstract("mobilenetv2")
    assert first.apply is second.apply
    assert abstract("mobilenetv2", width=0.5, stem="strided").apply is implicit.apply
    assert abstract("mobilenetv2", width=1.0).apply is not implicit.apply
    traces = []

    @jax.jit
    def logits(network):
        traces.append(None)
        return network.forward(images, train=False)[0].logits

    assert (logits(first) != logits(second)).any()
    assert len(traces) == 1


def test_jit_is_eager():
    network, images = small()
    eager, _ = network.forward(images, train=True)
    jitted, _ = jax.jit(lambda network: network.forward(images, train=True))(network)
    for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_equal_keys_equal_parameters_and_shapes_as_announced():
    a, b, c = (gj.models.create("resnet20", num_classes=100, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a.params, b.params)))
    assert (a.params["stem"]["conv"]["kernel"] != c.params["stem"]["conv"]["kernel"]).any()
    announced = abstract("resnet20")
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), announced.params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), a.params
    )


def test_initialisation():
    network = gj.models.create("resnet20", num_classes=100, key=jax.random.key(0))
    params = network.params
    kernel = params["stage3_block2"]["first"]["conv"]["kernel"]  # 36,864 numbers: standard error 0.4 %
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    np.testing.assert_allclose(params["head"]["kernel"].std(), 1 / 8 / np.sqrt(3), rtol=0.04)
    assert jnp.abs(params["head"]["kernel"]).max() <= 1 / 8 and jnp.abs(params["head"]["bias"]).max() <= 1 / 8
    norm = params["stage1_block1"]["first"]["norm"]
    assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
    head = gj.models.create("mobilenetv2", num_classes=100, key=jax.random.key(0)).params["head"]
    np.testing.assert_allclose(head["kernel"].std(), 0.01, rtol=0.02)
    assert (head["bias"] == 0).all()


def test_draws_are_dealt_out_once_each_and_uniform_is_uniform():
    draws = Draws(jax.random.normal(jax.random.key(0), (20_000,)))
    first, second = draws.normal((50, 100), 1.0), draws.normal((50, 100), 1.0)
    assert draws.used == 10_000 and (first != second).all()
    uniform = np.sort(np.asarray(draws.uniform((10_000,), 0.3)))
    expected = np.linspace(-0.3, 0.3, 10_000)
    assert np.abs(uniform - expected).max() < 1.63 * 0.6 / np.sqrt(10_000)  # Kolmogorov-Smirnov at 1 %


def test_linear_rounds_nothing_to_bfloat16():
    layer = Linear(2, 1, draws=Draws(jnp.ones(3)))
    assert layer(jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.float32
    # Nor by an accelerator's products, whose default rounds; a CPU's does not, so only the program shows it.
    assert str(jax.make_jaxpr(layer)(jnp.ones((1, 2)))).count("Precision.HIGHEST") >= 1


def test_normalisation_by_mean_and_std():
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    normalising = gj.models.create("resnet8", num_classes=4, key=jax.random.key(0), mean=mean, std=std)
    plain = gj.models.create("resnet8", num_classes=4, key=jax.random.key(0))
    logits = jax.jit(lambda network, images: network.forward(images, train=False)[0].logits)
    a = logits(normalising, images)
    b = logits(plain, (images - jnp.array(mean)) / jnp.array(std))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet-20", {}, r"name: unknown network 'resnet-20'; did you mean 'resnet20'\? known names: resnet8, "),
        ("wideresnet", {}, r"name: unknown network 'wideresnet'"),
        ("resnet20", {"stem": "imagenet"}, r"stem: resnet20 has no such option \(got 'imagenet'\); its options: none"),
        ("resnet50", {"width": 2}, r"width: resnet50 has no such option \(got 2\); its options: stem"),
        ("resnet50", {"stem": "7x7"}, r"stem must be one of \('cifar', 'imagenet'\), got '7x7'"),
        ("mobilenetv2", {"stem": "7x7"}, r"stem must be one of \('strided', 'cifar', 'imagenet'\), got '7x7'"),
        ("mobilenetv2", {"width": math.nan}, r"width must be a finite number, got nan"),
        ("resnet8", {"num_classes": 2**30}, r"num_classes=1073741824 and in_channels=3 give resnet8 .* parameters"),
        ("mobilenetv2", {"width": 0.0}, r"width must lie in \[1/16, 16\], got 0.0"),
        ("mobilenetv2", {"width": 0.06}, r"width must lie in \[1/16, 16\], got 0.06"),
        ("resnet20", {"num_classes": 1}, r"num_classes must be an integer of at least 2, got 1"),
        ("resnet20", {"in_channels": 0}, r"in_channels must be a positive integer, got 0"),
        ("resnet20", {"dtype": jnp.int32}, r"dtype must be a floating dtype .* got 'int32'"),
        ("resnet20", {"std": 0.0}, r"std must be positive, got 0.0"),
        ("resnet20", {"mean": [0.5, 0.5]}, r"mean must be a finite number or one for each of 3 channels"),
        ("resnet20", {"mean": float("nan")}, r"mean must be a finite number"),
    ],
)
def test_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        gj.models.create(name, key=jax.random.key(0), **{"num_classes": 10, **arguments})


def test_an_option_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"stem must be a word such as 'cifar', got \[1\]"):
        gj.models.create("resnet18", num_classes=10, key=jax.random.key(0), stem=[1])


# Offsets: gradients at a stage

STAGED = {"resnet8": {}, "mobilenetv2": {"width": 0.125, "stem": "cifar"}}


def zero_offsets(network, images):
    outputs, _ = jax.eval_shape(lambda network, images: network.forward(images, train=False), network, images)
    return tuple(jnp.zeros(feature.shape, feature.dtype) for feature in outputs.features)


# in training mode the small one alone: the other takes XLA half a minute there
@pytest.mark.parametrize(("name", "train"), [("resnet8", True), ("mobilenetv2", False)])
def test_gradients_at_every_stage(name, train):
    with jax.enable_x64(True):
        network, images = small(name, classes=3, **STAGED[name])
        network, images = jax.tree.map(jnp.asarray, (scrambled(network), np.asarray(images, "f8")))
        zeros = zero_offsets(network, images)

        @jax.jit
        def score_and_gradients(offsets):
            def score(offsets):
                outputs, _ = network.forward(images, train=train, offsets=offsets)
                return outputs.logits[:, 1].sum(), outputs.features

            return jax.value_and_grad(score, has_aux=True)(offsets)

        (score, features), gradients = score_and_gradients(zeros)
        generator, h = np.random.default_rng(4), 1e-6
        for stage, gradient in enumerate(gradients):
            direction = generator.normal(size=gradient.shape)

            def at(step, stage=stage, direction=direction):
                return score_and_gradients((*zeros[:stage], jnp.asarray(step * direction), *zeros[stage + 1 :]))

            ((ahead, shifted), _), ((behind, _), _) = at(h), at(-h)
            np.testing.assert_allclose((gradient * direction).sum(), (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-8)
            # the map that is recorded includes its offset, and those before it know nothing of it
            np.testing.assert_allclose(shifted[stage] - features[stage], h * direction, rtol=1e-6, atol=1e-14)
            for before in range(stage):
                np.testing.assert_array_equal(shifted[before], features[before])

        # logits = mean over positions @ kernel + bias
        _, height, width, _ = features[-1].shape
        kernel = network.params["head"]["kernel"][:, 1] / (height * width)
        np.testing.assert_allclose(gradients[-1], np.broadcast_to(kernel, gradients[-1].shape), rtol=1e-12)
        total = gj.contribution_map(features[-1], gradients[-1]).sum()
        np.testing.assert_allclose(total, score - len(images) * network.params["head"]["bias"][1], rtol=1e-10)


def test_second_order_at_a_stage_inside_scan_agrees_with_finite_differences():
    with jax.enable_x64(True):
        network, images = small(classes=3)
        network, images = jax.tree.map(jnp.asarray, (scrambled(network), np.asarray(images, "f8")))
        zeros = zero_offsets(network, images)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), network.params)
        generator, h = np.random.default_rng(5), 1e-6
        direction = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape)), params)
        target = jnp.asarray(generator.normal(size=zeros[1].shape[:3]))

        def loss(params):
            def logits(offset):
                learner = network.replace(params=params)
                outputs, _ = learner.forward(images, train=True, offsets=(None, offset, None, None))
                return outputs.logits, outputs.features[1]

            logits, pull_back, feature_map = jax.vjp(logits, zeros[1], has_aux=True)
            (gradient,) = pull_back(gj.top_class(logits))
            return gj.gradient_distance(gj.contribution_map(feature_map, gradient), target).sum()

        def body(params, step):
            moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
            return params, jax.value_and_grad(loss)(moved)

        _, (values, gradients) = jax.jit(lambda params: jax.lax.scan(body, params, jnp.array([-h, 0.0, h])))(params)
        slope = sum(np.vdot(g[1], d) for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))
        np.testing.assert_allclose(slope, (values[2] - values[0]) / (2 * h), rtol=1e-5)
        assert abs(slope) > 1e-3
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            # what follows the last nonlinearity adds nothing to a gradient: some biases get none
            assert np.isfinite(leaf).all() and (leaf[1].any() or path[-1].key == "bias"), path


def loops(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("scan[")


@pytest.mark.parametrize(("name", "rows"), [("resnet32", 3), ("wrn_40_1", 3), ("mobilenetv2", 1), ("shufflenetv2", 3)])
def test_frozen_on_cpu_rows_of_equal_blocks_are_loops_with_the_same_outputs_and_gradients(name, rows, monkeypatch):
    network, images = small(name, classes=3)
    network, zeros = jax.tree.map(jnp.asarray, scrambled(network)), zero_offsets(network, images)

    def score(offsets, frozen):
        outputs, _ = network.forward(images, train=False, offsets=offsets, frozen=frozen)
        return outputs.logits[:, 1].sum(), outputs

    plain, frozen = (jax.value_and_grad(partial(score, frozen=frozen), has_aux=True) for frozen in (False, True))
    for want, got in zip(*(jax.tree.leaves(jax.jit(f)(zeros)) for f in (plain, frozen)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))
    assert loops(lambda: network.forward(images, train=False)) == 0
    assert loops(lambda: network.forward(images, train=False, frozen=True)) == rows
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loops(lambda: network.forward(images, train=False, frozen=True)) == 0


def test_only_equal_blocks_share_a_loop():
    def block(**changes):
        settings = {"channels": 4, "width": 4, "stride": 1, "draws": Draws()}
        return BasicBlock(**{**settings, **changes})

    def turns(*blocks):
        module = SimpleNamespace(loops=True, **dict(zip("abc", blocks, strict=True)))
        return loops(lambda: in_turn(module, "abc", jnp.ones((1, 8, 8, 4)), train=False))

    halved = block()
    halved.first.conv.kernel = nnx.Param(halved.first.conv.kernel[...].astype(jnp.bfloat16))
    assert turns(block(), block(), block()) == 1
    assert turns(block(), block(), block(stride=2)) == 0
    assert turns(block(), block(), block(width=8)) == 0
    assert turns(block(), block(), halved) == 0


@pytest.mark.parametrize("name", [*STAGED, "wrn_16_1", "vgg8", "shufflenetv2"])
def test_offsets_trace_one_addition_each_and_none_where_there_are_none(name):
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    network = abstract(name, **STAGED.get(name, {}))
    zeros = zero_offsets(network, images)

    def program(**options):
        return jax.make_jaxpr(lambda network, images: network.forward(images, train=False, **options))(network, images)

    def primitives(jaxpr):
        return sorted(equation.primitive.name for equation in jaxpr.eqns)

    plain = program()
    assert str(plain) == str(program(offsets=(None,) * len(zeros)))
    assert primitives(program(offsets=zeros)) == sorted([*primitives(plain), *["add"] * len(zeros)])


def test_offsets_of_a_bfloat16_network_keep_its_dtype():
    network, images = small("resnet8", dtype=jnp.bfloat16)
    zeros = tuple(jnp.zeros(zero.shape, jnp.float32) for zero in zero_offsets(network, images))
    outputs, _ = jax.eval_shape(lambda offsets: network.forward(images, train=False, offsets=offsets), zeros)
    assert {feature.dtype for feature in outputs.features} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", STAGED)
def test_offsets_that_do_not_fit_are_refused(name):
    network, images = small(name, **STAGED[name])
    zeros = zero_offsets(network, images)
    for wrong in (zeros[:-1], (*zeros, None), ()):
        with pytest.raises(ValueError, match=f"offsets must have one entry per map, {len(zeros)}, got {len(wrong)}"):
            jax.eval_shape(lambda offsets: network.forward(images, train=False, offsets=offsets), wrong)
    for wrong in (zeros[-1][:1], zeros[-1][..., :1]):
        with pytest.raises(ValueError, match=r"an offset must have the shape of its map, .* got"):
            jax.eval_shape(lambda offsets: network.forward(images, train=False, offsets=offsets), (*zeros[:-1], wrong))


def np_bottleneck(p, s, x, stride):
    shortcut = np_conv_norm(x, p["shortcut"], s["shortcut"], False, stride) if "shortcut" in p else x
    y = np.maximum(np_conv_norm(x, p["reduce"], s["reduce"], False), 0)
    y = np.maximum(np_conv_norm(y, p["middle"], s["middle"], False, stride), 0)
    return np.maximum(np_conv_norm(y, p["expand"], s["expand"], False) + shortcut, 0)


def np_preactivation(p, s, x, stride):
    activated = np.maximum(np_norm(x, p["first_norm"], s["first_norm"], False), 0)
    shortcut = np_conv(activated, p["shortcut"]["kernel"], stride) if "shortcut" in p else x
    y = np_conv(activated, p["first"]["kernel"], stride)
    y = np.maximum(np_norm(y, p["second_norm"], s["second_norm"], False), 0)
    return np_conv(y, p["second"]["kernel"]) + shortcut


def in_float64(module, x, seed=0):
    """A module's values on images, its parameters and its statistics, with scales, biases and moments at random."""
    rng = np.random.default_rng(seed)
    graph, *kinds = nnx.split(module, nnx.Param, nnx.BatchStat)
    params, stats = (
        jax.tree.map(
            lambda leaf: rng.uniform(0.5, 1.5, leaf.shape) if leaf.ndim == 1 else np.asarray(leaf, np.float64),
            nnx.to_pure_dict(kind),
        )
        for kind in kinds
    )
    module = nnx.merge(graph, *jax.tree.map(jnp.asarray, (params, stats)))
    return jax.jit(lambda x: module(x, train=False))(jnp.asarray(x)), params, stats


@pytest.mark.parametrize("widens", [True, False])
@pytest.mark.parametrize(("block", "reference"), [(Bottleneck, np_bottleneck), (PreactivationBlock, np_preactivation)])
def test_blocks_of_deep_networks_are_the_numpy_ones(block, reference, widens):
    width, stride = (3, 2) if widens else (1, 1)
    channels = {Bottleneck: 4, PreactivationBlock: 2 if widens else 1}[block]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = rng.normal(size=(2, 5, 6, channels))
        module = block(channels, width, stride=stride, draws=Draws(jnp.asarray(rng.normal(size=2000))))
        got, params, stats = in_float64(module, x)
        assert ("shortcut" in params) == widens
        np.testing.assert_allclose(got, reference(params, stats, x, stride), rtol=1e-10, atol=1e-12)


def np_depthwise(x, kernel, stride=1):
    channels = [np_conv(x[..., c : c + 1], kernel[..., c : c + 1], stride) for c in range(x.shape[-1])]
    return np.concatenate(channels, axis=-1)


def np_grouped(x, kernel, groups):
    filters = np.split(kernel[0, 0], groups, -1)
    return np.concatenate([a @ w for a, w in zip(np.split(x, groups, -1), filters, strict=True)], -1)


def np_shuffle(x, groups):
    size = x.shape[-1] // groups
    return x[..., [group * size + place for place in range(size) for group in range(groups)]]


def np_shuffle_unit(p, s, x, stride):
    groups = 1 if x.shape[-1] == 24 else 3  # the stem's channels are too few for groups
    y = np.maximum(np_norm(np_grouped(x, p["reduce"]["kernel"], groups), p["reduce_norm"], s["reduce_norm"], False), 0)
    y = np_depthwise(np_shuffle(y, groups), p["depthwise"]["kernel"], stride)
    y = np.maximum(np_norm(y, p["depthwise_norm"], s["depthwise_norm"], False), 0)
    y = np_norm(np_grouped(y, p["expand"]["kernel"], 3), p["expand_norm"], s["expand_norm"], False)
    if stride == 1:
        return np.maximum(y + x, 0)
    mean = np_depthwise(x, np.full((3, 3, 1, x.shape[-1]), 1 / 9), 2)
    return np.maximum(np.concatenate([y, mean], -1), 0)


def np_branch(p, s, x, stride):
    y = np.maximum(np_conv_norm(x, p["first"], s["first"], False), 0)
    y = np_norm(np_depthwise(y, p["depthwise"]["kernel"], stride), p["depthwise_norm"], s["depthwise_norm"], False)
    return np.maximum(np_conv_norm(y, p["second"], s["second"], False), 0)


def np_split_unit(p, s, x, stride):
    kept, changed = np.split(x, 2, -1)
    return np_shuffle(np.concatenate([kept, np_branch(p, s, changed, stride)], -1), 2)


def np_halving_unit(p, s, x, stride):
    left = np_depthwise(x, p["left_depthwise"]["kernel"], stride)
    left = np_norm(left, p["left_depthwise_norm"], s["left_depthwise_norm"], False)
    left = np.maximum(np_conv_norm(left, p["left"], s["left"], False), 0)
    return np_shuffle(np.concatenate([left, np_branch(p, s, x, stride)], -1), 2)


def np_vgg(p, s, x, depths):
    features = []
    for stage, depth in enumerate(depths, start=1):
        if 1 < stage < 5:
            batch, height, width, channels = x.shape
            x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
        for index in range(1, depth + 1):
            name = f"stage{stage}_conv{index}"
            x = np_conv(x, p[name]["conv"]["kernel"]) + p[name]["conv"]["bias"]
            x = np.maximum(np_norm(x, p[name]["norm"], s[name]["norm"], False), 0)
        features.append(x)
    return features, x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


def np_wide(p, s, x):
    x, features = np_conv(x, p["stem"]["kernel"]), []
    for stage in (1, 2, 3):
        features.append(x)
        name = f"stage{stage}_block1"
        x = np_preactivation(p[name], s[name], x, 1 if stage == 1 else 2)
    x = np.maximum(np_norm(x, p["last_norm"], s["last_norm"], False), 0)
    return [*features, x], x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize(
    ("build", "reference", "channels", "stride"),
    [
        (partial(ShuffleUnit, 24, 12, stride=2), np_shuffle_unit, 24, 2),
        (partial(ShuffleUnit, 12, 24, stride=2), np_shuffle_unit, 12, 2),
        (partial(ShuffleUnit, 36, 36, stride=1), np_shuffle_unit, 36, 1),
        (partial(SplitUnit, 6), np_split_unit, 6, 1),
        (partial(HalvingUnit, 3, 8), np_halving_unit, 3, 2),
    ],
    ids=["v1, after the stem", "v1, halving", "v1", "v2", "v2, halving"],
)
def test_units_of_shufflenets_are_the_numpy_ones(build, reference, channels, stride):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = rng.normal(size=(2, 5, 6, channels))
        got, params, stats = in_float64(build(draws=Draws(jnp.asarray(rng.normal(size=3000)))), x)
        np.testing.assert_allclose(got, reference(params, stats, x, stride), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["vgg", "wrn"])
def test_plain_and_wide_networks_are_the_numpy_ones(name, monkeypatch):
    monkeypatch.setattr(vgg, "_WIDTHS", (2, 3, 2, 4, 3))
    rng, depths = np.random.default_rng(1), (1, 2, 1, 1, 2)
    with jax.enable_x64(True):
        x = rng.normal(size=(2, 8, 8, 3))
        options = {"num_classes": 4, "in_channels": 3, "draws": Draws(jnp.asarray(rng.normal(size=100_000)))}
        module = vgg.VGG(depths, **options) if name == "vgg" else WideResNet(10, 1, **options)
        got, params, stats = in_float64(module, x)
        features, logits = np_vgg(params, stats, x, depths) if name == "vgg" else np_wide(params, stats, x)
        np.testing.assert_allclose(got.logits, logits, rtol=1e-9, atol=1e-11)
        for ours, theirs in zip(got.features, features, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_widths_of_the_imagenet_mobilenet_are_multiples_of_eight_and_at_most_a_tenth_below():
    for channels in np.arange(1.0, 400.0, 0.5):
        multiples = 8 * np.arange(1, 60)
        legal = multiples[multiples >= 0.9 * channels]
        nearest = multiples[np.argmin(np.abs(multiples - channels) - 1e-9 * multiples)]  # of two, the larger
        assert _multiple_of_eight(channels) == (nearest if nearest in legal else legal[0])
