"""CIFAR-10 and CIFAR-100 through TFDS without TensorFlow: images are stored as PNG in array_record files.

Where the images come from, in this order, below TFDS's `data_dir`:

1. a set prepared before: `cifar10_png/`, or TFDS's own `cifar10/` if its files are array_record (or `cifar100...`);
2. the official archive, put by hand into `downloads/manual/` under its own name (`cifar-10-binary.tar.gz`);
3. the folder that this archive unpacks to, in `downloads/manual/` (`cifar-10-batches-bin/`);
4. TFDS's download manager, which downloads from the official address unless it has the archive already.

2 to 4 go through the same builder and leave 1 behind; a directory that should be 1 and was never finished is moved into
`set_aside/` beside it and prepared anew. Archives are checked against the checksums that TFDS keeps; the files in them,
and at every reading the images themselves written back as those files, against the checksums below. So whatever their
source, what `read` returns is CIFAR bit for bit, in the official order. Nothing that was found is removed.
"""

import contextlib
import hashlib
import http.client
import io
import os
import random
import ssl
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Int64, UInt8
from PIL import Image
from tensorflow_datasets.core.constants import DATA_DIR
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.resource import get_dl_fname
from tensorflow_datasets.core.utils import tqdm_utils
from tensorflow_datasets.image_classification import cifar

from .errors import DataError
from .files import set_aside
from .images import Split, check_labels

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_PROBE_SECONDS = 10


class BinaryFile(NamedTuple):
    """One official file of records: label bytes, then 1,024 bytes each of red, green and blue.

    Attributes:
      name: in the archive's folder.
      records: how many images.
      sha256: of the whole file, in hexadecimal.
    """

    name: str
    records: int
    sha256: str


class Cifar10Png(cifar.Cifar10):
    """TFDS's CIFAR-10, except that the builder encodes the images itself, so that TFDS needs no TensorFlow for it.

    A set of the same layout is a subclass that replaces the class attributes, `url_infos` among them.

    Attributes:
      URL: of the official archive.
      FOLDER: what the archive unpacks to.
      FILES: the files of each split, in order.
      LABELS: the label bytes of a record, in order, and the file that names each one's classes.
      STOCK: the builder under whose name the same images may have been prepared already.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The official archive as it is, or the folder it unpacks to; neither is required."

    # TFDS looks checksums up by the name of the builder's own module, where there are none.
    url_infos = cifar.Cifar10.url_infos

    URL: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    FOLDER: ClassVar[str] = "cifar-10-batches-bin"
    FILES: ClassVar[Mapping[str, tuple[BinaryFile, ...]]] = {
        "train": (
            BinaryFile("data_batch_1.bin", 10_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
            BinaryFile("data_batch_2.bin", 10_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
            BinaryFile("data_batch_3.bin", 10_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
            BinaryFile("data_batch_4.bin", 10_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
            BinaryFile("data_batch_5.bin", 10_000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        ),
        "test": (
            BinaryFile("test_batch.bin", 10_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
        ),
    }
    LABELS: ClassVar[Mapping[str, str]] = {"label": "batches.meta.txt"}
    STOCK: ClassVar[type[tfds.core.GeneratorBasedBuilder]] = cifar.Cifar10

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        names, splits = _verified(self, *_material(self, dl_manager))
        for key, classes in names.items():
            _features(self)[key].names = classes
        return {split: self._generate_examples(split, records) for split, records in splits.items()}

    def _generate_examples(self, split: str, records: UInt8[np.ndarray, "size width"]) -> Iterator[tuple[int, Any]]:
        images, labels = _from_records(records, len(self.LABELS))
        for index, image in enumerate(images):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            # Keys and identifiers are the stock builder's, so that both kinds of prepared sets read alike.
            values = {key: int(value) for key, value in zip(self.LABELS, labels[index], strict=True)}
            yield index, {"id": f"{split}_{index:05d}", "image": png.getvalue(), **values}


class Cifar100Png(Cifar10Png, cifar.Cifar100):
    """TFDS's CIFAR-100, encoded in the same way."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = cifar.Cifar100.url_infos

    URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    FOLDER = "cifar-100-binary"
    FILES: ClassVar[Mapping[str, tuple[BinaryFile, ...]]] = {
        "train": (BinaryFile("train.bin", 50_000, "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"),),
        "test": (BinaryFile("test.bin", 10_000, "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"),),
    }
    LABELS: ClassVar[Mapping[str, str]] = {
        "coarse_label": "coarse_label_names.txt",
        "label": "fine_label_names.txt",
    }
    STOCK = cifar.Cifar100


BUILDERS: dict[str, type[Cifar10Png]] = {"cifar10": Cifar10Png, "cifar100": Cifar100Png}


def prepare(name: str, *, data_dir: str | os.PathLike | None = None) -> tfds.core.DatasetBuilder:
    """A builder whose files are ready to be read; they are prepared first where that has not been done.

    A preparation writes next to its destination and is renamed when it is complete, so one that was killed leaves only
    an `incomplete.*` directory that nobody reads, and of several at once the first to finish wins.

    Args:
      name: "cifar10" or "cifar100".
      data_dir: where TFDS keeps data sets; None for its default.

    Returns:
      The builder of the module's own set, or of TFDS's if that was prepared as array_record.

    Raises:
      DataError: the data are missing and cannot be downloaded, or what was found is damaged or incomplete.
    """
    builder_class = BUILDERS[name]
    root = None if data_dir is None else os.path.expanduser(data_dir)
    with _quiet():
        found = _prepared(builder_class, root) or _stock(builder_class, root)
        builder = found or _builder(builder_class, root)
    if found is not None:
        return found
    logging.info("Preparing %s in %s, once", name, builder.data_dir)
    with _quiet():
        try:
            builder.download_and_prepare(
                file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        except (OSError, RuntimeError) as error:  # the latter from array_record when the disk is full
            # If another preparation was faster, the rename at the end found its destination taken.
            if (winner := _prepared(builder_class, root)) is not None:
                return winner
            raise DataError(
                f"{name} cannot be prepared in {builder.data_dir}: {error}; choose a data_dir that can be written to "
                "and has 500 MB to spare"
            ) from error
        # The builder that prepared still refers to the directory it wrote in.
        return _builder(builder_class, root)


def read(name: str, split: str, *, data_dir: str | os.PathLike | None = None) -> tuple[Split, tuple[str, ...]]:
    """The images and labels of one split, in the official order, and the names of the classes.

    Args:
      name: "cifar10" or "cifar100" (its hundred fine labels).
      split: "train" or "test"; the other one's images are not touched once the set is prepared.
      data_dir: where TFDS keeps data sets; None for its default.

    Returns:
      The split and the class names in the order of the labels.

    Raises:
      DataError: see `prepare`; or the prepared files are damaged, or their images are not the official ones.
    """
    builder_class = BUILDERS[name]
    builder: Any = prepare(name, data_dir=data_dir)  # as Any: TFDS's decorators hide its methods' signatures
    way_out = f"move {builder.data_dir} away, and the set is prepared anew"
    size = sum(file.records for file in builder_class.FILES[split])
    images = np.empty((size, _SIDE, _SIDE, 3), np.uint8)
    labels = np.empty((size, len(builder_class.LABELS)), np.int64)
    present = np.zeros(size, bool)
    with _quiet():
        try:
            source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
            if len(source) != size:
                raise ValueError(f"{len(source):,} examples instead of {size:,}")
            for example in source:
                # TFDS shuffles what it writes; the identifier is the place in the official files.
                index = int(example["id"].decode().removeprefix(f"{split}_"))
                with Image.open(io.BytesIO(example["image"])) as image:
                    images[index] = np.asarray(image)
                labels[index] = [example[key] for key in builder_class.LABELS]
                present[index] = True
        except Exception as error:  # array_record, protobuf, zlib and Pillow each have their own, with no common base
            raise DataError(f"{name} in {builder.data_dir} cannot be read: {error}; {way_out}") from error
    if not present.all():
        raise DataError(f"{name} in {builder.data_dir} lacks {split} image {np.argmin(present)}; {way_out}")
    for position, key in enumerate(builder_class.LABELS):
        classes = _features(builder)[key].num_classes
        check_labels(labels[:, position], classes, source=f"{name} in {builder.data_dir}, {key}")
    start = 0
    for file in builder_class.FILES[split]:
        part = slice(start, start := start + file.records)
        found = hashlib.sha256(_to_records(images[part], labels[part]).tobytes()).hexdigest()
        if found != file.sha256:
            raise DataError(
                f"{name} in {builder.data_dir} does not have the images or labels of the official {file.name} "
                f"(SHA-256 {found} instead of {file.sha256}); {way_out}"
            )
    own = list(builder_class.LABELS).index("label")
    names = tuple(_features(builder)["label"].names)
    return Split(images, labels[:, own].astype(np.int32)), names


def _prepared(builder_class: type[Cifar10Png], root: str | None) -> tfds.core.DatasetBuilder | None:
    """The module's own set if it is there and finished; what is there and was never finished is moved aside."""
    builder = _builder(builder_class, root)
    if builder.is_prepared():
        return builder
    path = Path(builder.data_dir)
    if path.exists():
        try:
            logging.warning("%s was never finished (no dataset_info.json); it is kept as %s", path, set_aside(path))
        except FileNotFoundError:  # another preparation did the same
            pass
        except OSError as error:
            raise DataError(
                f"{path} is not a prepared data set: it has no dataset_info.json, and cannot be moved away "
                f"({error.strerror}); move it away, and the set is prepared anew"
            ) from error
    return None


def _stock(builder_class: type[Cifar10Png], root: str | None) -> tfds.core.DatasetBuilder | None:
    """TFDS's own set if it is there, complete, and in a form that can be read without TensorFlow."""
    try:
        builder = _builder(builder_class.STOCK, root)
    except DataError:
        return None
    if not builder.data_path.exists() or not builder.is_prepared():
        return None
    formats = {str(getattr(form, "value", form)) for form in builder.info.available_file_formats()}
    keys = {"id", "image", *builder_class.LABELS}
    return builder if "array_record" in formats and keys <= set(_features(builder)) else None


def _builder(builder_class: type[tfds.core.DatasetBuilder], root: str | None) -> tfds.core.DatasetBuilder:
    try:
        return builder_class(data_dir=root)
    except Exception as error:  # whatever TFDS meets in a dataset_info.json that is not one
        where = os.path.join(root or DATA_DIR, builder_class.name, str(builder_class.VERSION))
        raise DataError(f"{where} cannot be read: {error}; move it away, and the set is prepared anew") from error


def _features(builder: tfds.core.DatasetBuilder) -> Any:
    """By name; TFDS declares more kinds of features than these sets have."""
    return builder.info.features


def _material(builder: Cifar10Png, dl_manager: tfds.download.DownloadManager) -> tuple[dict[str, bytes], Path]:
    """The official files by name, and where they were found."""
    downloads, expected = Path(dl_manager.download_dir), (builder.url_infos or {})[builder.URL]
    manual = downloads / "manual"
    with contextlib.suppress(AssertionError):  # TFDS's way to say that it does not exist or is empty
        manual = Path(dl_manager.manual_dir)
    archive, folder = manual / builder.URL.rpartition("/")[2], manual / builder.FOLDER
    offline = f"fetch it elsewhere and put it, as it is or unpacked to {folder.name}/, into {manual}"

    if folder.exists() and not archive.exists():
        return _from_folder(builder, folder), folder
    cached = get_dl_fname(builder.URL, expected.checksum)
    if not any(path.exists() for path in (archive, downloads / cached, downloads / builder.name / cached)):
        reason = _unreachable(builder.URL)  # TFDS itself would try for minutes
        if reason is not None:
            raise DataError(f"{builder.URL} cannot be reached ({reason}): {offline}")
    try:
        # TFDS takes the archive from `manual` if it is there, and checks it against the checksum all the same.
        found = Path(dl_manager.download(builder.URL))
    except NonMatchingChecksumError as error:
        if not archive.exists():
            raise DataError(
                f"what {builder.URL} sent has not the SHA-256 checksum {expected.checksum}: it was cut off or altered; "
                f"try again, or {offline}"
            ) from error
        size = archive.stat().st_size
        if size != expected.size:
            fault = f"has {size:,} bytes instead of {int(expected.size):,}: it was cut off or is another file"
        else:
            fault = f"was altered: its SHA-256 checksum is not {expected.checksum}"
        raise DataError(f"{archive} {fault}; remove it and fetch {builder.URL} again") from error
    except Exception as error:  # of requests, urllib3, ssl or the file system
        raise DataError(f"{builder.URL} cannot be downloaded ({error}): {offline}") from error
    return _from_archive(builder, found), found


def _unreachable(url: str) -> object | None:
    """Why a server cannot be reached; None if it answers in any way. Proxies are the environment's, as for TFDS."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS):
            return None
    except (urllib.error.HTTPError, http.client.HTTPException):
        return None
    except urllib.error.URLError as error:
        # TFDS brings certificates of its own where Python may find none: let it try.
        return None if isinstance(error.reason, ssl.SSLError) else error.reason
    except OSError as error:
        return error


def _from_archive(builder: Cifar10Png, archive: Path) -> dict[str, bytes]:
    """The files in the archive's folder, into memory: nothing is written, whatever paths the archive names.

    Links and devices are passed over, and so is what the official archive does not have, unless it poses as records.
    Unpacked here, since TFDS would do it with TensorFlow.
    """
    files = {}
    largest = max(file.records for of_split in builder.FILES.values() for file in of_split) * (
        len(builder.LABELS) + _PIXELS
    )
    try:
        with tarfile.open(archive, mode="r:gz") as members:
            for member in members:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder != builder.FOLDER or not member.isreg() or not _wanted(builder, name):
                    continue
                if member.size > largest + 1:
                    raise DataError(
                        f"{archive} holds {name} of {member.size:,} bytes, and the largest official file has "
                        f"{largest:,}; remove it and fetch {builder.URL} again"
                    )
                content: Any = members.extractfile(member)
                files[name] = content.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}; remove it and fetch {builder.URL} again") from error
    return files


def _from_folder(builder: Cifar10Png, folder: Path) -> dict[str, bytes]:
    """The files of records in a folder, all of them, and the lists of names."""
    try:
        return {path.name: path.read_bytes() for path in folder.iterdir() if _wanted(builder, path.name)}
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}; unpack {builder.URL} there again") from error


def _wanted(builder: Cifar10Png, name: str) -> bool:
    """Records, also those that the official archive does not have and is refused for, and lists of names."""
    return name.endswith(".bin") or name in builder.LABELS.values()


def _verified(
    builder: Cifar10Png, files: Mapping[str, bytes], where: Path
) -> tuple[dict[str, list[str]], dict[str, UInt8[np.ndarray, "_ width"]]]:
    """Class names per label and records per split, once the files are known to be the official ones."""
    again = f"remove {where.name} and fetch {builder.URL} again"
    official = {file.name: file for of_split in builder.FILES.values() for file in of_split}
    if missing := sorted({*official, *builder.LABELS.values()} - set(files)):
        raise DataError(f"{where} lacks {', '.join(missing)}; {again}")
    if extra := sorted(name for name in files if name.endswith(".bin") and name not in official):
        raise DataError(f"{where} has {', '.join(extra)}, which the official archive has not; {again}")
    width = len(builder.LABELS) + _PIXELS
    for name, file in official.items():
        size = file.records * width
        if len(files[name]) != size:
            fault = "cut off" if len(files[name]) < size else "too long"
            raise DataError(f"{where / name} is {fault}: {len(files[name]):,} bytes instead of {size:,}; {again}")
        if (found := hashlib.sha256(files[name]).hexdigest()) != file.sha256:
            raise DataError(f"{where / name} was altered: SHA-256 {found} instead of {file.sha256}; {again}")
    names = {}
    for key, name in builder.LABELS.items():
        names[key] = files[name].decode("utf-8", "replace").split()
        classes = _features(builder)[key].num_classes
        if not len(names[key]) == len(set(names[key])) == classes:
            raise DataError(f"{where / name} was altered: it does not have {classes} different names; {again}")
    splits = {}
    for split, of_split in builder.FILES.items():
        content = b"".join(files[file.name] for file in of_split)
        splits[split] = np.frombuffer(content, np.uint8).reshape(-1, width)
        for position, key in enumerate(builder.LABELS):
            classes = _features(builder)[key].num_classes
            check_labels(splits[split][:, position], classes, source=f"{where}, {split} records, {key}")
    return names, splits


def _from_records(
    records: UInt8[np.ndarray, "size width"], labels: int
) -> tuple[UInt8[np.ndarray, "size 32 32 3"], UInt8[np.ndarray, "size labels"]]:
    """Images and labels of official records: label bytes, then planes of red, green and blue."""
    planes = records[:, labels:].reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, :labels]


def _to_records(
    images: UInt8[np.ndarray, "size 32 32 3"], labels: Int64[np.ndarray, "size labels"]
) -> UInt8[np.ndarray, "size width"]:
    """The inverse of `_from_records`."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), _PIXELS)
    return np.concatenate([labels.astype(np.uint8), planes], axis=1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS from printing, drawing bars and logging, and from drawing on the program's random numbers.

    It names a directory in preparation by `random`, which programs seed: two with one seed would share the directory.
    """
    verbosity, bars, state = logging.get_verbosity(), getattr(tqdm_utils, "_active", True), random.getstate()
    logging.set_verbosity(logging.ERROR)
    tfds.display_progress_bar(False)
    random.seed()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        random.setstate(state)
        tfds.display_progress_bar(bars)
        logging.set_verbosity(verbosity)
