"""Images of one's own: three ways to the same run, and what is wrong with a set told by name before anything starts."""

import io
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import small_config
from PIL import Image, ImageOps

from gompertz_jax.training import loop, own_data
from gompertz_jax.training.data import load, of_config
from gompertz_jax.training.errors import DataError, RunError

CLASSES, SHAPE, COUNTS = ("ash", "beech", "cedar"), (12, 10, 3), {"train": 60, "test": 30}


def split(part):
    rng = np.random.default_rng(len(part))
    labels = np.sort(np.arange(COUNTS[part], dtype=np.int32) % len(CLASSES))
    return rng.integers(0, 256, (len(labels), *SHAPE), np.uint8), labels


class Trees(tfds.core.GeneratorBasedBuilder):
    """The same images as a TFDS data set."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=SHAPE), "label": tfds.features.ClassLabel(names=CLASSES)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {part: self._generate_examples(part) for part in COUNTS}

    def _generate_examples(self, part):
        for index, (image, label) in enumerate(zip(*split(part), strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            yield index, {"image": png.getvalue(), "label": int(label)}


def write_folder(root):
    for part in COUNTS:
        for index, (image, label) in enumerate(zip(*split(part), strict=True)):
            path = root / part / CLASSES[label] / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return f"folder:{root}"


def arrays():
    parts = {part: split(part) for part in COUNTS}
    return {f"{part}_{what}": pair[i] for part, pair in parts.items() for i, what in enumerate(("images", "labels"))}


def write_arrays(path, **changes):
    content = {**arrays(), "class_names": np.array(CLASSES), **changes}
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return f"arrays:{path}"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    return {
        "folder": (write_folder(root / "trees"), None),
        "arrays": (write_arrays(root / "trees.npz"), None),
        "tfds": ("tfds:trees", root / "tfds"),
    }


@pytest.mark.parametrize("form", own_data.FORMS)
def test_every_form_gives_the_images_labels_and_classes(names, form):
    name, data_dir = names[form]
    data = load(name, data_dir=data_dir, validation=0)
    images, labels = split("train")
    order = np.lexsort((*data.train.images.reshape(len(labels), -1).T[:3], data.train.labels))
    expected = np.lexsort((*images.reshape(len(labels), -1).T[:3], labels))
    if form != "tfds":  # which shuffles when it prepares
        np.testing.assert_array_equal(data.train.images, images)
    np.testing.assert_array_equal(data.train.images[order], images[expected])
    np.testing.assert_array_equal(data.train.labels[order], labels[expected])
    assert data.class_names == CLASSES and data.num_classes == 3
    np.testing.assert_allclose(data.mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    assert data.test().images.shape == (30, *SHAPE)


def run(name, workdir, **changes):
    config = small_config(
        **{
            "data.name": name, "data.validation": 6, "recipe.batch_size": 18, "recipe.epochs": 1,
            "objective.terms.kd.weight": "0",
        }
        | changes
    )  # fmt: skip
    return loop.train_and_evaluate(config, workdir)


def test_a_run_is_the_same_from_a_folder_and_from_arrays_and_remembers_its_images(names, tmp_path):
    path = tmp_path / "mine.npz"
    results = [
        run(name, tmp_path / form) for form, name in (("folder", names["folder"][0]), ("arrays", write_arrays(path)))
    ]
    assert results[0]["test_accuracy_last"] == results[1]["test_accuracy_last"]
    assert results[0]["data_sha256"] == results[1]["data_sha256"]
    lines = [(tmp_path / form / "metrics.jsonl").read_text() for form in ("folder", "arrays")]
    losses = [re.findall(r'"loss": [^,]+', text) for text in lines]
    assert losses[0] == losses[1] and len(losses[0]) >= 3
    (tmp_path / "arrays" / "result.json").unlink()
    write_arrays(path, train_images=255 - arrays()["train_images"])
    with pytest.raises(RunError, match=r"are not those that the run in .* began with"):
        run(f"arrays:{path}", tmp_path / "arrays")


def test_a_run_from_tfds(names, tmp_path):
    name, data_dir = names["tfds"]
    assert run(name, tmp_path / "run", **{"data.data_dir": str(data_dir)})["dataset"] == "tfds:trees"


def test_sizes_are_brought_to_one_and_grey_stays_grey(tmp_path):
    for part in COUNTS:
        for index, size in enumerate([(20, 30), (40, 16), (16, 16)]):
            path = tmp_path / part / "one" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", size, 100).save(path)
    with pytest.raises(DataError, match=r"0\.png is 30x20, .*1\.png is 16x40 .*set data\.image_size"):
        load(f"folder:{tmp_path}", validation=0)
    data = load(f"folder:{tmp_path}", validation=0, image_size=16)
    assert data.train.images.shape == (3, 16, 16, 1)
    assert (data.train.images == 100).all()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "test" / "one" / "3.png")
    assert data.test().images.shape == (4, 16, 16, 1)


def test_images_that_cannot_be_read_are_listed_by_name(tmp_path):
    write_folder(tmp_path)
    whole = tmp_path / "train" / "ash" / "000.png"
    (tmp_path / "train" / "ash" / "note.txt").write_text("not an image")
    (tmp_path / "train" / "beech" / "cut.png").write_bytes(whole.read_bytes()[:200])
    Image.fromarray(np.zeros((12, 10), np.uint16)).save(tmp_path / "train" / "cedar" / "deep.png")
    (tmp_path / "test" / "cedar" / "too.png").write_text("nor this")
    with pytest.raises(DataError) as told:
        load(f"folder:{tmp_path}", validation=0)
    for name in ("note.txt (not an image", "cut.png (", "deep.png (of mode I;16", "too.png (not an image"):
        assert name in str(told.value)
    assert "000.png" not in str(told.value)


def remove(path):
    for file in sorted(path.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    path.rmdir()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: remove(root / "test"), r"there is no .*test; images are expected as test/CLASS/IMAGE"),
        (lambda root: [remove(root / "train" / name) for name in CLASSES], "holds no folder of a class"),
        (lambda root: (root / "test" / "oak").mkdir(), "has classes that .* lacks: oak"),
    ],
    ids=["no test", "no class", "a class of the test alone"],
)
def test_folders_that_lack_something(tmp_path, harm, message):
    write_folder(tmp_path)
    harm(tmp_path)
    with pytest.raises(DataError, match=message):
        load(f"folder:{tmp_path}", validation=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "lacks test_labels; it has train_images"),
        ({"train_images": np.zeros((60, *SHAPE), np.float32)}, "train_images is float32 .*must be uint8"),
        ({"train_images": np.zeros((60, 12), np.uint8)}, r"of shape \(60, 12\)"),
        ({"train_labels": np.zeros((60, 3), np.int64)}, r"train_labels is int64 of shape \(60, 3\)"),
        ({"train_labels": np.zeros(59, np.int64)}, "60 train_images and 59 train_labels"),
        ({"train_labels": np.zeros(61, np.int64)}, "60 train_images and 61 train_labels"),
        ({"train_labels": np.full(60, 3)}, "class_names has 3 names, and train_labels goes up to 3"),
        ({"test_labels": np.full(30, 7), "class_names": None}, "label 7 of example 0 is not one of 3 classes"),
        ({"train_labels": np.full(60, 7)}, "class_names has 3 names, and train_labels goes up to 7"),
        ({"test_labels": np.full(30, 7)}, "label 7 of example 0 is not one of 3 classes"),
        ({"train_labels": np.full(60, -1)}, "train_labels has -1; labels start at 0"),
        (
            {"train_images": np.zeros((60, 3, 16, 16), np.uint8)},
            r"shape \(60, 3, 16, 16\), channels first; .*channels last",
        ),
        ({"class_names": np.arange(3)}, "class_names is int64"),
        ({"train_labels": np.array([{}] * 60, object)}, "cannot be read"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load(write_arrays(tmp_path / "mine.npz", **changes), validation=0)


def test_files_that_are_none_and_test_images_of_another_size(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "text.npz").write_text("1, 2, 3")
    for name, message in (
        ("torn.npz", "torn.npz cannot be read"),
        ("nowhere.npz", "there is no .*nowhere.npz$"),
        ("text.npz", r"text.npz is not an \.npz file"),
    ):
        with pytest.raises(DataError, match=message):
            load(f"arrays:{tmp_path / name}", validation=0)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"is one array; np\.savez"):
        load(f"arrays:{tmp_path / 'one.npy'}", validation=0)
    arrays = write_arrays(tmp_path / "mine.npz", test_images=np.zeros((30, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="the split 'test' are 8x8x3, the others 12x10x3"):
        load(arrays, validation=0)


def test_tfds_sets_that_are_not_there_or_have_no_classes(tmp_path):
    with pytest.raises(DataError, match=r"^tfds:no_such_set: Dataset no_such_set not found\.$"):
        load("tfds:no_such_set", data_dir=tmp_path, validation=0)
    with pytest.raises(DataError, match=r"not found\. Did you mean: svhn_croped -> svhn_cropped \?$"):
        load("tfds:svhn_croped", data_dir=tmp_path, validation=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar-10", "did you mean 'cifar10'"),
        ("folder:", "there are 'cifar10', 'cifar100', 'digits', folder:PATH, arrays:FILE.npz, tfds:NAME"),
        ("imagenet", "is unknown"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(DataError, match=message):
        load(name, validation=0)


def test_photographs_are_turned_cropped_and_brought_to_their_size_one_by_one(tmp_path, monkeypatch):
    striped = np.repeat(np.uint8([50, 150, 250]), 16)[None].repeat(16, 0)  # 16x48
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for part in ("train", "test"):
        folder = tmp_path / part / "one" / "deeper"
        folder.mkdir(parents=True)
        for index in range(40):
            Image.fromarray(striped).save(folder / f"a{index:02d}.png")
        Image.fromarray(np.rot90(striped).copy()).save(folder / "b.png", exif=exif)
        (folder / ".DS_Store").write_bytes(b"a Mac's")
    name, pictures, alive, turn = f"folder:{tmp_path}", [], [], ImageOps.exif_transpose

    def counted(file):
        picture = turn(file)
        pictures.append(weakref.ref(picture))
        alive.append(sum(reference() is not None for reference in pictures))
        return picture

    monkeypatch.setattr(own_data.ImageOps, "exif_transpose", counted)
    images = load(name, validation=0, image_size=16).train.images[..., 0]
    assert len(images) == 41 and len(alive) == 2 * 41 and max(alive) < 41  # not more than there are threads
    np.testing.assert_array_equal(images[:, :, 2:-2], 150)  # the middle, upright
    np.testing.assert_array_equal(load(name, validation=0).train.images[..., 0], [striped] * 41)


@pytest.mark.parametrize("form", ["folder", "arrays"])
def test_what_is_wrong_with_test_images_is_said_before_a_run(form, tmp_path):
    if form == "folder":
        name = write_folder(tmp_path)
        (tmp_path / "test" / "ash" / "torn.png").write_bytes(b"no picture")
        message = "torn.png .not an image that Pillow knows"
    else:
        name = write_arrays(tmp_path / "mine.npz", test_images=split("test")[0] / 255.0)
        message = "test_images is float64"
    with pytest.raises(DataError, match=message):
        load(name, validation=0)


def test_arrays_of_grey_images_without_names_of_classes(tmp_path):
    grey = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    labels = {"train_labels": [0, 2, 1, 0], "test_labels": [1, 1]}
    np.savez(tmp_path / "mine.npz", train_images=grey, test_images=grey[:2], **labels)
    data = load(f"arrays:{tmp_path / 'mine.npz'}", validation=0)
    assert data.train.images.shape == (4, 6, 5, 1) and data.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(data.test().images[..., 0], grey[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_labels": np.zeros(60, int), "test_labels": np.zeros(30, int), "class_names": np.array(["ash"])},
            "there is one class only, 'ash'",
        ),
        ({"train_images": np.full((60, *SHAPE), 9, np.uint8)}, "all training pixels have one value in channel 0"),
    ],
)
def test_sets_from_which_nothing_can_be_learned(changes, message, tmp_path):
    name = write_arrays(tmp_path / "mine.npz", **changes)
    with pytest.raises(DataError, match=rf"^data.name = {name}: {message}"):
        of_config(small_config(**{"data.name": name, "data.validation": 0}).data)


def test_classes_without_an_image_are_told(tmp_path, capsys):
    labels = np.array([0] * 59 + [1], np.int32)
    name = write_arrays(tmp_path / "mine.npz", train_labels=labels, test_labels=np.full(30, 2, np.int32))
    load(name, validation=1, split_seed=0)
    assert capsys.readouterr().out.splitlines() == [
        f"warning: {name}: no test image is of class ash, beech",
        f"warning: {name}: no training image is of class cedar",
        f"warning: {name}: no held-out image is of class beech, cedar",
    ]


def test_labels_of_the_test_images_are_those_of_the_training_classes(tmp_path, capsys):
    """Also where there are no test images of the first class."""
    write_folder(tmp_path)
    remove(tmp_path / "test" / "ash")
    test = load(f"folder:{tmp_path}", validation=0).test()
    images, labels = split("test")
    np.testing.assert_array_equal(test.labels, labels[labels > 0])
    np.testing.assert_array_equal(test.images, images[labels > 0])
    assert "no test image is of class ash" in capsys.readouterr().out


def test_one_picture_in_colour_makes_all_of_them_coloured(tmp_path):
    for part in COUNTS:
        folder = tmp_path / part / "one"
        folder.mkdir(parents=True)
        Image.new("L", (4, 4), 100).save(folder / "a.png")
        Image.new("RGB", (4, 4), (1, 2, 3)).save(folder / "b.png")
    images = load(f"folder:{tmp_path}", validation=0).train.images
    assert images.shape == (2, 4, 4, 3)
    assert (images[0] == 100).all() and (images[1] == (1, 2, 3)).all()


def test_a_long_list_of_broken_files_is_cut(tmp_path):
    write_folder(tmp_path)
    for number in range(12):
        (tmp_path / "train" / "ash" / f"note{number:02d}.txt").write_text("not an image")
    with pytest.raises(DataError) as told:
        load(f"folder:{tmp_path}", validation=0)
    assert str(told.value).count("not an image that Pillow knows") == 10
    assert "note09.txt" in str(told.value) and "note10.txt" not in str(told.value)
    assert " and 2 more; repair or remove them" in str(told.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_brought_to_a_size_by_averaging(tmp_path, channels):
    """Columns of 0 and 255 become grey; of a neighbour nothing but one of them would be left."""
    striped = np.zeros((8, 16, 16, channels), np.uint8)
    striped[:, :, ::2] = 255
    labels = np.arange(8) % 2
    shape = striped.shape if channels == 3 else striped.shape[:3]
    images = {f"{part}_images": striped.reshape(shape) for part in COUNTS}
    np.savez(tmp_path / "mine.npz", **images, train_labels=labels, test_labels=labels)
    data = load(f"arrays:{tmp_path / 'mine.npz'}", validation=0, image_size=8)
    assert data.train.images.shape == data.test().images.shape == (8, 8, 8, channels)
    np.testing.assert_allclose(data.train.images, 127.5, atol=32)
    np.testing.assert_allclose(data.train.images.mean(), 127.5, atol=3)


def test_images_of_four_channels_keep_their_size(tmp_path):
    four = {f"{part}_images": np.full((COUNTS[part], 4, 4, 4), 7, np.uint8) for part in COUNTS}
    for images in four.values():
        images[0] = 9
    name = write_arrays(tmp_path / "mine.npz", **four)
    assert load(name, validation=0).train.images.shape == (60, 4, 4, 4)
    with pytest.raises(DataError, match=r"images of 4 channels cannot be resized; set data\.image_size = 0"):
        load(name, validation=0, image_size=2)


@pytest.mark.parametrize(
    ("splits", "read"), [(("train", "validation", "test"), "test"), (("validation", "train"), "validation")]
)
def test_the_test_images_of_tfds_are_its_test_split_where_there_is_one(monkeypatch, splits, read):
    class Builder:
        info = SimpleNamespace(
            splits=dict.fromkeys(splits),
            features={"image": None, "label": tfds.features.ClassLabel(names=CLASSES)},
        )
        is_prepared = staticmethod(lambda: True)

        def as_data_source(self, name):
            value = 10 * splits.index(name)
            return [{"image": np.full((4, 4, 1), value + label, np.uint8), "label": label} for label in range(3)]

    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: Builder())
    data = load("tfds:fake", validation=0)
    for found, name in ((data.train, "train"), (data.test(), read)):
        np.testing.assert_array_equal(found.images[:, 0, 0, 0], 10 * splits.index(name) + np.arange(3))
        np.testing.assert_array_equal(found.labels, np.arange(3))


def test_tfds_sets_without_images_to_test_on_are_refused(monkeypatch):
    builder = SimpleNamespace(info=SimpleNamespace(splits={"train": None}), is_prepared=lambda: True)
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: builder)
    with pytest.raises(DataError, match=r"^tfds:fake has the splits train; train and test are needed"):
        load("tfds:fake", validation=0)
