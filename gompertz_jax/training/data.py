"""Image sets in memory: training, held-out and test images as uint8, and the statistics that normalise them."""

import difflib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from . import own_data
from .errors import DataError as DataError
from .images import Split as Split

# How many images each has outside its test set, known without reading it.
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1_438}
NAMES = tuple(IMAGES)
LARGEST_SIDE = 4096

# Which digits are for the test is part of the data set, so it depends on no setting.
_DIGITS_TEST_SEED, _DIGITS_TEST_FRACTION = 1797, 0.2


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as an experiment sees it: the test images stay on disk until `test()`.

    Attributes:
      name: as given to `load`.
      num_classes: labels are in `[0, num_classes)`.
      train: what is trained on, in the order of the source; held-out images are not in it.
      validation: what was held out of the official training set; None if nothing was.
      mean: per channel, of `train` scaled to [0, 1]. Held-out images have no part in it, so that nothing a run learns
        or computes before its selection depends on them.
      std: per channel, of the same images; the population's, over all pixels.
      class_names: in the order of the labels.
      read_test: what `test` calls.
      sha256: checksum of the training images and labels, where they are the user's own; "" where official checksums
        were checked.
    """

    name: str
    num_classes: int
    train: Split
    validation: Split | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    read_test: Callable[[], Split] = field(repr=False)
    sha256: str = ""

    def test(self) -> Split:
        """Read the official test images; for the end of a run, once."""
        return self.read_test()


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    validation: int,
    split_seed: int = 0,
    image_size: int = 0,
    train_images: int = 0,
    num_classes: int | None = None,
) -> Dataset:
    """Read the training images of a data set and hold some of them out.

    "cifar10" and "cifar100" come through TFDS, without TensorFlow (see `gompertz_jax.training.cifar` for where they are
    looked for), in the order of the official files and with the official files' checksums. "digits" is scikit-learn's
    `load_digits`: 1,797 grey images of 8x8, values 0 to 16 scaled to 0 to 255, of which a fixed fifth of each class is
    the test set; it is always there. A user's own images are named "folder:PATH", "arrays:FILE.npz" or "tfds:NAME": see
    `own_data.read`.

    Args:
      name: "cifar10", "cifar100", "digits", or one of these forms.
      data_dir: where TFDS keeps data sets; None for its default, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      validation: training images to hold out; 0 for none.
      split_seed: which ones. The choice is a function of the seed, the number of images and nothing else: it ranks the
        raw output of NumPy's PCG64, whose stream is the same on every machine and in every version.
      image_size: side to which images are brought, see `own_data.resized`; 0 leaves them as they are.
      train_images: how many of those that are not held out to train on, the first in the order that `split_seed` draws,
        so that fewer are a part of more; 0 for all.
      num_classes: classes of the network to train, to be compared with the data's; None to compare nothing.

    Returns:
      The data set. Its arrays belong to the caller.

    Raises:
      DataError: an unknown name; a `validation` that leaves no image to train on; a class count other than the data's;
        missing or damaged data.

    Examples:
      >>> from gompertz_jax.training.data import load
      >>> digits = load("digits", validation=200)
      >>> digits.train.images.shape, len(digits.validation.labels), len(digits.test().labels)
      ((1238, 8, 8, 1), 200, 359)
    """
    check_name(name)
    if not 0 <= image_size <= LARGEST_SIDE:
        raise DataError(f"image_size = {image_size}: must lie in [0, {LARGEST_SIDE}]; 0 leaves images as they are")
    if train_images < 0:
        raise DataError(f"train_images = {train_images}: must not be negative; 0 takes all")
    if split_seed < 0:
        raise DataError(f"split_seed = {split_seed}: must not be negative")
    if validation < 0:
        raise DataError(f"validation = {validation}: must not be negative; 0 holds nothing out")
    sha256 = ""
    if own_data.is_own(name):
        reader = partial(own_data.read, name, data_dir=data_dir, image_size=image_size)
        whole, class_names = reader("train")
        read_test = partial(_own_test, reader, whole.images.shape[1:])
        sha256 = _sha256(whole)
    elif name == "digits":
        whole, class_names = _digits("train"), tuple("0123456789")
        read_test = partial(_digits, "test")
    else:
        from . import cifar  # TFDS takes a second to import, and the digits do without it

        whole, class_names = cifar.read(name, "train", data_dir=data_dir)
        read_test = partial(_cifar_test, name, data_dir)
    if num_classes is not None and num_classes != len(class_names):
        raise DataError(
            f"num_classes = {num_classes}: {name} has {len(class_names)}; "
            f"set it to {len(class_names)} or choose another dataset"
        )
    size = len(whole.labels)
    if validation >= size:
        raise DataError(f"validation = {validation:,}: must leave some of the {size:,} training images of {name}")
    if train_images > size - validation:
        raise DataError(
            f"train_images = {train_images:,}: {name} has {size:,} training images, and validation = {validation:,} of "
            "them are held out; take fewer, or 0 for all"
        )
    rank = _shuffled(size, split_seed)
    # Sorted, so that the training images of two seeds differ by the held-out ones alone.
    chosen = np.sort(rank[validation : validation + (train_images or size)])
    held = np.sort(rank[:validation])
    side = 0 if own_data.is_own(name) else image_size  # a user's own images were resized as they were read
    train = whole if len(chosen) == size else Split(whole.images[chosen], whole.labels[chosen])
    train = _sized(train, side, name)
    mean, std = _statistics(train.images)
    if own_data.is_own(name):
        own_data.tell_absent(train.labels, class_names, f"{name}: no training image")
        if validation:
            own_data.tell_absent(whole.labels[held], class_names, f"{name}: no held-out image")
    return Dataset(
        name=name,
        num_classes=len(class_names),
        train=train,
        validation=None if validation == 0 else _sized(Split(whole.images[held], whole.labels[held]), side, name),
        mean=mean,
        std=std,
        class_names=class_names,
        read_test=lambda: _sized(read_test(), side, name),
        sha256=sha256,
    )


def of_config(data: Any) -> Dataset:
    """The data set that the group `data` of a config, or of a saved config's dict, names.

    Raises:
      DataError: as `load`; nothing can be learned from it, as there is one class, or a channel is constant.
    """
    dataset = load(
        data["name"],
        data_dir=data["data_dir"] or None,
        validation=data["validation"],
        split_seed=data["split_seed"],
        image_size=data["image_size"],
        train_images=data["train_images"],
    )
    if dataset.num_classes < 2:
        raise DataError(
            f"data.name = {dataset.name}: there is one class only, {dataset.class_names[0]!r}; two at least are needed "
            "(in a folder: train/CLASS/IMAGE)"
        )
    if 0.0 in dataset.std:
        where = f" in channel {dataset.std.index(0.0)}" if len(dataset.std) > 1 else ""
        raise DataError(
            f"data.name = {dataset.name}: all training pixels have one value{where}; is the scale 0 to 255?"
        )
    return dataset


def check_name(name: str) -> None:
    """Refuse a name that is not a data set's.

    Raises:
      DataError: with the nearest name, or all of them.
    """
    if name in NAMES or own_data.is_own(name):
        return
    near = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), NAMES, n=1)
    every = ", ".join([*map(repr, NAMES), *own_data.FORMS.values()])
    raise DataError(
        f"data.name = {name!r} is unknown: {f'did you mean {near[0]!r}?' if near else f'there are {every}'}"
    )


def _own_test(reader: Callable[..., tuple[Split, tuple[str, ...]]], shape: tuple[int, ...]) -> Split:
    return reader("test", like=shape)[0]


def _sized(split: Split, side: int, name: str) -> Split:
    return split._replace(images=own_data.resized(split.images, side, name)) if side else split


def _sha256(split: Split) -> str:
    digest = hashlib.sha256(split.images.tobytes())
    digest.update(split.labels.tobytes())
    return digest.hexdigest()


def _cifar_test(name: str, data_dir: str | os.PathLike | None) -> Split:
    from . import cifar

    return cifar.read(name, "test", data_dir=data_dir)[0]


def _digits(part: str) -> Split:
    """Scikit-learn's digits, `part` "train" or "test", in the order of the source."""
    from sklearn.datasets import load_digits

    source: Any = load_digits()
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = source.target.astype(np.int32)
    rank = _shuffled(len(labels), _DIGITS_TEST_SEED)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        members = rank[labels[rank] == label]
        is_test[members[: round(_DIGITS_TEST_FRACTION * len(members))]] = True
    chosen = is_test if part == "test" else ~is_test
    return Split(images[chosen], labels[chosen])


def _shuffled(size: int, seed: int) -> Int64[np.ndarray, "{size}"]:
    """A permutation of `range(size)`. NumPy promises PCG64's stream for good, but not `Generator.permutation`."""
    return np.argsort(np.random.PCG64(seed).random_raw(size), kind="stable")


def _statistics(images: UInt8[np.ndarray, "size height width channels"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel mean and standard deviation in [0, 1]; sums are of integers, hence the same on every machine."""
    mean, std = [], []
    values = np.arange(256)
    for channel in range(images.shape[-1]):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        pixels, total, squares = int(counts.sum()), int(counts @ values), int(counts @ values**2)
        mean.append(total / pixels / 255)
        std.append((pixels * squares - total**2) ** 0.5 / pixels / 255)
    return tuple(mean), tuple(std)
