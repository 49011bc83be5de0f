# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # The losses in your own JAX loop
#
# Every loss and schedule is a pure function. This page puts them into a training loop that is written by hand: two
# small networks of plain functions, the digits of scikit-learn, Optax. Nothing of the shell (configs, checkpoints) is
# used.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gompertz_jax as gj

source = load_digits()
images = jnp.asarray(source.images / 16, jnp.float32)[..., None]
labels = jnp.asarray(source.target, jnp.int32)
train, test = slice(0, 1400), slice(1400, None)

# %% [markdown]
# A network here returns its last map and its logits. Any module of Flax or Equinox does as well.


# %%
def init(key, width):
    keys = jax.random.split(key)
    return {
        "kernel": jax.random.normal(keys[0], (3, 3, 1, width)) / 3,
        "head": jax.random.normal(keys[1], (width, 10)) / width**0.5,
    }


def apply(params, images):
    dimensions = ("NHWC", "HWIO", "NHWC")
    maps = jax.nn.relu(
        jax.lax.conv_general_dilated(images, params["kernel"], (2, 2), "SAME", dimension_numbers=dimensions)
    )
    return maps, maps.mean((1, 2)) @ params["head"]


def accuracy(params):
    return float((apply(params, images[test])[1].argmax(-1) == labels[test]).mean())


# %% [markdown]
# ## A teacher
#
# Wide, and trained on the labels alone.

# %%
STEPS, BATCH = 300, 128
optimizer = optax.adam(optax.cosine_decay_schedule(0.02, STEPS))


def fit(params, loss):
    """Train on a loss of `(params, step, images, labels)`: all steps in one compiled program."""

    def step(carry, number):
        params, state = carry
        chosen = jax.random.randint(jax.random.fold_in(jax.random.key(7), number), (BATCH,), 0, 1400)
        value, gradient = jax.value_and_grad(loss)(params, number, images[chosen], labels[chosen])
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(STEPS)))(
        (params, optimizer.init(params))
    )
    return params, np.asarray(values)


def cross_entropy(params, number, images, labels):
    return gj.cross_entropy(apply(params, images)[1], labels).mean()


teacher, _ = fit(init(jax.random.key(0), 64), cross_entropy)
print(f"teacher {accuracy(teacher):.1%}")

# %% [markdown]
# ## A student under a Gompertz curve
#
# The weight is a function of the step. It is evaluated inside the compiled program, like everything else.

# %%
weight = gj.gompertz_schedule(STEPS)
print([round(float(weight(step)), 3) for step in (0, STEPS // 4, STEPS // 2, STEPS)])


# %% [markdown]
# Each of these losses gives one value per image and lets no gradient through to the teacher. The two maps have other
# widths, so that transport compares what a 1x1 map makes of the student's; it is trained along. Gradient matching takes
# functions from images to one score per image.


# %%
def distillation(params, number, images, labels):
    maps, logits = apply(params["student"], images)
    teacher_maps, teacher_logits = apply(teacher, images)
    soft = gj.soft_target_kl(logits, teacher_logits, temperature=4.0).mean()

    def cloud(maps):
        return maps.reshape(len(maps), -1, maps.shape[-1])

    transport = gj.sinkhorn_distance(cloud(maps @ params["projection"]), cloud(teacher_maps)).mean() / 64

    def top_score(network):
        top = teacher_logits.argmax(-1)
        return lambda images: jnp.take_along_axis(apply(network, images)[1], top[:, None], 1)[:, 0]

    matching = gj.gradient_matching(top_score(params["student"]), top_score(teacher), images).mean()
    supervised = gj.cross_entropy(logits, labels).mean()
    return supervised + weight(number) * (soft + 4.0 * transport + 0.7 * matching)


fresh = init(jax.random.key(1), 8)
projection = jax.random.normal(jax.random.key(2), (8, 64)) / 8**0.5
distilled, losses = fit({"student": fresh, "projection": projection}, distillation)
alone, _ = fit(fresh, cross_entropy)
assert accuracy(teacher) > 0.6 and np.isfinite(losses).all()
print(f"student alone {accuracy(alone):.1%}, distilled {accuracy(distilled['student']):.1%} (one seed)")

# %% [markdown]
# One seed is no result; `gompertz-jax compare` is for that. The sum of the terms rises while the weight does:

# %%
for start in range(0, STEPS, 60):
    print(f"steps {start:3d} to {start + 59:3d}: loss {losses[start : start + 60].mean():.2f}")

# %% [markdown]
# ## The same as one prepared step
#
# `gj.make_train_step` has the parts that this loop leaves out: BatchNorm, shared forward passes, statistics of the
# teacher's channels, a look for NaN inside the step, metrics. It takes any pure network ([Networks](../networks.md)).
