"""The digits, how images are held out, and what is refused; CIFAR's own tests are in test_cifar.py."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny_config
from PIL import Image
from sklearn.datasets import load_digits

from gompertz_jax.training.data import DataError, load, of_config
from gompertz_jax.training.errors import RunError


def rows(*parts) -> list[tuple]:
    return sorted((int(label), image.tobytes()) for part in parts for image, label in zip(*part, strict=True))


def test_digits_are_scikit_learns():
    data, source = load("digits", validation=0), load_digits()
    images = (source.images * 255 / 16).round().astype(np.uint8)[..., None]
    assert rows(data.train, data.test()) == rows((images, source.target))
    assert data.train.images.dtype == np.uint8 and data.train.labels.dtype == np.int32
    assert data.train.images.min() == 0 and data.train.images.max() == 255
    assert (data.name, data.num_classes, data.class_names) == ("digits", 10, tuple("0123456789"))


def test_digits_test_set_is_a_fixed_stratified_fifth():
    first, second = load("digits", validation=100), load("digits", validation=300, split_seed=5)
    np.testing.assert_array_equal(first.test().images, second.test().images)
    counts, all_counts = np.bincount(first.test().labels), np.bincount(load_digits().target)
    assert counts.tolist() == [round(0.2 * count) for count in all_counts]


def test_validation_and_training_images_part_the_official_training_set():
    whole = load("digits", validation=0)
    data = load("digits", validation=237, split_seed=3)
    assert whole.validation is None
    assert len(data.validation.labels) == 237
    assert rows(data.train, data.validation) == rows(whole.train)


def test_held_out_images_depend_on_the_seed_alone():
    def held(seed: int) -> list:
        return rows(load("digits", validation=200, split_seed=seed).validation)

    assert held(0) == held(0)
    assert held(0) != held(1)
    # Written down, so that a NumPy or a machine that draws otherwise is noticed.
    order = np.argsort(np.random.PCG64(0).random_raw(10), kind="stable")
    assert order.tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_larger_validation_contains_the_smaller():
    small, large = (load("digits", validation=size).validation for size in (50, 100))
    assert set(rows(small)) <= set(rows(large))


def test_fewer_training_images_are_a_part_of_more_and_hold_the_same_ones_out():
    small, large, whole = (load("digits", validation=200, train_images=size) for size in (100, 300, 0))
    assert [len(data.train.labels) for data in (small, large, whole)] == [100, 300, 1238]
    assert set(rows(small.train)) <= set(rows(large.train)) <= set(rows(whole.train))
    assert rows(small.validation) == rows(whole.validation)
    scaled = small.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(small.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    assert len(load("digits", validation=0, train_images=50).train.labels) == 50


def test_every_image_is_brought_to_the_asked_side():
    data, asis = (load("digits", validation=100, image_size=side) for side in (4, 0))
    for part, whole in ((data.train, asis.train), (data.validation, asis.validation), (data.test(), asis.test())):
        assert part.images.shape == (len(whole.labels), 4, 4, 1) and part.images.dtype == np.uint8
        np.testing.assert_array_equal(part.labels, whole.labels)
        expected = [np.asarray(Image.fromarray(image[..., 0]).resize((4, 4), Image.LANCZOS)) for image in whole.images]
        np.testing.assert_array_equal(part.images[..., 0], expected)


def test_statistics_are_of_the_training_part():
    data = load("digits", validation=500)
    scaled = data.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, scaled.std((0, 1, 2)), rtol=1e-12)
    assert data.mean != load("digits", validation=0).mean
    assert all(type(value) is float for value in (*data.mean, *data.std))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "cifar-10"}, "data.name = 'cifar-10' is unknown: did you mean 'cifar10'?"),
        ({"name": "CIFAR100"}, "did you mean 'cifar100'?"),
        ({"name": "digit"}, "did you mean 'digits'?"),
        ({"name": "imagenet"}, "there are 'cifar10', 'cifar100', 'digits', folder:PATH, arrays:FILE.npz"),
        ({"validation": -1}, "validation = -1: must not be negative"),
        ({"validation": 1438}, "validation = 1,438: must leave some of the 1,438 training images of digits"),
        ({"validation": 10**9}, "must leave some of the 1,438"),
        ({"split_seed": -1}, "split_seed = -1: must not be negative"),
        ({"train_images": -1}, "train_images = -1: must not be negative; 0 takes all"),
        ({"train_images": 1400, "validation": 100}, "train_images = 1,400: digits has 1,438 training images"),
        ({"image_size": -4}, "image_size = -4: must lie in [0, 4096]"),
        ({"num_classes": 100}, "num_classes = 100: digits has 10; set it to 10"),
    ],
)
def test_refusals_name_the_value_and_the_way_out(arguments, said):
    with pytest.raises(DataError) as caught:
        load(**{"name": "digits", "validation": 0, **arguments})
    assert said in str(caught.value)
    assert isinstance(caught.value, RunError)


def test_right_class_count_is_accepted():
    assert load("digits", validation=0, num_classes=10).num_classes == 10


def test_digits_need_no_tfds():
    body = (
        "import sys; from gompertz_jax.training.data import load; load('digits', validation=100).test(); "
        "print([name for name in ('tensorflow_datasets', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_config_names_all_of_a_data_set():
    changes = {"validation": 70, "split_seed": 4, "train_images": 300, "image_size": 4}
    ours = of_config(tiny_config(**{f"data.{key}": value for key, value in changes.items()}).data)
    theirs = load("digits", **changes)
    for part in ("train", "validation"):
        for found, expected in zip(getattr(ours, part), getattr(theirs, part), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert ours.train.images.shape == (300, 4, 4, 1)
