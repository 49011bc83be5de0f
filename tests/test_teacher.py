"""The gate before the first step, and networks that come back from disk as they were saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gompertz_jax as gj
from gompertz_jax.training import networks
from gompertz_jax.training.data import Dataset, Split
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.sharding import data_mesh
from gompertz_jax.training.teacher import gate

SPEC = {"model": "resnet8", "options": {}, "dtype": "float32"}


def dataset(validation=True, classes=4):
    """Images whose brightness is their class."""
    labels = np.arange(200, dtype=np.int32) % classes
    images = np.broadcast_to((labels * 60).astype(np.uint8)[:, None, None, None], (200, 8, 8, 1)).copy()
    split = Split(images, labels)
    held_out = split if validation else None
    return Dataset("bright", classes, split, held_out, (0.35,), (0.26,), tuple("abcd"[:classes]), lambda: split)


def brightness(weight=20.0, classes=4):
    """A perfect teacher of that data, without a normalisation."""

    def apply(params, stats, images, *, train, key=None):
        level = images.mean((1, 2, 3))[:, None]
        centres = jnp.arange(classes) * 60 / 255
        return gj.Outputs(-params["weight"] * (level - centres) ** 2, (images,), images.mean((1, 2))), stats

    return gj.Network(apply, {"weight": jnp.float32(weight)}, {}, 0.0, 1.0)


def of_normalised_images(dimmed=1.0):
    """A teacher with the data's normalisation: a perfect one, unless it sees the images darker than they are."""

    def apply(params, stats, images, *, train, key=None):
        return brightness().apply(params, stats, (images * 0.26 + 0.35) * dimmed, train=train)

    return brightness().replace(apply=apply, mean=np.float32([0.35]), std=np.float32([0.26]))


@pytest.mark.parametrize("validation", [True, False])
def test_a_good_teacher_passes_with_its_accuracy(validation):
    for floor in (0.9, 1.0):  # the floor itself is enough
        assert gate(brightness(), dataset(validation), floor=floor, origin="here", mesh=data_mesh()) == 1.0


@pytest.mark.parametrize(
    ("teacher", "floor", "message"),
    [
        (brightness(float("nan")), 0.0, r"1 of 1 numbers of \['params'\]\['weight'\] are NaN or infinite; train it"),
        (brightness(float("-inf")), 0.0, r"1 of 1 numbers of \['params'\]\['weight'\] are NaN or infinite"),
        (
            brightness().replace(stats={"var": jnp.array([1.0, jnp.nan, jnp.inf])}),
            0.0,
            r"2 of 3 numbers of \['stats'\]\['var'\] are NaN or infinite",
        ),
        (
            brightness(0.0),
            0.0,
            "classifies 25.0% of the held-out images, and guessing 25.0%: its weights are untrained",
        ),
        (of_normalised_images(0.8), 0.9, "75.0% .* under the floor teacher.min_accuracy = 90.0%"),
    ],
    ids=["nan", "infinite", "statistics", "untrained", "weak"],
)
def test_a_broken_or_weak_teacher_is_refused(teacher, floor, message):
    with pytest.raises(RunError, match=message):
        gate(teacher, dataset(), floor=floor, origin="here", mesh=data_mesh())


def test_a_normalisation_that_is_not_the_teachers_is_seen_by_its_accuracy():
    """A teacher of normalised images classifies worse without that; one that is right without passes as it is."""
    right = of_normalised_images()
    assert gate(right, dataset(), floor=0.9, origin="here", mesh=data_mesh()) == 1.0
    wrong = right.replace(mean=np.float32([0.0]), std=np.float32([1.0]))
    with pytest.raises(RunError, match=r"own normalisation \(mean \[0.\], std \[1.\]\) and 100.0% with that of bright"):
        gate(wrong, dataset(), floor=0.0, origin="here", mesh=data_mesh())


def test_a_saved_network_comes_back_to_the_bit_with_its_normalisation(tmp_path):
    network = networks.network_from(SPEC, dataset(), seed=3)
    networks.save_network(tmp_path, network, networks.network_card(SPEC, dataset()))
    assert networks.network_fault(tmp_path) is None
    assert networks.read_card(tmp_path)["dataset"] == "bright"
    loaded = networks.load_network(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, (loaded.params, loaded.stats), (network.params, network.stats))
    images = jnp.linspace(0, 1, 2 * 64).reshape(2, 8, 8, 1)
    got, expected = (n.forward(images, train=False)[0].logits for n in (loaded, network))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(gj.models.load(tmp_path).forward(images, train=False)[0].logits, expected)
    shapes = networks.load_network(tmp_path, abstract=True)
    assert jax.tree.map(lambda a: a.shape, shapes.params) == jax.tree.map(lambda a: a.shape, network.params)
    np.testing.assert_allclose(shapes.mean, [0.35])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_computes_in_the_dtype_that_its_config_names(dtype):
    network = networks.network_from({**SPEC, "dtype": dtype}, dataset(), seed=3)
    found, _ = jax.eval_shape(lambda images: network.forward(images, train=False), jnp.zeros((2, 8, 8, 1)))
    assert {feature.dtype for feature in found.features} == {jnp.dtype(dtype)}


def test_fingerprints_tell_networks_apart():
    one, same, other = (networks.network_from(SPEC, dataset(), seed=seed) for seed in (3, 3, 4))
    assert networks.fingerprint(one) == networks.fingerprint(same) != networks.fingerprint(other)
    # Its statistics and its normalisation are a part of what it says.
    shifted = jax.tree.map(lambda leaf: leaf + 1, one.stats)
    for changed in (one.replace(stats=shifted), one.replace(mean=one.mean + 0.1), one.replace(std=2 * one.std)):
        assert networks.fingerprint(changed) != networks.fingerprint(one)


def test_what_is_no_network_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no trained network"):
        networks.load_network(tmp_path)
    networks.save_network(
        tmp_path, networks.network_from(SPEC, dataset(), seed=3), networks.network_card(SPEC, dataset())
    )
    (tmp_path / networks.CARD).write_text('{"model": "resnet8"')
    with pytest.raises(RunError, match="cannot be read"):
        networks.load_network(tmp_path)
    (tmp_path / networks.CARD).write_text('{"model": "resnet8"}')
    with pytest.raises(RunError, match="describes no known network"):
        networks.load_network(tmp_path)


def test_models_load_refuses_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match="holds no trained network"):
        gj.models.load(tmp_path)
    networks.save_network(
        tmp_path, networks.network_from(SPEC, dataset(), seed=3), networks.network_card(SPEC, dataset())
    )
    data = max((tmp_path / networks.ARRAYS).rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    assert "was altered or cut off" in networks.network_fault(tmp_path)
    with pytest.raises(ValueError, match=r"network is damaged or no checkpoint: .* was altered or cut off"):
        gj.models.load(tmp_path)


def test_options_that_a_model_does_not_take_are_refused_by_name():
    with pytest.raises(RunError, match="width"):
        networks.network_from({**SPEC, "options": {"width": 2.0}}, dataset(), seed=0)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_good_teacher_of_few_classes_passes_and_guessing_does_not(classes):
    few = dataset(classes=classes)
    assert gate(brightness(classes=classes), few, floor=0.9, origin="here", mesh=data_mesh()) == 1.0
    with pytest.raises(RunError, match="its weights are untrained"):
        gate(brightness(0.0, classes), few, floor=0.0, origin="here", mesh=data_mesh())


def test_a_teacher_that_always_answers_the_largest_class_is_refused():
    labels = np.repeat(np.int32([0, 1, 2, 3]), (80, 40, 40, 40))
    split = Split(np.zeros((200, 8, 8, 1), np.uint8), labels)
    unequal = dataclasses.replace(dataset(), train=split, validation=split)
    with pytest.raises(RunError, match=r"classifies 40.0% of the held-out images, and guessing 40.0%"):
        gate(brightness(), unequal, floor=0.0, origin="here", mesh=data_mesh())


@pytest.mark.parametrize("validation", [True, False])
def test_images_of_one_class_are_not_the_teachers_fault(validation):
    split = Split(np.zeros((5, 8, 8, 1), np.uint8), np.full(5, 2, np.int32))
    one = dataclasses.replace(dataset(), train=split, validation=split if validation else None)
    which = "held-out images" if validation else "training images that it is judged on"
    with pytest.raises(RunError, match=f"^all 5 {which} are of class 'c', .*data.split_seed"):
        gate(brightness(), one, floor=0.0, origin="here", mesh=data_mesh())


def test_a_teacher_is_judged_on_the_held_out_images_and_as_it_is():
    """Not on those it was trained on; and where another normalisation is as good, its own one stays."""
    right = dataset(classes=2)
    wrong = right.train._replace(labels=1 - right.train.labels)
    unlike = dataclasses.replace(right, train=wrong)
    assert gate(brightness(classes=2), unlike, floor=0.9, origin="here", mesh=data_mesh()) == 1.0

    def apply(params, stats, images, *, train, key=None):
        level = images.mean((1, 2, 3))
        brighter = (level > level.mean()).astype(jnp.float32)  # than the others, on whatever scale
        return gj.Outputs(jnp.stack([1 - brighter, brighter], -1), (images,), images.mean((1, 2))), stats

    relative = brightness(classes=2).replace(apply=apply)
    assert gate(relative, right, floor=0.9, origin="here", mesh=data_mesh()) == 1.0
