"""Students out of workdirs, finished or not: formats, cards, and what is refused."""

import dataclasses
import hashlib
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small_config

import gompertz_jax as gj
from gompertz_jax import cli, export, export_onnx
from gompertz_jax.models import tensor_files
from gompertz_jax.models.layers import Draws, GroupedPointwise, channel_shuffle, max_pool_2x2, mean_pool_3x3
from gompertz_jax.training.checkpoint import Checkpoints
from gompertz_jax.training.data import load
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.files import write_json
from gompertz_jax.training.fit import Best
from gompertz_jax.training.networks import network_card, network_from, save_network
from gompertz_jax.training.workdir import CONFIG, frozen, sole_use

INSTALLED = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnx", "onnxruntime"))


def scrambled(network, seed):
    """Other weights, and statistics that are not those of a fresh network."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(rng.uniform(size=leaf.shape), jnp.float32), network)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir as a run leaves it while it goes on: two checkpoints, the later one with a moving average.

    Its config is older than some keys.
    """
    workdir = tmp_path_factory.mktemp("run")
    config = small_config(**{"teacher.dir": str(workdir / "teachers" / "one"), "seed": 3})
    content, dataset = frozen(config), load("digits", validation=100)
    del content["data"]["image_size"], content["teacher"]["cache"]
    write_json(workdir / CONFIG, content)
    fresh = network_from(content["student"], dataset, seed=0)
    networks = {step: fresh.replace(**arrays) for step, arrays in ((15, _arrays(fresh, 1)), (27, _arrays(fresh, 2)))}
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        for step, network in networks.items():
            state = gj.init_state(network, optax.sgd(0.1), gj.student_alone(), (8, 8, 1), moving_average=step == 27)
            state = state._replace(params=jax.tree.map(jnp.zeros_like, state.params)) if step == 27 else state
            checkpoints.save(step, (state, Best.none(state)), {})
    (workdir / "metrics.jsonl").write_text('{"step": 15, "split": "validation", "accuracy": 0.5}\n')
    return workdir, networks, dataset, content


def _arrays(network, seed):
    other = scrambled(network, seed)
    return {"params": other.params, "stats": other.stats}


def logits(network, images):
    return jax.jit(lambda network, images: network.forward(images, train=False)[0].logits)(network, images)


def images_of(split, count=None):
    return jnp.asarray(split.images[:count], jnp.float32) / 255


@pytest.mark.parametrize("fold", [False, True])
def test_a_stablehlo_program_of_a_run_that_is_going(run, tmp_path, fold, capsys):
    workdir, networks, dataset, _ = run
    out = tmp_path / "out"
    with sole_use(workdir):  # as the run does
        before = sorted(path for path in workdir.rglob("*"))
        cli.main(["export", str(workdir), "--format", "stablehlo", "--out", str(out), *["--fold-normalisation"] * fold])
        assert sorted(path for path in workdir.rglob("*")) == before
    assert f"written to {out}; read again" in capsys.readouterr().out
    program = jax.export.deserialize(bytearray((out / "student.stablehlo").read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    images, network = images_of(dataset.train, 5), networks[27]  # the newest, whose average is what is evaluated
    given = images if fold else (images - network.mean) / network.std
    for count in (1, 5):
        np.testing.assert_allclose(program.call(given[:count]), logits(network, images)[:count], rtol=1e-4, atol=1e-4)
    card = json.loads((out / "card.json").read_text())
    assert card["classes"] == list("0123456789")
    assert card["input"]["shape"] == ["batch", 8, 8, 1]
    assert card["normalisation"] == {"mean": list(dataset.mean), "std": list(dataset.std), "folded_in": fold}
    assert card["provenance"]["checkpoint_step"] == 27 and card["provenance"]["workdir"] == workdir.name
    assert str(workdir.parent) not in (out / "card.json").read_text() and card["accuracy"]["validation"] is None
    held = dataset.validation
    accuracy = np.mean(np.argmax(logits(network, images_of(held)), -1) == held.labels)
    measured = {"images": "validation", "count": 100, "accuracy": pytest.approx(accuracy)}
    assert card["accuracy"]["measured_at_export"] == measured
    assert card["compared"]["images"] == 64
    config = card["provenance"]["run_config"]
    assert config["teacher"]["dir"] == "one" and config["data"]["image_size"] == 0
    assert card["provenance"]["seed"] == config["seed"] == 3
    assert card["sha256"] == hashlib.sha256((out / card["file"]).read_bytes()).hexdigest()
    assert out.stat().st_mode & 0o777 == 0o755  # for others to read


@pytest.mark.skipif(not INSTALLED, reason=f"jax2onnx is not installed: {export_onnx.INSTALL}")
@pytest.mark.filterwarnings("ignore")  # of the converter
@pytest.mark.parametrize("fold", [False, True])
def test_an_onnx_graph_of_a_run_that_is_going(run, tmp_path, fold):
    workdir, networks, dataset, _ = run
    out = export.export_student(workdir, tmp_path / "out", format="onnx", fold_normalisation=fold)
    images, network = images_of(dataset.train, 5), networks[27]
    given = images if fold else (images - network.mean) / network.std
    got = export_onnx.read_onnx(out / "student.onnx")(given)
    np.testing.assert_allclose(got, logits(network, images), rtol=1e-4, atol=1e-4)
    card = json.loads((out / "card.json").read_text())
    assert card["input"]["shape"] == ["batch", 8, 8, 1] and card["normalisation"]["folded_in"] == fold


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_weights_of_any_checkpoint_under_pytorchs_names(run, kind):
    workdir, networks, _, _ = run
    out = export.export_student(workdir, format=kind, step=15)
    assert out == workdir / "export" / f"{kind}-15"
    tensors = tensor_files.read_state_dict(out / export.FORMATS[kind])
    kernel = networks[15].params["stage1_block1"]["first"]["conv"]["kernel"]
    np.testing.assert_array_equal(tensors["layer1.0.conv1.weight"], kernel.transpose(3, 2, 0, 1))
    assert not [name for name in tensors if not name.startswith(("conv1.", "bn1.", "layer1.", "fc."))]
    card = json.loads((out / "card.json").read_text())
    assert card["accuracy"]["validation"] == 0.5 and card["input"]["shape"] == ["batch", 1, 8, 8]
    with pytest.raises(RunError, match="is there already"):
        export.export_student(workdir, format=kind, step=15)


def test_a_finished_run_gives_the_network_it_selected(run, tmp_path):
    _, networks, dataset, content = run
    write_json(tmp_path / CONFIG, content)
    save_network(tmp_path, networks[15], network_card(content["student"], dataset))
    result = {"test_accuracy_best": 0.9, "test_accuracy_last": 0.8, "best_validation_accuracy": 0.7}
    write_json(tmp_path / "result.json", result)
    out = export.export_student(tmp_path, format="safetensors")
    assert out.name == "safetensors-selected"
    accuracy = json.loads((out / "card.json").read_text())["accuracy"]
    assert accuracy["test"] == 0.9 and accuracy["validation"] == 0.7
    # Without held-out images there is no best.
    write_json(tmp_path / "result.json", result | {"test_accuracy_best": None, "best_validation_accuracy": None})
    assert export.read_student(tmp_path, dataset).accuracy == {"test": 0.8, "validation": None}


def test_what_cannot_be_exported_is_told(run, tmp_path, monkeypatch):
    workdir, *_ = run
    with pytest.raises(RunError, match="no whole checkpoint of step 16: there are those of 15, 27"):
        export.export_student(workdir, format="torch", step=16)
    with pytest.raises(RunError, match=r"holds no run \(no config.json\)"):
        export.export_student(tmp_path, format="torch")
    compared = workdir.with_name("compared")
    compared.mkdir()
    write_json(compared / CONFIG, {"arms": {}})
    with pytest.raises(RunError, match="holds a comparison or a search, not a run"):
        export.export_student(compared, format="torch")
    with pytest.raises(RunError, match="cannot be folded into the weights of torch"):
        export.export_student(workdir, format="torch", fold_normalisation=True)
    with pytest.raises(RunError, match="format 'keras' is unknown"):
        export.export_student(workdir, format="keras")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(RunError, match="'onnx' needs jax2onnx and onnx and onnxruntime: pip install onnx"):
            export.export_student(workdir, format="onnx")
    # a writer that writes something else leaves nothing behind
    original = tensor_files.write_torch
    for error in (1.0, 0.01, float("nan")):
        monkeypatch.setattr(
            tensor_files, "write_torch", lambda path, t, e=error: original(path, t | {"fc.bias": t["fc.bias"] + e})
        )
        with pytest.raises(RunError, match=r"student\.pth gives other logits than the student"):
            export.export_student(workdir, tmp_path / "out", format="torch", step=15)
        assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: name)
        with pytest.raises(RunError, match="'onnx' is of float32, and the student computes in bfloat16; export stable"):
            export._check_onnx("bfloat16")


def test_a_student_is_measured_on_training_images_where_none_were_held_out(run):
    _, networks, dataset, _ = run
    first = dataset.train._replace(images=dataset.train.images[:50], labels=dataset.train.labels[:50])
    found = export._accuracy(networks[15], dataclasses.replace(dataset, train=first, validation=None))
    right = np.argmax(logits(networks[15], images_of(first)), -1) == first.labels
    assert found == {"images": "training", "count": 50, "accuracy": pytest.approx(right.mean())}


def test_layers_that_reshape_are_lowered_for_any_batch_size():
    layer = GroupedPointwise(6, 9, 3, draws=Draws(jnp.ones(18)))
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 8, 8, 6), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: channel_shuffle(layer(mean_pool_3x3(max_pool_2x2(x))), 3)))(images)
    assert str(exported.out_avals[0].shape) == "(batch, 2, 2, 9)"
