"""Networks from PyTorch's files: names and values against PyTorch where it is installed, refusals without it."""

import json
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gompertz_jax as gj
from gompertz_jax import cli
from gompertz_jax.models import tensor_files, torch_layouts

try:
    import torch
    import torch_networks
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed: nothing to compare logits with")

forward = jax.jit(lambda network, images: network.forward(images, train=False)[0].logits)


def resnet8(classes=10, **options):
    return gj.models.create("resnet8", num_classes=classes, key=jax.random.key(0), **options)


def state(classes=10):
    return torch_layouts.to_state_dict(resnet8(classes), "resnet8", {})


# Without PyTorch: files written by hand.


class Record:
    """Pickles as a call of any name, or as a storage."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


def dumps(content):
    """A pickle, protocol 2, in which Records are calls and tuples of kind "storage" are persistent ids."""

    def write(item):
        if isinstance(item, Record):
            module, _, name = item.name.rpartition(".")
            return f"c{module}\n{name}\n".encode() + write(item.arguments) + b"R"
        if isinstance(item, type):
            return f"ctorch\n{item.__name__}\n".encode()
        if isinstance(item, tuple) and item and item[0] == "storage":
            return b"(" + b"".join(map(write, item)) + b"tQ"
        if isinstance(item, tuple):
            return b"(" + b"".join(map(write, item)) + b"t"
        if isinstance(item, dict):
            return b"}(" + b"".join(write(part) for pair in item.items() for part in pair) + b"u"
        return pickle.dumps(item, 2)[2:-1]

    return b"\x80\x02" + write(content) + b"."


def tensor_of(array, key, storage="FloatStorage"):
    stride = tuple(step // array.itemsize for step in array.strides)
    name = type(storage, (), {})
    storage = ("storage", name, key, "cuda:0", array.size)
    return Record(
        "torch._utils._rebuild_tensor_v2", storage, 0, array.shape, stride, False, Record("collections.OrderedDict")
    )


def write_zip(path, content, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("any/data.pkl", dumps(content))
        for key, array in data.items():
            archive.writestr(f"any/data/{key}", array.tobytes())
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_zip_with_nesting_prefixes_and_half_precision(tmp_path, dtype):
    storage = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}[dtype]
    a, b = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype)), np.ones(3, jnp.dtype(dtype))
    tensors = {"module.a": tensor_of(a, "0", storage), "module.b": tensor_of(b, "1", storage)}
    settings = Record("argparse.Namespace", *())
    content = {"epoch": 240, "opt": settings, "model": {"state_dict": tensors}}
    read = tensor_files.read_state_dict(write_zip(tmp_path / "a.pth", content, {"0": a, "1": b}))
    assert {name: array.dtype.name for name, array in read.items()} == {"a": dtype, "b": dtype}
    np.testing.assert_array_equal(read["a"], a)
    np.testing.assert_array_equal(read["b"], b)


def test_a_transposed_view_of_a_storage(tmp_path):
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = Record(
        "torch._utils._rebuild_tensor_v2",
        ("storage", type("FloatStorage", (), {}), "0", "cpu", 6), 1, (2, 2), (1, 3), False, None,
    )  # fmt: skip
    read = tensor_files.read_state_dict(write_zip(tmp_path / "a.pt", {"a": view}, {"0": a}))
    np.testing.assert_array_equal(read["a"], [[1, 4], [2, 5]])


def test_the_format_of_pytorch_before_1_6_with_an_optimiser(tmp_path):
    a, momentum = np.arange(4, dtype=np.float32), np.ones(2)
    content = {"model": {"a": tensor_of(a, "7")}, "optimizer": {"m": tensor_of(momentum, "3", "DoubleStorage")}}
    parts = [tensor_files._LEGACY_MAGIC, 1001, {"little_endian": True}, content, ["3", "7"]]
    storages = [struct.pack("<q", array.size) + array.tobytes() for array in (momentum, a)]
    (tmp_path / "a.pth").write_bytes(b"".join([*map(dumps, parts), *storages]))
    np.testing.assert_array_equal(tensor_files.read_state_dict(tmp_path / "a.pth")["a"], a)


@pytest.mark.parametrize("inside", ["zip", "legacy"])
def test_a_pickle_that_calls_anything_is_refused_by_name_and_does_not_run(tmp_path, inside):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    evil = {"model": {"a": Record("os.system", f"touch {canary}")}}
    pickle.loads(dumps(evil["model"]["a"]))  # it does run where it may
    assert canary.exists()
    canary.unlink()
    if inside == "zip":
        write_zip(path, evil, {})
    else:
        path.write_bytes(b"".join(map(dumps, [tensor_files._LEGACY_MAGIC, 1001, {}, evil, []])))
    with pytest.raises(ValueError, match=r"evil.pth cannot be read as tensors: it names os.system"):
        tensor_files.read_state_dict(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["builtins.getattr", "builtins.eval", "torch.load", "resnet.ResNet"])
def test_other_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"it names {name}, which is neither"):
        tensor_files.read_state_dict(write_zip(tmp_path / "a.pth", {"a": Record(name)}, {}))


def test_a_file_cannot_write_into_what_it_names(tmp_path):
    """BUILD sets attributes of an object; of a function of ours they would stay for every later file."""
    for (module, name), known in tensor_files._KNOWN.items():
        named = f"c{module}\n{name}\n".encode()
        for state in (b"}U\x04markK\x01s", b"N}U\x04markK\x01s\x86"):  # for __dict__, for slots
            with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
                archive.writestr("any/data.pkl", b"\x80\x02" + named + state + b"b.")
            with pytest.raises(ValueError, match="cannot be read as tensors"):
                tensor_files.read_state_dict(tmp_path / "a.pth")
            assert not hasattr(known, "mark"), name


def test_what_is_no_file_of_tensors_is_refused(tmp_path):
    path, a = tmp_path / "a.pth", np.arange(6, dtype=np.float32)
    cases = {
        "neither a file of torch.save nor of safetensors": b"hello there, this is text",
        "none that torch.save wrote": pickle.dumps({"a": 1}),
        "cannot be read": b"",
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            tensor_files.read_state_dict(path)
    with pytest.raises(ValueError, match=r"it holds no state dict at its top or under .*, but 'epoch'"):
        tensor_files.read_state_dict(write_zip(path, {"epoch": 3}, {}))
    with pytest.raises(ValueError, match=r"shape \(6,\) reaches beyond its storage of 5"):
        tensor_files.read_state_dict(write_zip(path, {"a": tensor_of(a, "0")}, {"0": a[:5]}))
    path.write_bytes(struct.pack("<Q", 62) + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}} ')
    with pytest.raises(ValueError, match="a does not lie where the header says"):
        tensor_files.read_state_dict(path)


def test_both_written_formats_come_back(tmp_path):
    tensors = state()
    tensor_files.write_torch(tmp_path / "a.pth", tensors)
    tensor_files.write_safetensors(tmp_path / "a.safetensors", tensors, {"note": "x"})
    for name in ("a.pth", "a.safetensors"):
        read = tensor_files.read_state_dict(tmp_path / name)
        assert list(read) == list(tensors)
        jax.tree.map(np.testing.assert_array_equal, read, tensors)


# Names, shapes, normalisation


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet50", "mobilenetv2", "wrn_16_2", "vgg13", "shufflenetv1", "shufflenetv2"]
)
def test_every_tensor_has_a_name_of_its_own_in_every_layout(name):
    for layout in torch_layouts.layouts(name, {}):
        shapes = jax.eval_shape(
            lambda key, options=layout.options: gj.models.create(name, num_classes=7, key=key, **options),
            jax.random.key(0),
        )
        keys = [key for tree in (shapes.params, shapes.stats) for key, _ in torch_layouts._named(tree, layout)]
        assert len(set(keys)) == len(keys)


def test_missing_unexpected_and_mismatched_tensors_are_told_at_once():
    tensors = state()
    del tensors["layer1.0.bn1.running_var"]
    tensors |= {"extra.weight": np.ones(3), "conv1.weight": np.ones((16, 3, 5, 5), np.float32)}
    tensors["layer2.0.conv1.weight"] = tensors["layer2.0.conv1.weight"].astype(np.int32)
    with pytest.raises(ValueError) as caught:
        torch_layouts.from_state_dict(tensors, "resnet8", mean=0.5, std=0.25)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the tensors are not those of resnet8 in the layout of repdistiller:"
    assert [line.strip() for line in lines[1:]] == [
        "missing: layer1.0.bn1.running_var (16,)",
        "unexpected: extra.weight (3,)",
        "mismatched: layer2.0.conv1.weight is (32, 16, 3, 3) of int32, expected (32, 16, 3, 3)",
        "mismatched: conv1.weight is (16, 3, 5, 5) of float32, expected (16, 3, 3, 3)",
    ]


def test_what_pytorch_counts_beside_its_statistics_is_left_out():
    counts = {f"{name}.num_batches_tracked": np.int64(7) for name in ("bn1", "layer1.0.bn1")}
    imported = torch_layouts.from_state_dict(state() | counts, "resnet8", mean=0.5, std=0.25)
    jax.tree.map(np.testing.assert_array_equal, imported.network.params, resnet8().params)


@pytest.mark.parametrize("stem", ["strided", "cifar", "imagenet"])
def test_a_stem_that_shapes_cannot_tell_is_taken_as_given(stem):
    shapes = jax.eval_shape(
        lambda key: gj.models.create("mobilenetv2", num_classes=100, key=key, stem=stem), jax.random.key(0)
    )
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    tensors = torch_layouts.to_state_dict(zeros, "mobilenetv2", {"stem": stem})
    options = {"stem": stem, "width": 0.5}
    imported = torch_layouts.from_state_dict(tensors, "mobilenetv2", mean=0.5, std=0.25, options=options)
    assert imported.card["options"] == options
    assert imported.layout == ("torchvision" if stem == "imagenet" else "repdistiller")


def test_normalisation_is_known_from_the_layout_or_asked_for():
    known = torch_layouts.from_state_dict(state(100), "resnet8")
    np.testing.assert_allclose(known.network.mean, [0.5071, 0.4867, 0.4408])
    np.testing.assert_allclose(known.network.std, [0.2675, 0.2565, 0.2761])
    with pytest.raises(ValueError, match="not known for 10 classes in the layout of repdistiller; give both"):
        torch_layouts.from_state_dict(state(10), "resnet8", mean=0.5)
    given = torch_layouts.from_state_dict(state(100), "resnet8", mean=0.5, std=(0.1, 0.2, 0.3))
    assert given.card["mean"] == [0.5] * 3 and given.card["std"] == [0.1, 0.2, 0.3]


def test_the_command_writes_what_models_load_reads(tmp_path, capsys):
    tensors, out = state(), tmp_path / "teacher"
    tensor_files.write_safetensors(tmp_path / "a.safetensors", {f"module.{k}": v for k, v in tensors.items()}, {})
    arguments = ["import-torch", str(tmp_path / "a.safetensors"), "--model", "resnet8", "--out", str(out)]
    with pytest.raises(SystemExit, match=r"error: mean and std: .* not known"):
        cli.main(arguments)
    assert not out.exists()
    cli.main([*arguments, "--mean", "0.5", "--std", "0.25"])
    assert "teach with --config.teacher.dir=" in capsys.readouterr().out
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    expected = forward(resnet8(mean=[0.5] * 3, std=[0.25] * 3), images)
    np.testing.assert_array_equal(forward(gj.models.load(out), images), expected)
    assert json.loads((out / "network.json").read_text())["imported"]["layout"] == "repdistiller"
    with pytest.raises(SystemExit, match="holds a network already"):
        cli.main([*arguments, "--mean", "0.5", "--std", "0.25"])
    other = ["--out", str(tmp_path / "other")]
    for given, message in (
        ([*arguments[:3], "resnet-8", *other], "error: --model resnet-8: is unknown; did you mean 'resnet8'?"),
        (["import-torch", "no.pth", *arguments[2:4], *other], "error: there is no no.pth"),
        ([*arguments[:4], *other, "--mean", "0.5"], "error: --std is missing: give both or neither"),
        (
            [*arguments[:4], *other, *["--mean", "0.5", "0.5"], "--std", "0.5"],
            "error: mean: 2 numbers, and the channels of this network's images are 3; "
            "give one number, or one for each channel (--mean)",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(given)
        assert str(stopped.value) == message
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2 and "a PyTorch checkpoint -> " in capsys.readouterr().err


def test_a_file_of_a_machine_that_writes_the_other_way_round_is_read(tmp_path):
    weight = np.arange(6, dtype=">f4").reshape(2, 3)
    path = write_zip(tmp_path / "a.pth", {"w": tensor_of(weight, "0")}, {"0": weight})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("any/byteorder", "big")
    found = tensor_files.read_state_dict(path)["w"]
    np.testing.assert_array_equal(found, np.arange(6.0).reshape(2, 3))
    assert found.dtype == np.dtype("float32")


def test_written_safetensors_are_aligned_and_say_what_they_are(tmp_path):
    """The format asks that the tensors begin at a multiple of eight bytes."""
    for length in range(1, 10):
        path = tmp_path / "a.safetensors"
        tensor_files.write_safetensors(path, {"w" * length: np.ones(3, np.float32)}, {"model": "resnet8"})
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        assert size % 8 == 0 and len(content) == 8 + size + 12
        header = json.loads(content[8 : 8 + size])
        assert header["__metadata__"] == {"model": "resnet8"}
        assert header["w" * length] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


@pytest.mark.parametrize("model", ["resnet18", "resnet34", "resnet50"])
def test_the_stem_of_a_network_is_that_of_its_first_kernel(model):
    for size, stem in ((7, "imagenet"), (3, "cifar")):
        assert torch_layouts._stem(model, {"conv1.weight": np.zeros((64, 3, size, size))}) == {"stem": stem}
    assert torch_layouts._stem("resnet8", {"conv1.weight": np.zeros((16, 3, 3, 3))}) == {}


def test_the_normalisation_of_coloured_images_is_not_that_of_others():
    """A hundred classes of grey images are not CIFAR-100."""
    shapes = jax.eval_shape(
        lambda key: gj.models.create("resnet8", num_classes=100, in_channels=1, key=key), jax.random.key(0)
    )
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    tensors = torch_layouts.to_state_dict(zeros, "resnet8", {})
    with pytest.raises(ValueError, match="mean and std: the normalisation of resnet8 is not known for 100 classes"):
        torch_layouts.from_state_dict(tensors, "resnet8")
    assert torch_layouts.from_state_dict(tensors, "resnet8", mean=0.5, std=0.25).card["in_channels"] == 1


# Against PyTorch

ZOO = [*gj.models.names(), "tv_resnet18", "tv_resnet34", "tv_resnet50", "tv_mobilenetv2", "timm_mobilenetv2"]


@needs_torch
@pytest.mark.parametrize("name", ZOO)
def test_logits_are_pytorchs(name, tmp_path):
    classes, bare = (1000 if "_" in name and name[0] == "t" else 100), name.removeprefix("tv_").removeprefix("timm_")
    model = torch_networks.build(name, classes)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    imported = torch_layouts.from_state_dict(tensor_files.read_state_dict(tmp_path / "a.pth"), bare)
    assert imported.layout == {"tv": "torchvision", "timm": "timm"}.get(name.split("_")[0], "repdistiller")
    images = np.random.default_rng(0).uniform(size=(2, 64 if classes == 1000 else 32, 64 if classes == 1000 else 32, 3))
    images = (images * [[[[1.0]]], [[[0.2]]]]).astype(np.float32)  # a bright one and a dark one
    normalised = (images - np.asarray(imported.network.mean)) / np.asarray(imported.network.std)
    with torch.no_grad():
        expected = model(torch.from_numpy(normalised).permute(0, 3, 1, 2)).numpy()
    logits = np.asarray(forward(imported.network, jnp.asarray(images)))
    largest = np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 1e-2 * largest  # or equal logits would say nothing of the images
    assert np.abs(logits - expected).max() < 1e-4 * largest


@needs_torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_read(tmp_path, dtype, zipped):
    model = torch_networks.build("resnet8", 100).to(getattr(torch, dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"epoch": 1, "best_acc": np.float64(0.7), "optimizer": optimizer.state_dict(), "model": wrapped}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = tensor_files.read_state_dict(tmp_path / "a.pth")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(read[name].astype(np.float64), tensor.double().numpy())


@needs_torch
@pytest.mark.parametrize("name", ["resnet8", "vgg8", "shufflenetv2"])
def test_pytorch_loads_what_is_written(name, tmp_path):
    network = gj.models.create(name, num_classes=7, key=jax.random.key(0))
    tensor_files.write_torch(tmp_path / "a.pth", torch_layouts.to_state_dict(network, name, {}))
    model = torch_networks.build(name, 7, seed=1)
    model.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True))
    images = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        got = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    expected = np.asarray(forward(network, jnp.asarray(images)))
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
