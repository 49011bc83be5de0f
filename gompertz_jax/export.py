"""The student of a run, alone and ready for use elsewhere: a program, or weights in a common format, with a card.

The run's workdir is only read, and its lock is not taken: a run in progress can be exported from.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from . import export_onnx
from .models import tensor_files, torch_layouts
from .network import Network
from .step import as_unit_interval, make_eval_step
from .training.checkpoint import read_state, saved_steps
from .training.data import Dataset, of_config
from .training.errors import RunError
from .training.files import read_json, write_json
from .training.networks import load_network, network_shapes
from .training.sharding import data_mesh, replicate
from .training.teacher import held_out
from .training.workdir import CHECKPOINTS, CONFIG, RESULT, provenance, with_defaults
from .training.writer import METRICS, read_metrics

FORMATS = {
    "stablehlo": "student.stablehlo",
    "onnx": "student.onnx",
    "safetensors": "student.safetensors",
    "torch": "student.pth",
}
PROGRAMS = ("stablehlo", "onnx")  # the others are weights
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_COMPARED = 64  # real images whose logits must agree before an export is done
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the largest logit


class Student(NamedTuple):
    """A student and where it is from.

    Attributes:
      network: with its normalisation.
      spec: `model`, `options` and `dtype`.
      step: the step at which it was saved; None for the network that a finished run selected.
      accuracy: fractions that the run itself recorded, by name.
    """

    network: Network
    spec: dict[str, Any]
    step: int | None
    accuracy: dict[str, float | None]


def read_student(workdir: Path, dataset: Dataset, *, step: int | None = None) -> Student:
    """The student of a run, finished or not.

    Args:
      workdir: the run's.
      dataset: that of its config.
      step: of a checkpoint; None for the network that the run selected or, during the run, for its newest checkpoint.

    Returns:
      The student, with the moving average as its weights where the run keeps one.

    Raises:
      RunError: nothing is saved there at that step, or it is damaged.
    """
    spec = with_defaults(read_json(workdir / CONFIG))["student"]
    if step is None and (workdir / RESULT).is_file():
        result = read_json(workdir / RESULT)
        best = result["test_accuracy_best"]
        accuracy = {
            "test": result["test_accuracy_last"] if best is None else best,
            "validation": result["best_validation_accuracy"],
        }
        return Student(load_network(workdir), spec, None, accuracy)
    steps = saved_steps(workdir / CHECKPOINTS)
    if step is None and steps:
        step = steps[-1]
    if step is None or step not in steps:
        asked = "" if step is None else f" of step {step}"
        there = f"there are those of {', '.join(map(str, steps))}" if steps else "none is saved yet"
        raise RunError(f"{workdir} has no whole checkpoint{asked}: {there}")
    state, _ = read_state(workdir / CHECKPOINTS / str(step))
    shapes = network_shapes(spec, dataset)
    params, stats = (state["params"], state["stats"]) if state["average"] is None else state["average"]
    network = shapes.replace(
        params=_like(shapes.params, params),
        stats=_like(shapes.stats, stats),
        mean=jnp.asarray(shapes.mean, jnp.float32),
        std=jnp.asarray(shapes.std, jnp.float32),
    )
    lines = [line for line in read_metrics(workdir / METRICS) if line["split"] == "validation"]
    accuracy = {"validation": next((line.get("accuracy") for line in lines if line["step"] == step), None)}
    return Student(network, spec, step, accuracy)


def _like(shapes: Any, arrays: Any) -> Any:
    """The arrays of a tree as it lies on disk, in the structure that the network has."""
    return jax.tree.map(lambda shape, array: jnp.asarray(array, shape.dtype).reshape(shape.shape), shapes, arrays)


def export_student(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    format: str,
    step: int | None = None,
    fold_normalisation: bool = False,
) -> Path:
    """Write the student of a run, without teacher, projections and optimiser, and a card beside it.

    "stablehlo" is a program that `jax.export.deserialize(bytes).call(images)` runs without this package, for any batch
    size, on CPU, CUDA, ROCm and TPU: images `[B, H, W, C]` float32 -> logits `[B, K]`. "onnx" is a graph of the same
    form, for onnxruntime; it is written by jax2onnx, which is installed separately. "safetensors" and "torch" hold the
    weights under PyTorch's names: RepDistiller's, or torchvision's for the "imagenet" stem.

    What was written is read back, and its logits on real images are compared, before it gets its name.

    Args:
      workdir: of a run, which may still be in progress; it is only read.
      out: the directory to write; None for `WORKDIR/export/FORMAT-STEP`. It must not exist.
      format: "stablehlo", "onnx", "safetensors" or "torch".
      step: of a checkpoint; None for the network that the run selected or, during the run, for its newest checkpoint.
      fold_normalisation: for programs: the program normalises, and takes images in [0, 1]. Weights alone cannot: the
        zeros with which convolutions pad stand for the mean only after normalisation.

    Returns:
      The directory.

    Raises:
      RunError: an unknown format, or one whose writer is not installed; nothing to export; a directory that exists
        already; logits that do not agree.
    """
    workdir = Path(workdir).expanduser()
    if format not in FORMATS:
        raise RunError(f"format {format!r} is unknown; there are {', '.join(FORMATS)}")
    if fold_normalisation and format not in PROGRAMS:
        raise RunError(
            f"normalisation cannot be folded into the weights of {format}: the zeros with which convolutions pad stand "
            "for the mean only after normalisation; normalise as the card says, or export a program, such as stablehlo"
        )
    if not (workdir / CONFIG).is_file():
        raise RunError(f"{workdir} holds no run (no {CONFIG})")
    config = with_defaults(read_json(workdir / CONFIG))
    if "arms" in config:
        raise RunError(f"{workdir} holds a comparison or a search, not a run: take the workdir of a run")
    dataset = of_config(config["data"])
    student = read_student(workdir, dataset, step=step)
    if format == "onnx":
        _check_onnx(student.spec["dtype"])
    label = "selected" if student.step is None else str(student.step)
    out = workdir / "export" / f"{format}-{label}" if out is None else Path(out).expanduser()
    if out.exists():
        raise RunError(f"{out} is there already; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        file = partial / FORMATS[format]
        image_shape = dataset.train.images.shape[1:]
        if format == "stablehlo":
            _write_stablehlo(file, student.network, image_shape, fold_normalisation)
        elif format == "onnx":
            export_onnx.write_onnx(file, _logits(student.network, fold_normalisation), image_shape)
        else:
            tensors = torch_layouts.to_state_dict(student.network, student.spec["model"], student.spec["options"])
            if format == "torch":
                tensor_files.write_torch(file, tensors)
            else:
                tensor_files.write_safetensors(file, tensors, {"model": student.spec["model"]})
        compared = _compare(file, student, dataset, format, fold_normalisation)
        card = {
            "file": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "format": format,
            "model": student.spec["model"],
            "options": student.spec["options"],
            "dtype": student.spec["dtype"],
            "classes": dataset.class_names,
            "input": {
                "shape": ["batch", *(image_shape if format in PROGRAMS else _channels_first(image_shape))],
                "dtype": "float32",
                "values": "in [0, 1]" if fold_normalisation else "(image in [0, 1] - mean) / std, per channel",
            },
            "normalisation": {"mean": dataset.mean, "std": dataset.std, "folded_in": fold_normalisation},
            "accuracy": student.accuracy | {"measured_at_export": _accuracy(student.network, dataset)},
            "provenance": {
                "dataset": _without_folders(dataset.name),
                "workdir": workdir.absolute().name,
                "checkpoint_step": student.step,
                "seed": config["seed"],
                "run_config": _without_folders(config),
                "exported_by": provenance(),
            },
            "compared": compared,
        }
        write_json(partial / "card.json", card)
        partial.chmod(0o755)  # mkdtemp gives a folder to its user alone
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _check_onnx(dtype: str) -> None:
    """Refuse what cannot be converted, before anything is converted."""
    if lacking := [name for name in ("jax2onnx", "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise RunError(
            f"format 'onnx' needs {' and '.join(lacking)}: {export_onnx.INSTALL} (without its dependencies, since it "
            "asks for an older Orbax than this package does, and needs none)"
        )
    if dtype != "float32":
        raise RunError(f"format 'onnx' is of float32, and the student computes in {dtype}; export stablehlo")


def _without_folders(value: Any) -> Any:
    """A config for others to read: only the last part of every absolute path in it is kept."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, str):
        form, colon, place = value.rpartition(":")  # as in "folder:/home/me/flowers"
        if os.path.isabs(os.path.expanduser(place)):
            return f"{form}{colon}{Path(place).name}"
    return value


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    height, width, channels = shape
    return channels, height, width


def _logits(network: Network, fold: bool) -> Callable[[Any], Any]:
    # Unless it is folded in, the images come normalised already.
    plain = network if fold else network.replace(mean=np.float32(0), std=np.float32(1))
    return lambda images: plain.forward(images, train=False)[0].logits


def _write_stablehlo(file: Path, network: Network, image_shape: tuple[int, ...], fold: bool) -> None:
    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    exported = jax_export.export(jax.jit(_logits(network, fold)), platforms=PLATFORMS)(images)
    file.write_bytes(exported.serialize())


def _accuracy(network: Network, dataset: Dataset) -> dict[str, Any]:
    """How many of the held-out images the student classifies; of training images where none were held out."""
    split, mesh = held_out(dataset), data_mesh()
    classes = make_eval_step(mesh=mesh)(*replicate((network, *split), mesh)).classes
    return {
        "images": "training" if dataset.validation is None else "validation",
        "count": len(split.labels),
        "accuracy": float(np.mean(np.asarray(classes) == split.labels)),
    }


def _compare(file: Path, student: Student, dataset: Dataset, format: str, fold: bool) -> dict[str, Any]:
    """Read what was written, and compare its logits with the student's on images of the data set."""
    images = as_unit_interval(jnp.asarray(held_out(dataset).images[:_COMPARED]))
    network = student.network
    expected = np.asarray(jax.jit(_logits(network, True))(images))
    if format in PROGRAMS:
        if format == "onnx":
            read = export_onnx.read_onnx(file)
        else:
            read = jax_export.deserialize(bytearray(file.read_bytes())).call
        given = images if fold else (images - network.mean) / network.std
        got = np.concatenate([read(given[:3]), read(given[3:])])  # two batch sizes
    else:
        imported = torch_layouts.from_state_dict(
            tensor_files.read_state_dict(file),
            student.spec["model"],
            mean=dataset.mean,
            std=dataset.std,
            dtype=student.spec["dtype"],
            options=student.spec["options"],
        )
        got = np.asarray(jax.jit(_logits(imported.network, True))(images))
    difference = float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))
    if not difference <= _TOLERANCE[student.spec["dtype"]]:
        raise RunError(f"{file.name} gives other logits than the student, by {difference:.1e} of the largest")
    return {"images": len(images), "largest_difference_relative_to_largest_logit": difference}
