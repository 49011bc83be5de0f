"""What test_sharding.py runs in a process that sees eight virtual devices: `python eight_devices.py DIR`."""

import inspect
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import small_config, smallest_networks
from test_students import TEACHER, together
from test_students import objectives as arms

import gompertz_jax as gj
from gompertz_jax import compare, models, terms
from gompertz_jax.arms import arm
from gompertz_jax.data_parallel import SHARDED, per_image, shard_batch
from gompertz_jax.models.resnet import BasicBlock, ResNet
from gompertz_jax.projections import Embedding, Regressor
from gompertz_jax.step import TELEMETRY
from gompertz_jax.training import objectives, outputs
from gompertz_jax.training.augment import augmented_view
from gompertz_jax.training.data import load
from gompertz_jax.training.feed import Feed, Images
from gompertz_jax.training.sharding import data_mesh, replicate

BATCH, STEPS, SHAPE = 16, 3, (8, 8, 3)
LOSSES = {name: loss.term for name, loss in objectives.LOSSES.items()} | {
    "gradient_match": partial(terms.gradient_match, pool=2),
    "gradient_match_stage": partial(terms.gradient_match, pool=2, stages=(-1, -1)),
    "wasserstein_batch": partial(terms.wasserstein, cloud="batch"),
    "wasserstein_class": partial(terms.wasserstein, cloud="class"),
}
PROJECTIONS = {
    inspect.signature(loss.term).parameters["projection"].default: loss.projection
    for loss in objectives.LOSSES.values()
    if loss.projection is not None
} | {"embedding": Embedding(8), "hint": Regressor(-1, -1)}


def objective():
    """All terms; which of them count is a function of the step, so that one program serves every case.

    The first three steps have the first term alone, the next three the second, and so on; the last three have the mean
    of all, because under their sum, steps are so long that rounding grows a hundredfold.
    """
    table = np.concatenate([np.eye(len(LOSSES)), np.full((1, len(LOSSES)), 1 / len(LOSSES))]).astype(np.float32)

    def weight(column):
        return lambda step: jnp.asarray(table[:, column])[step // STEPS]

    listed = [
        gj.Term(
            name,
            weight(column),
            loss,
            distils=name != "cross_entropy",
            gradient_stages=(-1, -1) if name == "gradient_match_stage" else (),
        )
        for column, (name, loss) in enumerate(LOSSES.items())
    ]
    return gj.Objective(tuple(listed), PROJECTIONS)


CASES = (*LOSSES, "all")
MEASURED = ("cross_entropy", "soft_targets", "gradient_match")


def batch():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(BATCH, *SHAPE)).astype(np.float32)
    # Neighbours are alike, so that what is normalised by a device's own images is normalised otherwise.
    images *= np.linspace(0.2, 1, BATCH, dtype=np.float32)[:, None, None, None]
    return {"image": images, "label": np.arange(BATCH, dtype=np.int32) % 10}


def networks():
    return [gj.models.create(name, num_classes=10, key=jax.random.key(0)) for name in smallest_networks()]


def per_device_batch_norm(network, devices):
    """The same network, except that every device normalises by its own images: what must not happen."""

    def apply(params, stats, images, *, train, key=None):
        shares = images.reshape(devices, -1, *images.shape[1:])
        outputs, stats = jax.vmap(lambda share: network.apply(params, stats, share, train=train, key=key))(shares)
        outputs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)
        return outputs, jax.tree.map(lambda a: a.mean(0), stats)

    return gj.Network(apply, network.params, network.stats, network.mean, network.std)


def train(student, teacher, goal, mesh, cases, **options):
    """Losses and final weights of three steps of each case, and the compiled program as text."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = gj.make_train_step(student, optimizer, goal, steps_per_dispatch=STEPS, mesh=mesh, **options)
    fixed = replicate((teacher, batch()), mesh)
    program, found = None, {}
    for case in cases:
        state = gj.init_state(student, optimizer, goal, SHAPE, teacher=teacher)
        state = replicate(state._replace(step=jnp.int32(STEPS * CASES.index(case))), mesh)
        program = program or step.lower(state, *fixed).compile()
        state, metrics = program(state, *fixed)
        weights = jax.tree.leaves((state.params, state.stats, state.projections, state.projection_stats))
        found[f"{case}/losses"] = np.asarray(metrics["loss"])
        found[f"{case}/weights"] = np.concatenate([np.asarray(leaf).ravel() for leaf in weights])
        found |= {f"{case}/{name}/raw": np.asarray(metrics[f"{name}/raw"]) for name in LOSSES if name in case}
        found |= {f"{case}/{name}": np.asarray(values) for name, values in metrics.items() if name.endswith(TELEMETRY)}
    return found, program.as_text()


def students(mesh, layout):
    """Metrics and states of every student of test_students.py, and the compiled program as text.

    Six images do not divide by eight devices, nor do two students a group.
    """
    _, step, begun = together(arms(), (1, 2), layout=layout, mesh=mesh, term_gradients_every=2)
    begun, teacher = replicate((begun, TEACHER), mesh)
    program = step.lower(begun, teacher, None).compile()
    after, metrics = program(begun, teacher, None)
    return {
        str(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path((after, metrics))
    }, program.as_text()


def comparison(workdir, teacher=""):
    """A comparison whose images are on the host and whose batches divide by no eight devices."""
    changes = {"recipe.batch_size": 90, "recipe.epochs": 2, "data.placement": "host", "teacher.dir": teacher}
    config = small_config(**{"recipe.learning_rate": 0.02}, **changes)  # larger steps magnify rounding
    arms = {name: arm(config, name) for name in ("student", "gompertz")}
    compare.compare(config, workdir, arms=arms, seeds=2)


def transport(mesh):
    """The compiled per-image transport and its gradient, alone."""

    def loss(x, y):
        outputs = gj.Outputs(x[:, 0, 0], (x,), x[:, 0, 0])
        maps = {"student_views": {"last": x}, "teacher_views": {"last": y}}
        record = gj.Record(jnp.zeros(BATCH, jnp.int32), outputs, outputs, **maps, per_image=per_image(mesh))
        return terms.wasserstein(record)[0].mean()

    shape = jax.ShapeDtypeStruct((BATCH, 2, 2, 8), jnp.float32, sharding=jax.NamedSharding(mesh, SHARDED))
    return jax.jit(jax.value_and_grad(loss)).lower(shape, shape).compile().as_text()


def batches(mesh):
    """The compiled batches of a dispatch, each divided among the devices."""
    config = small_config()
    data = Images.of(load("digits", validation=100), config.data, mesh)
    with Feed(data, seed=0, batch_size=BATCH, augment=config.augment, steps_per_dispatch=STEPS, mesh=mesh) as feed:
        one_after_another = jax.jit(
            lambda supply: jax.lax.map(
                lambda step: shard_batch(feed.make_batch(supply, step), mesh)["image"].mean(), jnp.arange(STEPS)
            )
        )
        return one_after_another.lower(feed(0)).compile().as_text()


def meeting(mesh):
    """A loop whose devices meet in every iteration, to ask whether all are done: what must not happen."""

    def shrink(x):
        return jax.lax.while_loop(lambda x: (x > 1e-3).any(), lambda x: x * 0.5, x)

    shape = jax.ShapeDtypeStruct((BATCH, 4), jnp.float32, sharding=jax.NamedSharding(mesh, SHARDED))
    return jax.jit(shrink).lower(shape).compile().as_text()


def stored(directory, mesh):
    """What a teacher of four equal blocks, a loop where it is frozen, says of 1,338 images, and says without the loop.

    So many are divided neither by eight devices nor by the batches that are stored.
    """
    models._RECIPES["rows"] = models._Recipe(partial(ResNet, BasicBlock, (4,), (4, 4), stem="cifar"))
    teacher = gj.models.create("rows", num_classes=10, key=jax.random.key(5), in_channels=1)
    config, dataset = small_config(**{"augment.flip": True}), load("digits", validation=100)
    data = Images.of(dataset, config.data, mesh)
    found = outputs.stored_outputs(
        directory, teacher, data, parts=("logits",), views=1, seed=7, augment=config.augment, mesh=mesh
    )
    everyone = jnp.arange(len(dataset.train.labels))
    seen = augmented_view(jnp.asarray(dataset.train.images), everyone, 0, seed=7, padding=1, flip=True)

    def said(images, frozen):
        return teacher.forward(images, train=False, frozen=frozen)[0].logits

    loops = str(jax.make_jaxpr(partial(said, frozen=True))(seen)).count("scan[")
    return {"found": found["logits"][0], "plain": jax.jit(partial(said, frozen=False))(seen), "loops": loops}


def main(directory):
    eight = data_mesh()
    one = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    student, teacher = networks()
    for name, mesh in (("one", one), ("eight", eight)):
        found, text = train(student, teacher, objective(), mesh, CASES)
        np.savez(directory / f"{name}.npz", **found)
        (directory / f"{name}.hlo").write_text(text)
    alone = gj.Objective(objective().terms[:1])
    found, _ = train(per_device_batch_norm(student, eight.size), None, alone, one, ["cross_entropy"])
    np.savez(directory / "per_device.npz", **found)
    for name, mesh, layout in (("one", one, "map"), ("eight", eight, "devices")):
        found, text = students(mesh, layout)
        np.savez(directory / f"students_{name}.npz", **found)
        (directory / f"students_{name}.hlo").write_text(text)
    measured = gj.Objective(tuple(term for term in objective().terms if term.name in MEASURED))
    for name, mesh in (("one", one), ("eight", eight)):
        found, _ = train(student, teacher, measured, mesh, ["all"], term_gradients_every=2)
        np.savez(directory / f"measured_{name}.npz", **found)
    comparison(directory / "comparison")
    np.savez(directory / "stored.npz", **stored(directory / "outputs", eight))
    (directory / "transport.hlo").write_text(transport(eight))
    (directory / "batches.hlo").write_text(batches(eight))
    (directory / "meeting.hlo").write_text(meeting(eight))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
