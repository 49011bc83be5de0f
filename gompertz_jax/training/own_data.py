"""A user's own images: a folder of them, NumPy arrays in a file, or any TFDS data set of images with labels."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DataError
from .images import Split, check_labels
from .sharding import say

FORMS = {"folder": "folder:PATH", "arrays": "arrays:FILE.npz", "tfds": "tfds:NAME"}
LISTED = 10  # images or classes that a message names, at most

_GREY = {"1", "L"}
_COLOUR = {"LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


def is_own(name: str) -> bool:
    """Whether `data.name` has one of the forms that this module reads."""
    form, _, place = name.partition(":")
    return form in FORMS and bool(place)


def read(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int = 0,
    like: tuple[int, ...] | None = None,
) -> tuple[Split, tuple[str, ...]]:
    """Read all images of a split into memory.

    Reading "train" reads "test" too, and drops it: what is wrong with it is reported before a run, not after. Classes
    without a test image are told.

    - `folder:PATH`: `PATH/train/CLASS/*` and `PATH/test/CLASS/*`; classes are the names of the folders, sorted, and the
      order of the images is that of their sorted names. Anything that Pillow opens; turned as EXIF says; grey if all
      are.
    - `arrays:FILE.npz`: `train_images` `[N, h, w, c]` or `[N, h, w]`, uint8, `train_labels` `[N]`, integers from 0,
      `test_images`, `test_labels`, and `class_names` if there are any. Nothing pickled is read.
    - `tfds:NAME`, or `tfds:NAME/CONFIG:VERSION`: its splits `train` and `test` (`validation` where there is no test),
      its features `image` and `label`. It is prepared as array_record unless it is already.

    Args:
      name: one of these.
      split: "train" or "test".
      data_dir: where TFDS keeps data sets.
      image_size: side to which images are brought: the shorter one by Lanczos resampling, the longer one cropped to the
        middle. 0 leaves them as they are, all of one size.
      like: the shape `[h, w, c]` of the other split's images, which these must have.

    Returns:
      The images with their labels, and the names of the classes.

    Raises:
      DataError: something is missing, damaged, of several sizes, or not an image; says what and what to do.
    """
    form, _, place = name.partition(":")
    if form == "folder":
        found, names = _folder(place, split, image_size=image_size, grey=None if like is None else like[-1] == 1)
    elif form == "arrays":
        found, names = _arrays(place, split, image_size=image_size)
    else:
        found, names = _tfds(place, split, image_size=image_size, data_dir=data_dir)
    if not len(found.labels):
        raise DataError(f"{name} has no image in its split {split!r}")
    check_labels(found.labels, len(names), source=f"{name}, {split}")
    if like is not None and found.images.shape[1:] != like:
        raise DataError(
            f"{name}: images of the split {split!r} are {_shape(found.images.shape[1:])}, the others {_shape(like)}; "
            "data.image_size brings them to one size"
        )
    if split == "train":
        test, _ = read(name, "test", data_dir=data_dir, image_size=image_size, like=found.images.shape[1:])
        tell_absent(test.labels, names, f"{name}: no test image")
    return found, names


def tell_absent(labels: np.ndarray, names: Sequence[str], none: str) -> None:
    """Print a warning that names the classes of which there is no label; `none` begins it."""
    there = set(labels.tolist())
    if absent := [name for label, name in enumerate(names) if label not in there]:
        say(f"warning: {none} is of class {_listed(absent, ', ')}")


def _listed(items: Sequence[str], between: str) -> str:
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return between.join(items[:LISTED]) + more


def _folder(place: str, split: str, *, image_size: int, grey: bool | None) -> tuple[Split, tuple[str, ...]]:
    root = Path(place).expanduser()
    folders = {part: root / part for part in ("train", "test")}
    for part, folder in folders.items():
        if not folder.is_dir():
            raise DataError(f"folder:{place}: there is no {folder}; images are expected as {part}/CLASS/IMAGE")
    classes = {
        part: sorted(path.name for path in folder.iterdir() if path.is_dir()) for part, folder in folders.items()
    }
    names = tuple(classes["train"])
    if not names:
        raise DataError(f"{folders['train']} holds no folder of a class; images are expected as train/CLASS/IMAGE")
    if strangers := sorted(set(classes["test"]) - set(names)):
        raise DataError(f"{folders['test']} has classes that {folders['train']} lacks: {', '.join(strangers)}")
    paths, labels = _files(folders[split], names)
    # Pillow decodes outside of Python's lock. A picture is brought to its size as soon as it is decoded: a folder of
    # photographs would not fit into memory as they are.
    with ThreadPoolExecutor() as threads:
        if grey is None:
            grey = all(threads.map(_is_grey, paths))
        decode = partial(_decoded, mode="L" if grey else "RGB", side=image_size)
        arrays = list(threads.map(decode, paths))
        broken = _broken(paths, arrays)
        if broken and split == "train":  # the test images' are told with them
            others, _ = _files(folders["test"], names)
            broken += _broken(others, threads.map(decode, others))
    if broken:
        raise DataError(f"folder:{place}: cannot be read: {_listed(broken, '; ')}; repair or remove them")
    images = _stacked([array for array in arrays if not isinstance(array, str)], paths, place)
    return Split(images, np.array(labels, np.int32)), names


def _files(folder: Path, names: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The files of every class in their sorted order, and their labels."""
    paths, labels = [], []
    for label, name in enumerate(names):
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file() and path.name[0] != ".")
        paths += files
        labels += [label] * len(files)
    return paths, labels


def _broken(paths: Iterable[Path], arrays: Iterable[np.ndarray | str]) -> list[str]:
    return [f"{path} ({found})" for path, found in zip(paths, arrays, strict=True) if isinstance(found, str)]


def _is_grey(path: Path) -> bool:
    """Whether the file's header says so; True for one that cannot be read, which decides nothing."""
    try:
        with Image.open(path) as file:
            return file.mode in _GREY
    except Exception:
        return True


def _decoded(path: Path, *, mode: str, side: int) -> np.ndarray | str:
    """A picture, or what is wrong with the file."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except UnidentifiedImageError:
        return "not an image that Pillow knows"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return " ".join(str(error).split())
    if picture.mode not in _GREY | _COLOUR:
        return f"of mode {picture.mode}, which is not 8 bits a channel"
    return _sized(picture.convert(mode), side)


def _stacked(arrays: Sequence[np.ndarray], names: Sequence[Any], place: str) -> np.ndarray:
    sizes = [array.shape[:2] for array in arrays]
    if len(set(sizes)) > 1:
        odd = next(index for index, size in enumerate(sizes) if size != sizes[0])
        raise DataError(
            f"{place}: images differ in size: {names[0]} is {_shape(sizes[0])}, {names[odd]} is {_shape(sizes[odd])} "
            "(height x width); set data.image_size to bring all to one"
        )
    images = np.stack(arrays) if arrays else np.zeros((0, 1, 1, 1), np.uint8)
    return images[..., None] if images.ndim == 3 else images


def resized(images: np.ndarray, side: int, place: str) -> np.ndarray:
    """Images `[N, h, w, c]`, c = 1 or 3, brought to a side as `read` brings them; `place` is for the message.

    Raises:
      DataError: Pillow has no such channels.

    Examples:
      >>> import numpy as np
      >>> from gompertz_jax.training.own_data import resized
      >>> resized(np.zeros((2, 32, 32, 3), np.uint8), 16, "mine").shape
      (2, 16, 16, 3)
    """
    if images.shape[-1] not in (1, 3):
        raise DataError(f"{place}: images of {images.shape[-1]} channels cannot be resized; set data.image_size = 0")
    squeezed = images[..., 0] if images.shape[-1] == 1 else images
    return _stacked([_sized(Image.fromarray(image), side) for image in squeezed], range(len(images)), place)


def _sized(picture: Image.Image, side: int) -> np.ndarray:
    if side:
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.uint8)


def _arrays(place: str, split: str, *, image_size: int) -> tuple[Split, tuple[str, ...]]:
    path = Path(place).expanduser()
    needed = [f"{part}_{what}" for part in ("train", "test") for what in ("images", "labels")]
    if not path.exists():
        raise DataError(f"data.name: there is no {path}")
    try:
        with path.open("rb") as raw:  # which NumPy would leave open on failure
            if not raw.read(6).startswith((b"PK", b"\x93NUMPY")):
                raise DataError(
                    f"{path} is not an .npz file; np.savez(FILE, {', '.join(f'{key}=...' for key in needed)})"
                )
            raw.seek(0)
            file = np.load(raw, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise DataError(f"{path} is one array; np.savez(FILE, {', '.join(f'{key}=...' for key in needed)})")
            if missing := [key for key in needed if key not in file.files]:
                raise DataError(f"{path} lacks {', '.join(missing)}; it has {', '.join(file.files) or 'nothing'}")
            images, labels = file[f"{split}_images"], file[f"{split}_labels"]
            of_training = labels if split == "train" else file["train_labels"]
            given = file["class_names"] if "class_names" in file.files else None
    except DataError:
        raise
    except Exception as error:  # zipfile's, zlib's, NumPy's: whatever a damaged file raises
        raise DataError(f"{path} cannot be read: {error}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{path}: {split}_images is {images.dtype} of shape {images.shape}; it must be uint8, 0 to 255, "
            "[N, height, width, channels] or [N, height, width]"
        )
    if images.ndim == 4 and images.shape[-1] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        raise DataError(
            f"{path}: {split}_images is of shape {images.shape}, channels first; it must have the channels last: "
            "np.moveaxis(images, 1, -1)"
        )
    for part, found in ((split, labels), ("train", of_training)):
        if not np.issubdtype(found.dtype, np.integer) or found.ndim != 1:
            raise DataError(f"{path}: {part}_labels is {found.dtype} of shape {found.shape}; it must be integers, [N]")
        if found.min(initial=0) < 0:
            raise DataError(f"{path}: {part}_labels has {found.min()}; labels start at 0")
    if len(images) != len(labels):
        raise DataError(f"{path}: {len(images):,} {split}_images and {len(labels):,} {split}_labels")
    if given is not None and (given.dtype.kind != "U" or given.ndim != 1):
        raise DataError(f"{path}: class_names is {given.dtype} of shape {given.shape}; it must be strings, [K]")
    if given is not None and len(given) <= of_training.max(initial=-1):
        raise DataError(
            f"{path}: class_names has {len(given)} names, and train_labels goes up to {of_training.max()}; name every "
            "class from 0 on, or leave class_names out"
        )
    count = int(of_training.max(initial=-1)) + 1
    names = tuple(map(str, range(count))) if given is None else tuple(map(str, given))
    images = images[..., None] if images.ndim == 3 else images
    if image_size:
        images = resized(images, image_size, str(path))
    return Split(np.ascontiguousarray(images), labels.astype(np.int32)), names


def _tfds(
    place: str, split: str, *, image_size: int, data_dir: str | os.PathLike | None
) -> tuple[Split, tuple[str, ...]]:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(place, data_dir=data_dir)
        if not builder.is_prepared():
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            builder.download_and_prepare(file_format="array_record", download_config=config)
        chosen = {"train": "train", "test": next((s for s in ("test", "validation") if s in builder.info.splits), "")}
        if "train" not in builder.info.splits or not chosen["test"]:
            raise DataError(f"tfds:{place} has the splits {', '.join(builder.info.splits)}; train and test are needed")
        features: Any = builder.info.features
        if not {"image", "label"} <= set(features) or not isinstance(features["label"], tfds.features.ClassLabel):
            raise DataError(
                f"tfds:{place} has the features {', '.join(features)}; image and label (a class) are needed"
            )
        names = tuple(features["label"].names)
        source = builder.as_data_source(chosen[split])
        examples = [source[index] for index in range(len(source))]
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"tfds:{place}: TFDS needs {error.name or error} for it, which is not installed; install it, or prepare "
            f"the set where it is: tfds build {place} --file_format=array_record"
        ) from error
    except Exception as error:
        first, *others = str(error).splitlines() or [""]
        if "Available datasets" in str(error):  # hundreds of them, and below them those with a name like it
            others = [line for line in others if line.startswith("Did you mean")]
        raise DataError(f"tfds:{place}: {' '.join(' '.join([first, *others]).split())[:400]}") from error
    labels = np.array([example["label"] for example in examples], np.int32)
    pictures = (Image.fromarray(np.squeeze(np.asarray(example["image"], np.uint8))) for example in examples)
    images = [_sized(picture, image_size) for picture in pictures]
    return Split(_stacked(images, range(len(images)), place), labels), names


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
