"""The pre-flight: said from shapes alone, and each thing that does not fit is refused with a way out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tiny_config
from ml_collections import ConfigDict

import gompertz_jax as gj
from gompertz_jax.training import preflight
from gompertz_jax.training.data import Dataset, Split
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.objectives import build_objective


def dataset(size=32, channels=3, classes=10):
    split = Split(np.zeros((20, size, size, channels), np.uint8), np.arange(20, dtype=np.int32) % classes)
    names = tuple(map(str, range(classes)))
    return Dataset("cifar10", classes, split, split, (0.5,) * channels, (0.25,) * channels, names, lambda: split)


@functools.cache
def shapes(model, classes, channels):
    return jax.eval_shape(
        lambda: gj.models.create(model, num_classes=classes, in_channels=channels, key=jax.random.key(0))
    )


def network(model, data, **normalisation):
    abstract = shapes(model, data.num_classes, data.train.images.shape[-1])
    return abstract.replace(**{"mean": data.mean, "std": data.std} | normalisation)


def describe(
    data, *, student="resnet8", teacher="resnet8", devices=1, sharing=None, batch_size=64, views=0, room=math.inf,
    **changes,
):  # fmt: skip
    config = tiny_config(**{"student.model": student, "teacher.model": teacher or "resnet8", **changes})
    objective = build_objective(config, 100)
    return preflight.describe(
        data,
        student=(config.student.to_dict(), network(student, data)),
        teacher=None if teacher is None else (config.teacher.to_dict(), network(teacher, data)),
        objective=objective,
        rate=optax.piecewise_constant_schedule(0.05, {60: 0.1}),
        batch_size=batch_size,
        steps=100,
        steps_per_dispatch=50,
        devices=devices,
        sharing=sharing,
        label="here",
        views=views,
        room=room,
    )


def test_the_reference_pair_is_described():
    text = describe(dataset(classes=100), student="mobilenetv2", teacher="resnet50")
    for part in (
        "resnet50, 23,705,252 parameters, 64@32, 256@32, 512@16, 1024@8, 2048@4",
        "mobilenetv2, 812,836 parameters, 16@16, 12@16, 16@8, 48@4, 160@2, 1280@2",
        "  matched   wasserstein: 1280@2 -> 2048@4 by projection 'last' (1x1 linear map, BatchNorm; the teacher's "
        "channels standardised), 2,625,536 parameters",
        "100 of 64 images, 50 per dispatch",
        "  rate      0.05 at 0 %, 0.05 at 25 %, 0.05 at 50 %, 0.005 at 75 %, 0.005 at 100 %\n",
        "  terms     weight at    0 %      25 %   50 %   75 %   100 %  mean\n            ce           1        1  ",
        "            kd           0.00674  ",
        "MiB",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.replace(mean=(0.5,)), None),
        (lambda n: n.replace(mean=(0.5, 0.5)), "mean has 2 channels"),
        (lambda n: n.replace(std=(0.2, 0.0, 0.2)), "std above 0"),
        (lambda n: n.replace(mean=(125.0, 123.0, 114.0)), "divide both by 255"),
        (lambda n: n.replace(std=(63.0, 62.1, 66.7)), "divide both by 255"),
        (lambda n: n.replace(mean=(float("nan"),) * 3), "must be finite"),
    ],
)
def test_a_normalisation_that_does_not_fit_is_refused(change, message):
    data = dataset()
    candidate = change(network("resnet8", data))
    if message is None:
        assert preflight.check_network("teacher", candidate, data).logits.shape == (1, 10)
    else:
        with pytest.raises(RunError, match=message):
            preflight.check_network("teacher", candidate, data)


def test_other_classes_and_other_channels_are_refused():
    teacher = network("resnet8", dataset(classes=100))
    with pytest.raises(RunError, match="has 100 classes, cifar10 has 10"):
        preflight.check_network("teacher", teacher, dataset())
    grey = network("resnet8", dataset(channels=1), mean=(0.5,), std=(0.2,))
    with pytest.raises(RunError, match="cannot take images of 32x32x3"):
        preflight.check_network("student", grey, dataset())


def test_a_stage_that_is_not_there_is_refused():
    for stage in (4, 7, -5):
        message = rf"^objective\.projections\.last: the teacher has stages 0 to 3 .*, got {stage}$"
        with pytest.raises(RunError, match=message):
            describe(dataset(), **{"objective.projections.last.teacher_stage": stage})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.terms.gradient.kind": "l3"}, "objective.terms.gradient cannot be computed: .*l3"),
        ({"objective.terms.gradient.pool": 5}, "objective.terms.gradient cannot be computed: .*5"),
        ({"objective.terms.gradient.images": 65}, "objective.terms.gradient cannot be computed: .*65"),
        ({"objective.terms.wasserstein.cloud": "none"}, "objective.terms.wasserstein cannot be computed: .*none"),
    ],
)
def test_a_term_that_cannot_be_computed_is_refused_by_name(changes, message):
    with pytest.raises(RunError, match=message):
        describe(dataset(), **changes)


def test_gradients_at_a_stage_are_described_and_a_stage_that_is_not_there_is_refused():
    text = describe(dataset(), **{"objective.terms.gradient.stages": (-1, 2), "objective.terms.gradient.pool": 1})
    assert "gradient: 64@8 -> 32@16; each position's contribution, the larger map averaged" in text
    for stage in (4, 6, -5):
        message = (
            rf"terms\.gradient: student stage {stage}: the student has stages 0 to 3 \(16@32, 16@32, 32@16, 64@8\)"
        )
        with pytest.raises(RunError, match=message):
            describe(dataset(), **{"objective.terms.gradient.stages": (stage, 3)})


CE_ALONE = {f"objective.terms.{term}.weight": "0" for term in ("kd", "wasserstein", "gradient")}


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        ("soft_targets", "logits"),
        ("wasserstein_logits", "logits"),
        ("relational_distance", "logits and pooled"),
        ("contrastive_representation", "logits and pooled"),
        ("hint", "maps"),
        ("review", "maps"),
        ("similarity_preserving", "maps"),
        ("sobolev", "gradients"),
    ],
)
def test_what_of_a_teacher_is_stored_is_what_the_terms_read(loss, parts):
    """20 images, 10 classes, 64 channels; what cannot be stored is refused by the term's name."""
    changes = {**CE_ALONE, "objective.terms.own": ConfigDict({"loss": loss, "weight": "1"})}
    if parts.startswith("logits"):
        assert f"the teacher's {parts} for 3000 views of each image" in (
            text := describe(dataset(), views=3000, **changes)
        )
        assert f"{20 * 3000 * 4 * (74 if 'pooled' in parts else 10) / 2**20:.0f} MiB" in text
    else:
        with pytest.raises(RunError, match=rf"objective\.terms\.own reads the teacher's {parts}, and teacher\.cache"):
            describe(dataset(), views=1, **changes)


def test_a_term_on_the_first_images_and_more_than_fits_are_refused():
    part = {"objective.terms.wasserstein.weight": "0", "objective.terms.gradient.images": 4}
    with pytest.raises(RunError, match=r"objective\.terms\.gradient reads the teacher's gradients"):
        describe(dataset(), views=1, **part)
    kd = {"objective.terms.wasserstein.weight": "0", "objective.terms.gradient.weight": "0"}
    with pytest.raises(RunError, match=r"teacher\.cache\.views = 3000: .* 2 MiB on each device, .* take fewer views"):
        describe(dataset(), views=3000, room=2e6, **kd)


def test_a_part_of_the_batch_suffices_for_input_gradients():
    assert "gradient" in describe(dataset(), **{"objective.terms.gradient.images": 64})
    assert "gradient" in describe(dataset(), **{"objective.terms.gradient.images": 4})


def test_what_each_of_several_devices_gets_is_told():
    assert " x 8, jax" in (text := describe(dataset(), devices=8))
    assert "100 of 64 images (8 a device), 50 per dispatch" in text
    assert "MiB a device" in text
    # Where students and not batches are divided, every device has whole ones.
    assert "100 of 64 images (64 a device), 50 per dispatch" in describe(dataset(), devices=8, sharing=1)


def test_parameters_are_counted():
    assert preflight.count_parameters({"a": jnp.zeros((3, 4)), "b": [jax.ShapeDtypeStruct((5,), jnp.float32)]}) == 17


def test_epochs_views_dtypes_and_doubtful_weights_are_told():
    changes = {"student.dtype": "bfloat16", "objective.curve": "progress(gompertz())",
               "objective.terms.wasserstein.weight": "-0.01"}  # fmt: skip
    rows = describe(dataset(), batch_size=8, **changes).splitlines()
    (student,), (teacher,) = ([row for row in rows if row.startswith(f"  {role} ")] for role in ("student", "teacher"))
    assert student.endswith(", bfloat16") and teacher.endswith(", float32")
    assert any(row.endswith("100 of 8 images, 50 per dispatch; 50 epochs of 2 whole batches") for row in rows)
    assert any("wasserstein: the weight is -0.01 at step 0; below 0" in row for row in rows)
    (kd,) = [row.split() for row in rows if "kd (of progress)" in row]
    assert kd[:3] == ["kd", "(of", "progress)"] and len(kd) == 3 + 5  # at five places, and no mean
    assert any("20 training images, 20 held out, 10 classes, 32x32x3" in row for row in rows)
    alone = describe(dataset(), teacher=None, views=3, **CE_ALONE)
    assert "views     3 of each image" in alone and "teacher" not in alone


def test_the_memory_of_a_run_is_that_of_its_parts():
    """Four arrays of the size of what is trained: weights, momentum, gradient, best; a teacher's and its outputs."""
    data = dataset()
    student, teacher = network("resnet8", data), network("resnet8", data)
    alone = preflight._memory(student, None, {}, data, 4)
    projection = {"kernel": jax.ShapeDtypeStruct((30, 7), jnp.float32)}
    assert preflight._memory(student, None, projection, data, 4) - alone == 4 * 4 * 30 * 7
    # resnet8 on 32x32 images: maps of 16@32, 16@32, 32@16 and 64@8, 64 pooled and 10 scores
    outputs = 4 * 4 * (2 * 16 * 32**2 + 32 * 16**2 + 64 * 8**2 + 64 + 10)
    weights = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((teacher.params, teacher.stats)))
    assert preflight._memory(student, teacher, {}, data, 4) - alone == weights + outputs
    kd = {"objective.terms.wasserstein.weight": "0", "objective.terms.gradient.weight": "0"}
    usual, stored = (
        int(describe(dataset(), views=views, **kd).rpartition("about ")[2].split(" MiB")[0].replace(",", ""))
        for views in (0, 30_000)
    )
    assert stored - usual == pytest.approx(20 * 30_000 * 4 * 10 / 2**20, abs=1)
