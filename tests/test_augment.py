"""Batches as functions of the seed and the step, against plain NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gompertz_jax.training import augment
from gompertz_jax.training.augment import batch_indices, shuffled_index

# The chance of a false alarm where a test compares with a distribution; seeds are fixed, so it was taken once.
RARE = 1e-4

make_batch = jax.jit(augment.make_batch, static_argnames=("batch_size", "padding", "flip", "views"))
augmented_view = jax.jit(augment.augmented_view, static_argnames=("padding", "flip"))
random_crop = jax.jit(augment.random_crop, static_argnums=2)
random_flip = jax.jit(augment.random_flip)


@functools.cache
def permutation(size: int, seed: int) -> np.ndarray:
    return permutations(size, jnp.array([seed]))[0]


def permutations(size: int, seeds: jax.Array) -> np.ndarray:
    def one(seed):
        return shuffled_index(jnp.arange(size), key=jax.random.key(seed), size=size)

    return np.asarray(jax.jit(jax.vmap(one))(seeds))


# The permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 1000, 1437, 45_000, 65_536, 65_537])
def test_every_size_is_permuted(size):
    np.testing.assert_array_equal(np.sort(permutation(size, 7)), np.arange(size))


def test_positions_are_looked_up_one_by_one():
    whole, key = permutation(1000, 3), jax.random.key(3)
    some = jnp.array([[999, 0], [17, 17]])
    found = shuffled_index(some, key=key, size=1000)
    np.testing.assert_array_equal(found, whole[np.asarray(some)])
    assert found.dtype == jnp.int32
    assert int(shuffled_index(jnp.int32(5), key=key, size=1000)) == whole[5]


def test_large_sizes_do_not_overflow():
    size = 2**31 - 1
    found = np.asarray(shuffled_index(jnp.arange(size - 5000, size, dtype=jnp.int32), key=jax.random.key(0), size=size))
    assert found.min() >= 0 and len(set(found.tolist())) == 5000
    assert stats.kstest(found / size, "uniform").pvalue > RARE


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_permutation_is_equally_likely(size):
    codes = permutations(size, jnp.arange(40_000)) @ (size ** np.arange(size))
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == math.factorial(size)
    assert stats.chisquare(counts).pvalue > RARE


@pytest.mark.parametrize("size", [8, 11, 16, 24, 33])
def test_pairs_of_positions_go_anywhere(size):
    found = permutations(size, jnp.arange(40_000))
    for one, other in ((0, 1), (size - 2, size - 1), (0, size // 2), (0, size - 1)):
        counts = np.bincount(found[:, one] * size + found[:, other], minlength=size**2).reshape(size, size)
        assert stats.chisquare(counts[~np.eye(size, dtype=bool)]).pvalue > RARE


def test_neighbours_in_an_epoch_are_unrelated():
    found = permutation(50_000, 0) / 50_000
    for lag in (1, 2, 128, 256, 25_000):
        assert abs(np.corrcoef(found[lag:], found[:-lag])[0, 1]) < 4 / math.sqrt(50_000 - lag)
    steps = np.diff(found) % 1
    assert stats.kstest(steps, "uniform").pvalue > RARE
    assert abs(np.corrcoef(found, np.arange(50_000))[0, 1]) < 4 / math.sqrt(50_000)


def test_permutations_of_neighbouring_keys_are_unrelated():
    first, second = permutation(50_000, 0), permutation(50_000, 1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(50_000)
    assert np.sum(first == second) < 10  # Poisson of mean 1


@pytest.mark.parametrize("size", [0, -1, 2**31])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"size = {size}"):
        shuffled_index(jnp.arange(1), key=jax.random.key(0), size=size)


# Which images make a batch


@jax.jit
def batches(steps: jax.Array, seed: jax.Array) -> jax.Array:
    return jax.vmap(lambda step: batch_indices(step, seed=seed, batch_size=30, size=100))(steps)


def epoch(number: int, *, seed: int = 0) -> np.ndarray:
    return np.asarray(batches(3 * number + jnp.arange(3), jnp.int32(seed)))


def test_an_epoch_visits_no_image_twice_and_leaves_out_others_each_time():
    left_out = []
    for number in range(3):
        visited = epoch(number).ravel()
        assert len(visited) == len(set(visited.tolist())) == 90
        assert visited.min() >= 0 and visited.max() < 100
        left_out.append(frozenset(range(100)) - set(visited.tolist()))
    assert len(set(left_out)) == 3


def test_order_differs_by_seed_and_epoch_and_by_nothing_else():
    np.testing.assert_array_equal(epoch(0), epoch(0))
    assert not np.array_equal(epoch(0), epoch(1))
    assert not np.array_equal(epoch(0), epoch(0, seed=1))


def test_whole_set_as_one_batch():
    assert sorted(batch_indices(3, seed=0, batch_size=7, size=7).tolist()) == list(range(7))


def test_traced_step_and_seed_give_the_same_batch():
    def indices(step, seed):
        return batch_indices(step, seed=seed, batch_size=16, size=1000)

    one = indices(500, 3)
    np.testing.assert_array_equal(jax.jit(indices)(jnp.int32(500), jnp.int32(3)), one)
    scanned = jax.lax.scan(lambda carry, step: (carry, indices(step, 3)), 0, jnp.arange(499, 502))[1]
    np.testing.assert_array_equal(scanned[1], one)


@pytest.mark.parametrize("batch_size", [0, -1, 101])
def test_impossible_batches_are_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size = {batch_size}: must be between 1 and the 100 examples"):
        batch_indices(0, seed=0, batch_size=batch_size, size=100)


# Crops and flips


def windows(image: np.ndarray, padding: int) -> list[np.ndarray]:
    """Every crop of the padded image, as torchvision's RandomCrop may return it."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    corners = range(2 * padding + 1)
    return [padded[top : top + height, left : left + width] for top in corners for left in corners]


def some_images(count: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (count, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("padding", [0, 1, 4, 7])
def test_crops_are_windows_of_the_padded_image(padding, dtype):
    images = some_images(40).astype(dtype)
    cropped = np.asarray(random_crop(jnp.asarray(images), jax.random.key(0), padding))
    assert cropped.dtype == dtype and cropped.shape == images.shape
    for image, crop in zip(images, cropped, strict=True):
        assert any(np.array_equal(crop, window) for window in windows(image, padding))
    if padding == 0:
        np.testing.assert_array_equal(cropped, images)


def test_every_window_is_equally_likely():
    image, padding, count = some_images(1)[0], 2, 20_000
    cropped = np.asarray(random_crop(jnp.tile(image, (count, 1, 1, 1)), jax.random.key(0), padding))
    names = {window.tobytes(): number for number, window in enumerate(windows(image, padding))}
    assert len(names) == 25
    counts = np.bincount([names[crop.tobytes()] for crop in cropped], minlength=25)
    assert stats.chisquare(counts).pvalue > RARE


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match="padding = -1"):
        random_crop(jnp.zeros((2, 4, 4, 1)), jax.random.key(0), -1)


def test_half_of_the_images_are_mirrored_left_to_right():
    images = some_images(10_000, 2, 3, 1)
    flipped = np.asarray(random_flip(jnp.asarray(images), jax.random.key(0)))
    mirrored = np.array([np.array_equal(new, old[:, ::-1]) for new, old in zip(flipped, images, strict=True)])
    same = np.array([np.array_equal(new, old) for new, old in zip(flipped, images, strict=True)])
    assert np.all(mirrored | same)
    assert stats.binomtest(int((mirrored & ~same).sum()), int((mirrored ^ same).sum())).pvalue > RARE


def test_images_of_a_batch_are_changed_independently():
    images = jnp.tile(some_images(1)[0], (64, 1, 1, 1))
    for changed in (random_crop(images, jax.random.key(0), 4), random_flip(images, jax.random.key(0))):
        assert len({image.tobytes() for image in np.asarray(changed)}) > 1
    first, second = (random_crop(images, jax.random.key(seed), 4) for seed in (0, 1))
    assert not np.array_equal(first, second)


# The whole batch


def numbered(count: int = 200) -> tuple[jax.Array, jax.Array]:
    """Images that tell their own number and column: (number, column, 255)."""
    images = np.zeros((count, 4, 5, 3), np.uint8)
    images[..., 0], images[..., 1], images[..., 2] = np.arange(count)[:, None, None], np.arange(5), 255
    return jnp.asarray(images), jnp.arange(count) % 7


def test_batch_without_augmentation_is_the_images_themselves():
    images, labels = some_images(200), np.arange(200) % 7
    batch = make_batch(jnp.asarray(images), jnp.asarray(labels), 4, seed=9, batch_size=16, padding=0, flip=False)
    index = np.asarray(batch_indices(4, seed=9, batch_size=16, size=200))
    np.testing.assert_allclose(batch["image"], images[index].astype(np.float32) / 255, rtol=1.2e-7)
    np.testing.assert_array_equal(batch["label"], labels[index])
    assert batch["image"].dtype == jnp.float32 and batch["label"].dtype == jnp.int32
    assert float(batch["image"].max()) <= 1


def test_labels_stay_with_their_images():
    images, labels = numbered()
    batch = make_batch(images, labels, 2, seed=0, batch_size=150, padding=2, flip=True)
    pixels = np.rint(np.asarray(batch["image"]) * 255).astype(int)
    for picture, label in zip(pixels, np.asarray(batch["label"]), strict=True):
        seen = picture[picture[..., 2] == 255]
        assert len(set(seen[:, 0].tolist())) == 1 and seen[0, 0] % 7 == label
        assert not picture[picture[..., 2] == 0].any()


def test_batch_is_crop_then_flip_of_the_chosen_images():
    images, labels = numbered()
    crops = make_batch(images, labels, 5, seed=1, batch_size=64, padding=2, flip=False)["image"]
    both = np.asarray(make_batch(images, labels, 5, seed=1, batch_size=64, padding=2, flip=True)["image"])
    index = np.asarray(batch_indices(5, seed=1, batch_size=64, size=200))
    mirrored = 0
    for number, crop, result in zip(index, np.asarray(crops), both, strict=True):
        allowed = [window.astype(np.float32) / 255 for window in windows(np.asarray(images[number]), 2)]
        assert any(np.allclose(crop, window, rtol=1e-6) for window in allowed)
        assert np.array_equal(result, crop) or np.array_equal(result, crop[:, ::-1])
        mirrored += np.array_equal(result, crop[:, ::-1]) and not np.array_equal(result, crop)
    assert 16 < mirrored < 48


def test_batch_depends_on_seed_and_step_alone():
    images, labels = numbered()

    settings = {"batch_size": 16, "padding": 2, "flip": True}

    def batch(step, seed=0):
        return augment.make_batch(images, labels, step, seed=seed, **settings)

    np.testing.assert_array_equal(
        make_batch(images, labels, jnp.int32(7), **settings, seed=0)["image"], batch(7)["image"]
    )
    assert not np.array_equal(batch(7)["image"], batch(8)["image"])
    assert not np.array_equal(batch(7)["image"], batch(7, seed=1)["image"])


def test_the_same_image_is_augmented_otherwise_in_the_next_epoch():
    images, labels = numbered(1)
    seen = {
        np.asarray(make_batch(images, labels, step, seed=0, batch_size=1, padding=4, flip=True)["image"]).tobytes()
        for step in range(20)
    }
    assert len(seen) > 10


# Views


def test_a_view_is_of_the_seed_its_number_and_the_image_alone():
    """Wherever in an epoch an image comes, in the e-th it is view e mod V, and its stored outputs are of that view."""
    images, labels = numbered()
    settings = {"seed": 3, "padding": 2, "flip": True}
    whole = [np.asarray(augmented_view(images, jnp.arange(200), view, **settings)) for view in range(3)]
    index_of = jax.jit(lambda step: batch_indices(step, seed=3, batch_size=60, size=200))
    outputs = {"logits": 1000.0 * jnp.arange(3)[:, None, None] + jnp.arange(200)[:, None] + jnp.zeros((3, 200, 2))}
    for step in (0, 1, 3, 8, 9, 14, 3 * 3 + 1):
        index, view = np.asarray(index_of(step)), step // 3 % 3
        batch = make_batch(images, labels, step, batch_size=60, views=3, outputs=outputs, **settings)
        np.testing.assert_array_equal(batch["image"], whole[view][index])
        np.testing.assert_array_equal(batch["teacher_logits"], np.stack([1000 * view + index] * 2, -1))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = (whole[one] == whole[other]).all((1, 2, 3)).mean()
        assert same < 5 / 50  # of 25 windows, mirrored or not, the two of an image are equal by chance
    other = augmented_view(images, jnp.arange(200), 0, **settings | {"seed": 4})
    assert (whole[0] == other).all((1, 2, 3)).mean() < 5 / 50


@pytest.mark.parametrize("flip", [False, True])
def test_views_that_are_not_moved_are_the_images_mirrored_only_where_told(flip):
    images, _ = numbered()
    seen = np.rint(255 * np.asarray(augmented_view(images, jnp.arange(200), 1, seed=3, padding=0, flip=flip)))
    plain = np.asarray(images)
    as_they_are = (seen == plain).all((1, 2, 3))
    assert (as_they_are | (seen == plain[:, :, ::-1]).all((1, 2, 3))).all()
    assert as_they_are.all() != flip


def test_views_are_moved_and_mirrored_evenly():
    """By where the column that tells 2, and the first row, are found after a crop of one pixel of 3x3 images."""
    images = np.zeros((2000, 3, 3, 1), np.uint8)
    images[:, 1, :, 0] = [50, 100, 150]
    seen = np.asarray(augmented_view(jnp.asarray(images), jnp.arange(2000), 5, seed=0, padding=1, flip=True))
    pixels = np.rint(seen[..., 0] * 255).astype(int)
    row, column = (np.argmax((pixels == 100).any(axis), 1) for axis in (2, 1))
    mirrored = np.array([picture[picture > 0][0] > picture[picture > 0][-1] for picture in pixels])
    counts = np.bincount((row * 3 + column) * 2 + mirrored, minlength=18)
    assert stats.chisquare(counts).pvalue > RARE


@pytest.mark.parametrize(("views", "shape"), [(-1, None), (0, (1, 10, 2)), (3, (2, 10, 2)), (3, (3, 9, 2))])
def test_views_without_their_outputs_are_refused(views, shape):
    images, labels = numbered(10)
    outputs = None if shape is None else {"logits": jnp.zeros(shape)}
    settings = {"seed": 0, "batch_size": 2, "padding": 0, "flip": False}
    with pytest.raises(ValueError, match=f"views = {views}: must not be negative, and outputs"):
        augment.make_batch(images, labels, 0, views=views, outputs=outputs, **settings)


def test_grey_images_of_any_shape():
    images = jnp.asarray(some_images(10, 8, 3, 1))
    batch = make_batch(images, jnp.zeros(10, jnp.int32), 0, seed=0, batch_size=4, padding=1, flip=True)
    assert batch["image"].shape == (4, 8, 3, 1)
