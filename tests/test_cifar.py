"""CIFAR through TFDS, on archives of the official layout with a dozen images in them; no network but the loopback."""

import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.utils import Size

from gompertz_jax.training import cifar
from gompertz_jax.training.data import DataError, load

CLOSED_PORT = "http://127.0.0.1:9"  # "discard": nothing listens there, and refusal is immediate


def records(seed: int, size: int, classes: tuple[int, ...]) -> bytes:
    generator = np.random.default_rng(seed)
    labels = [generator.integers(0, limit, (size, 1)) for limit in classes]
    return np.concatenate([*labels, generator.integers(0, 256, (size, 3072))], axis=1).astype(np.uint8).tobytes()


def archived(folder: str, files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        directory = tarfile.TarInfo(folder)
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def url_infos(url: str, archive: bytes) -> dict[str, UrlInfo]:
    checksum = hashlib.sha256(archive).hexdigest()
    return {url: UrlInfo(size=Size(len(archive)), checksum=checksum, filename=url.rpartition("/")[2])}


def binary(name: str, size: int, content: bytes) -> cifar.BinaryFile:
    return cifar.BinaryFile(name, size, hashlib.sha256(content).hexdigest())


FILES10 = {
    "batches.meta.txt": "\n".join(f"name{index}" for index in range(10)).encode() + b"\n\n",
    "data_batch_1.bin": records(1, 7, (10,)),
    "data_batch_2.bin": records(2, 5, (10,)),
    "test_batch.bin": records(3, 4, (10,)),
    "readme.html": b"<html>",
}
FILES100 = {
    "coarse_label_names.txt": "\n".join(f"coarse{index}" for index in range(20)).encode(),
    "fine_label_names.txt": "\n".join(f"fine{index}" for index in range(100)).encode(),
    "train.bin": records(4, 9, (20, 100)),
    "test.bin": records(5, 3, (20, 100)),
}
ARCHIVE10, ARCHIVE100 = archived("cifar-10-batches-bin", FILES10), archived("cifar-100-binary", FILES100)
NAME10 = "cifar-10-binary.tar.gz"


class Tiny10(cifar.Cifar10Png, skip_registration=True):
    name = "cifar10_png"
    URL = f"{CLOSED_PORT}/{NAME10}"
    url_infos = url_infos(URL, ARCHIVE10)
    FILES = {  # noqa: RUF012
        "train": tuple(binary(f"data_batch_{n}.bin", s, FILES10[f"data_batch_{n}.bin"]) for n, s in ((1, 7), (2, 5))),
        "test": (binary("test_batch.bin", 4, FILES10["test_batch.bin"]),),
    }


class Tiny100(cifar.Cifar100Png, skip_registration=True):
    name = "cifar100_png"
    URL = f"{CLOSED_PORT}/cifar-100-binary.tar.gz"
    url_infos = url_infos(URL, ARCHIVE100)
    FILES = {  # noqa: RUF012
        "train": (binary("train.bin", 9, FILES100["train.bin"]),),
        "test": (binary("test.bin", 3, FILES100["test.bin"]),),
    }


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(cifar, "BUILDERS", {"cifar10": Tiny10, "cifar100": Tiny100})


def use(monkeypatch, **attributes):
    """Read "cifar10" by a variant of the tiny builder."""
    builder = type(Tiny10)("Tiny10", (Tiny10,), {"name": Tiny10.name, **attributes}, skip_registration=True)
    monkeypatch.setitem(cifar.BUILDERS, "cifar10", builder)
    return builder


def manual(root: Path) -> Path:
    path = root / "downloads" / "manual"
    path.mkdir(parents=True, exist_ok=True)
    return path


def put_folder(root: Path, files: dict[str, bytes], name: str = "cifar-10-batches-bin") -> Path:
    folder = manual(root) / name
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def official(content: bytes, label_bytes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Images and last labels, read independently of the library."""
    width = label_bytes + 3072
    images, labels = [], []
    for start in range(0, len(content), width):
        record = content[start : start + width]
        labels.append(record[label_bytes - 1])
        planes = np.frombuffer(record[label_bytes:], np.uint8)
        images.append(np.stack([planes[i * 1024 : (i + 1) * 1024].reshape(32, 32) for i in range(3)], axis=-1))
    return np.stack(images), np.array(labels, np.int32)


def check10(root: Path) -> None:
    for split, content in (
        ("train", FILES10["data_batch_1.bin"] + FILES10["data_batch_2.bin"]),
        ("test", FILES10["test_batch.bin"]),
    ):
        read, names = cifar.read("cifar10", split, data_dir=root)
        images, labels = official(content)
        np.testing.assert_array_equal(read.images, images)
        np.testing.assert_array_equal(read.labels, labels)
        assert read.images.dtype == np.uint8 and read.labels.dtype == np.int32
        assert names == tuple(f"name{index}" for index in range(10))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(root: Path, *parts: str) -> str:
    """The message of the one error, which names all parts and a way out; what the user put there is as it was."""
    before = snapshot(root / "downloads" / "manual")
    with pytest.raises(DataError) as caught:
        cifar.read("cifar10", "train", data_dir=root)
    assert snapshot(root / "downloads" / "manual") == before
    assert not (root / "cifar10_png" / "1.0.0").exists() or "cifar10_png" in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Where the images come from


def test_archive_put_by_hand(tmp_path, capfd):
    (manual(tmp_path) / NAME10).write_bytes(ARCHIVE10)
    before = snapshot(manual(tmp_path))
    check10(tmp_path)
    assert snapshot(manual(tmp_path)) == before
    assert capfd.readouterr() == ("", "")


def test_folder_put_by_hand(tmp_path):
    put_folder(tmp_path, {**FILES10, ".DS_Store": b"whatever"})
    before = snapshot(manual(tmp_path))
    check10(tmp_path)
    assert snapshot(manual(tmp_path)) == before


def test_cifar100_has_the_fine_labels(tmp_path):
    put_folder(tmp_path, FILES100, "cifar-100-binary")
    data = load("cifar100", data_dir=str(tmp_path), validation=0)
    images, labels = official(FILES100["train.bin"], 2)
    np.testing.assert_array_equal(data.train.images, images)
    np.testing.assert_array_equal(data.train.labels, labels)
    np.testing.assert_array_equal(data.test().labels, official(FILES100["test.bin"], 2)[1])
    assert data.num_classes == 100 and data.class_names[99] == "fine99"


def test_prepared_set_is_enough(tmp_path):
    put_folder(tmp_path, FILES10)
    check10(tmp_path)
    shutil.rmtree(tmp_path / "downloads")
    check10(tmp_path)


def test_archive_goes_before_folder(tmp_path):
    (manual(tmp_path) / NAME10).write_bytes(ARCHIVE10)
    put_folder(tmp_path, {})
    check10(tmp_path)


def test_load_holds_images_out(tmp_path):
    put_folder(tmp_path, FILES10)
    data = load("cifar10", data_dir=tmp_path, validation=5, num_classes=10)
    assert data.train.images.shape == (7, 32, 32, 3) and data.validation.images.shape == (5, 32, 32, 3)
    assert len(data.mean) == len(data.std) == 3
    np.testing.assert_array_equal(data.test().images, official(FILES10["test_batch.bin"])[0])
    with pytest.raises(DataError, match=r"num_classes = 100: cifar10 has 10"):
        load("cifar10", data_dir=tmp_path, validation=5, num_classes=100)


def test_test_images_are_not_read_before_they_are_asked_for(tmp_path):
    put_folder(tmp_path, FILES10)
    cifar.prepare("cifar10", data_dir=tmp_path)
    for path in (tmp_path / "cifar10_png" / "1.0.0").glob("*test*"):
        path.unlink()
    data = load("cifar10", data_dir=tmp_path, validation=0)
    with pytest.raises(DataError, match="cannot be read"):
        data.test()


def as_stock(root: Path, **changes: str) -> None:
    """Turn the prepared set into what TFDS's own builder leaves: same records, other names."""
    (root / "cifar10_png").rename(root / "cifar10")
    folder = root / "cifar10" / str(cifar.Cifar10Png.STOCK.VERSION)
    (root / "cifar10" / "1.0.0").rename(folder)
    for path in folder.glob("cifar10_png-*"):
        path.rename(path.with_name(path.name.replace("cifar10_png", "cifar10")))
    info = folder / "dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "name": "cifar10", "version": folder.name, **changes}))


def test_stock_set_prepared_as_array_record(tmp_path):
    put_folder(tmp_path, FILES10)
    cifar.prepare("cifar10", data_dir=tmp_path)
    shutil.rmtree(tmp_path / "downloads")
    as_stock(tmp_path)
    check10(tmp_path)
    assert not (tmp_path / "cifar10_png").exists()


def test_stock_set_that_needs_tensorflow_or_is_broken_is_passed_over(tmp_path):
    put_folder(tmp_path, FILES10)
    cifar.prepare("cifar10", data_dir=tmp_path)
    as_stock(tmp_path, fileFormat="tfrecord")
    check10(tmp_path)
    assert (tmp_path / "cifar10_png").exists()
    shutil.rmtree(tmp_path / "cifar10_png")
    next((tmp_path / "cifar10").glob("*/dataset_info.json")).write_text("{")
    check10(tmp_path)


@pytest.fixture
def server(tmp_path):
    """A server of `tmp_path/www` on the loopback."""
    root = tmp_path / "www"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{httpd.server_port}/{NAME10}"
        httpd.shutdown()


def test_download_and_its_cache(tmp_path, server, monkeypatch):
    www, url = server
    (www / NAME10).write_bytes(ARCHIVE10)
    use(monkeypatch, URL=url, url_infos=url_infos(url, ARCHIVE10))
    check10(tmp_path)
    shutil.rmtree(tmp_path / "cifar10_png")
    (www / NAME10).unlink()
    check10(tmp_path)
    # TFDS takes what it downloaded once for good by its name, so damage has to be found in the content.
    shutil.rmtree(tmp_path / "cifar10_png")
    (cached,) = (tmp_path / "downloads").rglob("*.tar.gz")
    cached.write_bytes(ARCHIVE10[: len(ARCHIVE10) // 2])
    refused(tmp_path, str(cached), "cannot be unpacked", "remove it")


def test_download_that_is_altered_on_the_way(tmp_path, server, monkeypatch):
    www, url = server
    (www / NAME10).write_bytes(ARCHIVE10[:-1] + b"?")
    use(monkeypatch, URL=url, url_infos=url_infos(url, ARCHIVE10))
    refused(tmp_path, url, "checksum", "downloads/manual")


def test_download_that_is_not_there(tmp_path, server, monkeypatch):
    _, url = server
    use(monkeypatch, URL=url, url_infos=url_infos(url, ARCHIVE10))
    refused(tmp_path, url, "404", "downloads/manual")


# What is refused


def test_nothing_there_and_no_network(tmp_path):
    message = refused(tmp_path, Tiny10.URL, "cannot be reached", "cifar-10-batches-bin/")
    assert str(manual(tmp_path)) in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (ARCHIVE10[:-100], f"has {len(ARCHIVE10) - 100:,} bytes instead of {len(ARCHIVE10):,}: it was cut off"),
        (ARCHIVE10[:500] + bytes([ARCHIVE10[500] ^ 1]) + ARCHIVE10[501:], "was altered: its SHA-256"),
        (b"", "has 0 bytes instead of"),
    ],
    ids=["truncated", "altered", "empty"],
)
def test_archive_that_is_not_the_official_one(tmp_path, content, said):
    (manual(tmp_path) / NAME10).write_bytes(content)
    refused(tmp_path, str(manual(tmp_path) / NAME10), said, f"fetch {Tiny10.URL} again")


BATCH = FILES10["data_batch_2.bin"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_batch_2.bin": BATCH[:-1]}, "data_batch_2.bin is cut off: 15,364 bytes instead of 15,365"),
        ({"data_batch_2.bin": BATCH + b"?"}, "data_batch_2.bin is too long: 15,366 bytes"),
        ({"data_batch_2.bin": b""}, "data_batch_2.bin is cut off: 0 bytes"),
        ({"data_batch_2.bin": BATCH[:-1] + bytes([BATCH[-1] ^ 1])}, "data_batch_2.bin was altered: SHA-256"),
        ({"data_batch_2.bin": None}, "cifar-10-batches-bin lacks data_batch_2.bin"),
        ({"batches.meta.txt": None}, "cifar-10-batches-bin lacks batches.meta.txt"),
        ({"batches.meta.txt": b"cat\ndog\n"}, "batches.meta.txt was altered: it does not have 10 different names"),
        ({"data_batch_6.bin": BATCH}, "has data_batch_6.bin, which the official archive has not"),
        (dict.fromkeys(FILES10), "lacks batches.meta.txt, data_batch_1.bin, data_batch_2.bin, test_batch.bin"),
    ],
    ids=["truncated", "longer", "empty", "altered", "missing", "no names", "few names", "extra", "no files"],
)
def test_folder_that_is_not_the_official_one(tmp_path, changes, said):
    files = {name: content for name, content in {**FILES10, **changes}.items() if content is not None}
    folder = put_folder(tmp_path, files)
    refused(tmp_path, str(folder), said, f"fetch {Tiny10.URL} again")


def test_files_in_an_archive_are_held_to_their_own_checksums(tmp_path, monkeypatch):
    archive = archived("cifar-10-batches-bin", {**FILES10, "data_batch_1.bin": records(9, 7, (10,))})
    use(monkeypatch, url_infos=url_infos(Tiny10.URL, archive))
    (manual(tmp_path) / NAME10).write_bytes(archive)
    refused(tmp_path, NAME10, "data_batch_1.bin was altered")


class Payload:
    """What a pickle may do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_hostile_archive_writes_reads_and_executes_nothing(tmp_path, monkeypatch):
    """Members outside of the folder, links and devices with the official names first, and a pickle among the files."""
    outside, executed = tmp_path / "outside", tmp_path / "executed"
    outside.write_bytes(FILES10["data_batch_1.bin"])
    folder, stream = "cifar-10-batches-bin", io.BytesIO()

    def add(name, content=b"", kind=tarfile.REGTYPE, link=""):
        member = tarfile.TarInfo(name)
        member.size, member.type, member.linkname = len(content), kind, link
        archive.addfile(member, io.BytesIO(content))

    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for path in ("../escaped", f"{folder}/../../escaped", str(tmp_path / "escaped"), f"{folder}/sub/../../escaped"):
            add(path, b"escaped")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            for target in (str(outside), "../../../outside", "nowhere"):
                add(f"{folder}/data_batch_1.bin", kind=kind, link=target)
        add(f"{folder}/test_batch.bin", kind=tarfile.FIFOTYPE)
        add(f"{folder}/test_batch.bin", kind=tarfile.CHRTYPE)
        add(f"{folder}/batches.meta", pickle.dumps(Payload(executed)))
        for name, content in FILES10.items():
            add(f"{folder}/{name}", content)
    content = stream.getvalue()
    use(monkeypatch, url_infos=url_infos(Tiny10.URL, content))
    (manual(tmp_path) / NAME10).write_bytes(content)
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("something was unpickled"))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("something was unpickled"))
    check10(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cifar10_png", "downloads", "outside"}
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path.parent / "escaped").exists()
    assert outside.read_bytes() == FILES10["data_batch_1.bin"]


def test_archive_whose_records_are_a_link_lacks_them(tmp_path, monkeypatch):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    use(monkeypatch, url_infos=url_infos(Tiny10.URL, stream.getvalue()))
    (manual(tmp_path) / NAME10).write_bytes(stream.getvalue())
    refused(tmp_path, NAME10, "lacks batches.meta.txt, data_batch_1.bin")


def test_archive_that_would_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    """Zeros compress a thousandfold: what a member has is known before any of it is read."""
    archive = archived("cifar-10-batches-bin", {**FILES10, "data_batch_1.bin": bytes(50_000)})
    use(monkeypatch, url_infos=url_infos(Tiny10.URL, archive))
    (manual(tmp_path) / NAME10).write_bytes(archive)
    refused(tmp_path, NAME10, "holds data_batch_1.bin of 50,000 bytes, and the largest official file has 21,511")


def test_archive_of_another_folder(tmp_path, monkeypatch):
    archive = archived("cifar-10-batches-py", FILES10)
    use(monkeypatch, url_infos=url_infos(Tiny10.URL, archive))
    (manual(tmp_path) / NAME10).write_bytes(archive)
    refused(tmp_path, NAME10, "lacks")


def test_label_outside_its_range(tmp_path, monkeypatch):
    content = bytes([10]) + FILES10["data_batch_1.bin"][1:]
    train = (binary("data_batch_1.bin", 7, content), Tiny10.FILES["train"][1])
    use(monkeypatch, FILES={**Tiny10.FILES, "train": train})
    put_folder(tmp_path, {**FILES10, "data_batch_1.bin": content})
    refused(tmp_path, "cifar-10-batches-bin", "label 10 of example 0 is not one of 10 classes")


def test_data_dir_that_cannot_be_written_to(tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match="choose a data_dir that can be written to"):
        cifar.read("cifar10", "train", data_dir=tmp_path / "data")


# Preparations that do not finish, are repeated, or are damaged afterwards


def prepared(root: Path) -> Path:
    put_folder(root, FILES10)
    cifar.prepare("cifar10", data_dir=root)
    return root / "cifar10_png" / "1.0.0"


def test_unfinished_directory_is_kept_aside_and_prepared_anew(tmp_path):
    folder = prepared(tmp_path)
    (folder / "dataset_info.json").unlink()
    before = snapshot(folder)
    check10(tmp_path)
    kept = snapshot(folder.parent / "set_aside" / "1.0.0")
    assert [*kept.values()] == [*before.values()]
    shutil.rmtree(tmp_path / "downloads")
    check10(tmp_path)


def shard(folder: Path) -> Path:
    return next(folder.glob("*train*"))


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: shard(folder).unlink(),
        lambda folder: shard(folder).write_bytes(b""),
        lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:20000]),
        lambda folder: flip_byte(shard(folder), 20000),
        lambda folder: (folder / "dataset_info.json").write_text("{"),
        lambda folder: shutil.copy(next(folder.glob("*test*")), shard(folder)),
    ],
    ids=["no shard", "empty shard", "cut shard", "flipped bit", "info", "other images"],
)
def test_damaged_prepared_set(tmp_path, damage):
    folder = prepared(tmp_path)
    damage(folder)
    refused(tmp_path, "cifar10_png/1.0.0", "move", "prepared anew")


def test_prepared_set_of_other_images(tmp_path, monkeypatch):
    folder = prepared(tmp_path)
    train = (Tiny10.FILES["train"][0], binary("data_batch_2.bin", 5, b"other"))
    use(monkeypatch, FILES={**Tiny10.FILES, "train": train})
    refused(tmp_path, str(folder), "does not have the images or labels of the official data_batch_2.bin")


def script(root: Path, body: str) -> subprocess.CompletedProcess:
    """Run `body` in a fresh interpreter, where `cifar` reads the tiny set of `root`."""
    start = f"""
import sys
sys.path[:0] = {[str(root), str(Path(__file__).parent), str(Path(cifar.__file__).parents[2])]!r}
import os, random
import test_cifar
from gompertz_jax.training import cifar
cifar.BUILDERS["cifar10"] = test_cifar.Tiny10
root = test_cifar.Path({str(root)!r})
"""
    return subprocess.run([sys.executable, "-c", start + body], capture_output=True, text=True, timeout=120)


def test_tensorflow_is_never_imported_nor_random_state_used(tmp_path):
    put_folder(tmp_path, FILES10)
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    body = """
random.seed(0)
state = random.getstate()
test_cifar.check10(root)
print("tensorflow" in sys.modules, random.getstate() == state)
"""
    done = script(tmp_path, body)
    assert (done.stdout, done.stderr) == ("False True\n", "")


def test_killed_preparation_leaves_nothing_that_is_read(tmp_path):
    put_folder(tmp_path, FILES10)
    body = """
def killed(self, split, records):
    yield next(generate(self, split, records))
    os._exit(9)
generate, cifar.Cifar10Png._generate_examples = cifar.Cifar10Png._generate_examples, killed
cifar.prepare("cifar10", data_dir=root)
"""
    assert script(tmp_path, body).returncode == 9
    left = [path.name for path in (tmp_path / "cifar10_png").iterdir()]
    assert left and all(name.startswith("incomplete.") for name in left)
    check10(tmp_path)


def test_interrupted_preparation_cleans_up(tmp_path, monkeypatch):
    put_folder(tmp_path, FILES10)

    def interrupted(self, split, records):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cifar.Cifar10Png, "_generate_examples", interrupted)
        cifar.prepare("cifar10", data_dir=tmp_path)
    assert list((tmp_path / "cifar10_png").iterdir()) == []
    check10(tmp_path)


def test_two_processes_prepare_at_once(tmp_path):
    """Each waits in the midst of its preparation until the other is there, too."""
    put_folder(tmp_path, FILES10)
    body = """
import time
random.seed(0)
def together(self, split, records):
    (root / f"started.{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while len(list(root.glob("started.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    yield from generate(self, split, records)
generate, cifar.Cifar10Png._generate_examples = cifar.Cifar10Png._generate_examples, together
cifar.prepare("cifar10", data_dir=root)
test_cifar.check10(root)
"""
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda _: script(tmp_path, body), range(2)))
    assert [(end.returncode, end.stdout, end.stderr) for end in ends] == [(0, "", "")] * 2
    assert len(list(tmp_path.glob("started.*"))) == 2
    assert [path.name for path in (tmp_path / "cifar10_png").iterdir()] == ["1.0.0"]
    check10(tmp_path)


def test_preparation_that_another_one_overtakes(tmp_path, monkeypatch):
    put_folder(tmp_path, FILES10)
    generate = cifar.Cifar10Png._generate_examples
    overtaken = []

    def slow(self, split, records):
        yield from generate(self, split, records)
        if not overtaken:
            overtaken.append(True)
            cifar.prepare("cifar10", data_dir=tmp_path)
            overtaken.append(snapshot(tmp_path / "cifar10_png"))

    monkeypatch.setattr(cifar.Cifar10Png, "_generate_examples", slow)
    cifar.prepare("cifar10", data_dir=tmp_path)
    assert snapshot(tmp_path / "cifar10_png").keys() >= overtaken[1].keys()
    assert [path.name for path in (tmp_path / "cifar10_png").iterdir()] == ["1.0.0"]
    check10(tmp_path)


# The real thing

STATISTICS = {  # as the field quotes them, of all 50,000 training images
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_real_images_are_the_official_files(name, monkeypatch):
    root = os.environ.get("GOMPERTZ_JAX_DATA_DIR")
    if not root:
        pytest.skip("GOMPERTZ_JAX_DATA_DIR is not set: it names a data_dir with CIFAR under downloads/manual")
    builder = {"cifar10": cifar.Cifar10Png, "cifar100": cifar.Cifar100Png}[name]
    monkeypatch.setitem(cifar.BUILDERS, name, builder)
    data = load(name, data_dir=root, validation=0)
    for split, part in (("train", data.train), ("test", data.test())):
        folder = Path(root) / "downloads" / "manual" / builder.FOLDER
        content = b"".join((folder / file.name).read_bytes() for file in builder.FILES[split])
        rows = np.frombuffer(content, np.uint8).reshape(len(part.labels), -1)
        np.testing.assert_array_equal(part.images.transpose(0, 3, 1, 2).reshape(len(rows), -1), rows[:, -3072:])
        np.testing.assert_array_equal(part.labels, rows[:, -3073])
    mean, std = STATISTICS[name]
    np.testing.assert_allclose(data.mean, mean, atol=1e-4)
    np.testing.assert_allclose(data.std, std, atol=1e-4)
    classes = len(set(data.class_names))
    assert np.bincount(data.train.labels).tolist() == [50_000 // classes] * classes
