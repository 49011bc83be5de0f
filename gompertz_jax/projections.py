"""Projections: learned maps that make a student's outputs comparable with the teacher's.

They are trained with the student, kept apart from it and never exported. A projection is a named tuple of static fields
with a few pure methods, the same for every kind (`AnyProjection`).

Everything is in float32. Kernels are drawn from a normal distribution of variance 1 / fan-in, biases start at 0. VID's
have a third of that, PyTorch's default, as in its reference; so have, in theirs alone, CRD's embeddings, which are
normalised afterwards, and the convolution behind ReviewKD's two weights per position. Batch normalisation is over all
images of the global batch: in training by the batch's statistics, whose running means are kept (of the biased
variance), otherwise by these. Convolutions are sums of matrix products over shifted slices: XLA on CPU runs the
gradient of its own convolution 15 to 100 times slower inside `lax.scan` than outside.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._checks import positive_count
from ._numerics import matmul, unit_vectors
from .losses.costs import class_distances
from .losses.features import resample, to_one_size
from .network import Outputs, PyTree

MOMENTUM = 0.9
EPSILON = 1e-5
VARIANCE_FLOOR = 1e-5
INITIAL_VARIANCE = 5.0

# (student stage, teacher stage) of every pair
Pairs = tuple[tuple[int, int], ...]


@runtime_checkable
class AnyProjection(Protocol):
    """What every projection offers. Where only shapes are read, outputs may be `jax.ShapeDtypeStruct`s."""

    def init(self, key: Array, student: Outputs, teacher: Outputs) -> tuple[PyTree, PyTree]:
        """Fresh parameters and statistics for these networks' shapes: nested dicts of float32 arrays."""
        ...

    def apply(
        self, params: PyTree, stats: PyTree, student: Outputs, teacher: Outputs, *, train: bool
    ) -> tuple[Any, Any, PyTree]:
        """What a loss reads of both networks, and the new statistics; the teacher's outputs receive no gradient."""
        ...

    def stages(self, student: Outputs, teacher: Outputs) -> Pairs:
        """Which maps are compared, as pairs of stages counted from 0."""
        ...

    def describe(self, student: Outputs, teacher: Outputs) -> str:
        """In a few words, how channels and sizes are bridged."""
        ...


@runtime_checkable
class Measured(Protocol):
    """What a projection also offers if it measures something on the teacher before training."""

    def sums(self, teacher: Outputs, labels: np.ndarray) -> dict[str, np.ndarray]:
        """The quantities of one batch that are summed over all batches, in float64."""
        ...

    def measured(self, totals: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """The statistics that follow from the sums."""
        ...


class Projection(NamedTuple):
    """A learned 1x1 linear map + BatchNorm from a student's stage to the width of a teacher's stage.

    It is needed at equal widths too: the channels of two independently trained networks have no common order. The
    teacher's channels are standardised by statistics that `measure_teacher` fills in before training. Sizes are kept.

    Attributes:
      student_stage: index into `Outputs.features`; -1 is the map that is pooled.
      teacher_stage: the same in the teacher.
    """

    student_stage: int = -1
    teacher_stage: int = -1

    def init(self, key: Array, student: Outputs, teacher: Outputs) -> tuple[PyTree, PyTree]:
        """A kernel `[c, c']` and both networks' channel statistics, the teacher's 0 and 1 until they are measured."""
        ((ours, theirs),) = _shapes(self.stages(student, teacher), student, teacher)
        narrow, wide = ours[-1], theirs[-1]
        params, stats = _init_norm(wide)
        stats |= {"teacher_mean": jnp.zeros(wide, jnp.float32), "teacher_std": jnp.ones(wide, jnp.float32)}
        return _kernels(key, {"kernel": (narrow, wide)}) | params, stats

    def apply(
        self, params: PyTree, stats: PyTree, student: Outputs, teacher: Outputs, *, train: bool
    ) -> tuple[Float[Array, "batch _ _ channels"], Float[Array, "batch _ _ channels"], PyTree]:
        """The student's map in the teacher's width, `[B, h, w, c']`; the teacher's, standardised, `[B, h', w', c']`."""
        ((ours, theirs),) = _maps(self.stages(student, teacher), student, teacher)
        view, running = _normalised(params, stats, matmul(ours, params["kernel"]), train=train)
        standardised = (theirs - stats["teacher_mean"]) / stats["teacher_std"]
        return view, jax.lax.stop_gradient(standardised), stats | running

    def stages(self, student: Outputs, teacher: Outputs) -> Pairs:
        """The one pair."""
        return stage_pairs(((self.student_stage, self.teacher_stage),), student, teacher)

    def sums(self, teacher: Outputs, labels: np.ndarray) -> dict[str, np.ndarray]:
        """First and second moments of the teacher's channels over all positions."""
        stage = np.asarray(teacher.features[self.teacher_stage], np.float64)
        flat = stage.reshape(-1, stage.shape[-1])
        return {"total": flat.sum(0), "squares": (flat**2).sum(0), "count": np.full(1, len(flat), np.float64)}

    def measured(self, totals: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Mean and deviation of every channel, no deviation below a hundredth of the layer's root mean square one."""
        mean = totals["total"] / totals["count"]
        variance = np.maximum(totals["squares"] / totals["count"] - mean**2, 0.0)
        # A channel that hardly ever fires would be blown up to thousands by its own scale, and dominate the distance.
        floor = 1e-2 * np.sqrt(variance.mean()) or 1.0
        std = np.maximum(np.sqrt(variance), floor)
        return {"teacher_mean": jnp.asarray(mean, jnp.float32), "teacher_std": jnp.asarray(std, jnp.float32)}

    def describe(self, student: Outputs, teacher: Outputs) -> str:
        """The same for all shapes."""
        return "1x1 linear map, BatchNorm; the teacher's channels standardised"


class _Form(NamedTuple):
    """Which convolution brings a map to another's size: its kernel, the function of map and kernel, and its name."""

    size: tuple[int, int]
    convolve: Callable[[Array, Array], Array]
    words: str


class Regressor(NamedTuple):
    """FitNet's regressor: a convolution, BatchNorm and ReLU that give a student's map the shape of a teacher's.

    The convolution is that of RepDistiller's `ConvReg`: 3x3 at stride 2 where the student's map is twice as large, a
    transposed 4x4 at stride 2 where it is half as large, otherwise an unpadded convolution whose kernel is the size
    difference plus one (1x1 for equal sizes); the student's map must then be at least as large. It has no bias:
    BatchNorm would subtract it.

    Romero et al., FitNets: Hints for Thin Deep Nets, 2015, https://arxiv.org/abs/1412.6550.

    Attributes:
      student_stage: index into `Outputs.features`; -1 is the map that is pooled.
      teacher_stage: the same in the teacher.
      resize: False for a 1x1 convolution that keeps the student's size, whatever the teacher's: as in WKD-F for equal
        sizes; where they differ, its code's projector resizes, as with True.
    """

    student_stage: int = 2
    teacher_stage: int = 2
    resize: bool = True

    def init(self, key: Array, student: Outputs, teacher: Outputs) -> tuple[PyTree, PyTree]:
        """A kernel `[kh, kw, c, c']` and BatchNorm's arrays.

        Raises:
          ValueError: the student's map is smaller than the teacher's and not half as large.
        """
        ((ours, theirs),) = _shapes(self.stages(student, teacher), student, teacher)
        params, stats = _init_norm(theirs[-1])
        return _kernels(key, {"kernel": (*self._form(ours, theirs).size, ours[-1], theirs[-1])}) | params, stats

    def apply(
        self, params: PyTree, stats: PyTree, student: Outputs, teacher: Outputs, *, train: bool
    ) -> tuple[Float[Array, "batch _ _ channels"], Float[Array, "batch _ _ channels"], PyTree]:
        """The student's regressed map, `[B, h', w', c']` where it is resized, and the teacher's as it is."""
        ((ours, theirs),) = _maps(self.stages(student, teacher), student, teacher)
        y = self._form(ours.shape, theirs.shape).convolve(ours, params["kernel"])
        view, stats = _normalised(params, stats, y, train=train)
        return jax.nn.relu(view), theirs, stats

    def stages(self, student: Outputs, teacher: Outputs) -> Pairs:
        """The one pair."""
        return stage_pairs(((self.student_stage, self.teacher_stage),), student, teacher)

    def describe(self, student: Outputs, teacher: Outputs) -> str:
        """Which convolution these shapes take."""
        ((ours, theirs),) = _shapes(self.stages(student, teacher), student, teacher)
        form = self._form(ours, theirs)
        return f"{form.size[0]}x{form.size[1]} {form.words}, BatchNorm, ReLU"

    def _form(self, ours: tuple[int, ...], theirs: tuple[int, ...]) -> _Form:
        if not self.resize:
            return _Form((1, 1), lambda x, kernel: matmul(x, kernel[0, 0]), "convolution, sizes kept")
        if _is_twice(ours, theirs):
            return _Form((3, 3), partial(convolve, stride=2, padding=1), "convolution at stride 2")
        if _is_twice(theirs, ours):
            return _Form((4, 4), upsample_convolve, "transposed convolution at stride 2")
        if ours[1] < theirs[1] or ours[2] < theirs[2]:
            raise ValueError(
                "the student's map must be at least as large as the teacher's, or half as large, "
                f"got {ours[1]}x{ours[2]} and {theirs[1]}x{theirs[2]}"
            )
        return _Form((1 + ours[1] - theirs[1], 1 + ours[2] - theirs[2]), convolve, "convolution")


class VariationalRegressor(NamedTuple):
    """VID's Gaussian of a teacher's map given a student's, for several pairs of stages.

    The mean is 1x1-ReLU-1x1-ReLU-1x1 of the student's map, without biases; the variance of every channel is learned,
    the softplus of a number plus 1e-5, and starts at 5. Kernels start at PyTorch's default variance, 1 / (3 fan-in), so
    that the mean is small beside the teacher's map, as in RepDistiller's code. Where sizes differ, the larger map is
    averaged to the smaller size (`pool_map`). mdistiller's copy leaves the variances out of its optimiser; here they
    are trained, as in RepDistiller.

    Ahn et al., Variational Information Distillation for Knowledge Transfer, 2019, https://arxiv.org/abs/1904.05835.

    Attributes:
      pairs: (student stage, teacher stage) of each pair; empty means every stage after the stem that both networks
        have, index by index, RepDistiller's choice.
      hidden: channels of the hidden layers; 0 for the teacher's number, RepDistiller's choice.
    """

    pairs: Pairs = ()
    hidden: int = 0

    def init(self, key: Array, student: Outputs, teacher: Outputs) -> tuple[PyTree, PyTree]:
        """For each pair, three kernels and the raw variances `[c']`; no statistics."""
        kernels: dict[str, tuple[int, ...]] = {}
        variances = {}
        for index, (ours, theirs) in enumerate(_shapes(self.stages(student, teacher), student, teacher)):
            narrow, wide = ours[-1], theirs[-1]
            hidden = positive_count("hidden", self.hidden or wide)
            layers = (narrow, hidden), (hidden, hidden), (hidden, wide)
            kernels |= {f"pair{index}/kernel{layer}": shape for layer, shape in enumerate(layers)}
            raw = math.log(math.expm1(INITIAL_VARIANCE - VARIANCE_FLOOR))  # its softplus is the initial value
            variances[f"pair{index}/raw_variance"] = jnp.full(wide, raw, jnp.float32)
        return _nested(_kernels(key, kernels, variance=1 / 3) | variances), {}

    def apply(
        self, params: PyTree, stats: PyTree, student: Outputs, teacher: Outputs, *, train: bool
    ) -> tuple[tuple[tuple[Array, Array], ...], tuple[Array, ...], PyTree]:
        """For each pair, (mean `[B, h, w, c']`, variance `[c']`), and the teacher's map `[B, h, w, c']`."""
        predicted, maps = [], []
        for index, (ours, theirs) in enumerate(_maps(self.stages(student, teacher), student, teacher)):
            p = params[f"pair{index}"]
            ours, theirs = to_one_size(ours, theirs)
            mean = matmul(jax.nn.relu(matmul(jax.nn.relu(matmul(ours, p["kernel0"])), p["kernel1"])), p["kernel2"])
            predicted.append((mean, jax.nn.softplus(p["raw_variance"]) + VARIANCE_FLOOR))
            maps.append(theirs)
        return tuple(predicted), tuple(maps), stats

    def stages(self, student: Outputs, teacher: Outputs) -> Pairs:
        """All pairs."""
        return stage_pairs(self.pairs, student, teacher)

    def describe(self, student: Outputs, teacher: Outputs) -> str:
        """The same for all shapes."""
        return "1x1-ReLU-1x1-ReLU-1x1 and a variance per channel; the larger map averaged to the smaller size"


class Embedding(NamedTuple):
    """CRD's embeddings: an affine map of each network's pooled vector, at unit norm.

    The teacher's pooled vector is a constant, its embedding is learned with the student's: the teacher's view carries a
    gradient to the projection's parameters.

    Tian, Krishnan and Isola, Contrastive Representation Distillation, 2020, https://arxiv.org/abs/1910.10699.

    Attributes:
      width: dimension of the embeddings; 128 is the paper's.
    """

    width: int = 128

    def init(self, key: Array, student: Outputs, teacher: Outputs) -> tuple[PyTree, PyTree]:
        """For each network, a kernel `[d, width]` and a bias; no statistics."""
        inputs = {"student": student.pooled.shape[-1], "teacher": teacher.pooled.shape[-1]}
        width = positive_count("width", self.width)
        kernels = _kernels(key, {f"{role}/kernel": (size, width) for role, size in inputs.items()})
        return _nested(kernels | {f"{role}/bias": jnp.zeros(width, jnp.float32) for role in inputs}), {}

    def apply(
        self, params: PyTree, stats: PyTree, student: Outputs, teacher: Outputs, *, train: bool
    ) -> tuple[Float[Array, "batch width"], Float[Array, "batch width"], PyTree]:
        """Both embeddings, `[B, width]`."""

        def embed(p: PyTree, pooled: Array) -> Array:
            return unit_vectors(matmul(pooled.astype(jnp.float32), p["kernel"]) + p["bias"])

        ours = embed(params["student"], student.pooled)
        return ours, embed(params["teacher"], jax.lax.stop_gradient(teacher.pooled)), stats

    def stages(self, student: Outputs, teacher: Outputs) -> Pairs:
        """None: it compares the pooled vectors."""
        return ()

    def describe(self, student: Outputs, teacher: Outputs) -> str:
        """Both widths."""
        ours, theirs = student.pooled.shape[-1], teacher.pooled.shape[-1]
        return f"pooled vectors of {ours} and {theirs} by affine maps to {self.width}, at unit norm"


class Review(NamedTuple):
    """ReviewKD's fusion of all stages of a student, from the pooled vector back to its first stage.

    At each stage the student's map goes through a 1x1 convolution and BatchNorm to a common width; the result of the
    deeper stages is resized to it (nearest neighbour) and mixed in with two weights per position, the sigmoids of a 1x1
    convolution of both; the mixture, at the teacher's size, is passed on to the next stage, and a 3x3 convolution and
    BatchNorm give it the teacher's width. The pooled vector is the deepest stage, a map of 1x1 with nothing to mix in.
    A convolution to a map of 1x1 is 1x1: the other taps of the reference's 3x3 see only padding.

    The reference code fuses the student's maps after their last ReLU and compares them with the teacher's before it.
    The maps of `Outputs.features` are whatever a network returns; the networks here return those after it, so that both
    are after it.

    Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, 2021, https://arxiv.org/abs/2104.09044.

    Attributes:
      pairs: (student stage, teacher stage) of each pair, from the first to the deepest; empty means every stage after
        the stem that both networks have, index by index, the reference's choice. The pooled vectors are always added.
      width: the common width, at most that of the student's pooled vector; 512 is the reference's.
    """

    pairs: Pairs = ()
    width: int = 512

    def init(self, key: Array, student: Outputs, teacher: Outputs) -> tuple[PyTree, PyTree]:
        """For each pair and the pooled vectors: `inner` and `outer` convolution with BatchNorm, and the `attention`."""
        shapes = _shapes(self.stages(student, teacher), student, teacher)
        pooled = (1, 1, 1, student.pooled.shape[-1]), (1, 1, 1, teacher.pooled.shape[-1])
        width = self._common_width(student)
        kernels: dict[str, tuple[int, ...]] = {}
        rest, stats = {}, {}
        for name, (ours, theirs) in zip(_names(shapes), [*shapes, pooled], strict=True):
            taps = 1 if theirs[1:3] == (1, 1) else 3
            kernels[f"{name}/inner/kernel"] = (1, 1, ours[-1], width)
            kernels[f"{name}/outer/kernel"] = (taps, taps, width, theirs[-1])
            if name != "pooled":
                kernels[f"{name}/attention/kernel"] = (2 * width, 2)
                rest[f"{name}/attention/bias"] = jnp.zeros(2, jnp.float32)
            stats[name] = {}
            for layer, channels in (("inner", width), ("outer", theirs[-1])):
                norm, stats[name][layer] = _init_norm(channels)
                rest |= {f"{name}/{layer}/{part}": array for part, array in norm.items()}
        return _nested(_kernels(key, kernels) | rest), stats

    def apply(
        self, params: PyTree, stats: PyTree, student: Outputs, teacher: Outputs, *, train: bool
    ) -> tuple[tuple[Array, ...], tuple[Array, ...], PyTree]:
        """The fused maps and the teacher's, both `[B, h', w', c']`, in the order of the pairs, then of the pooled."""
        views, targets, new_stats = [], [], {}
        left = None
        maps = _maps(self.stages(student, teacher), student, teacher)
        pooled = student.pooled[:, None, None].astype(jnp.float32), teacher.pooled[:, None, None].astype(jnp.float32)
        for name, (ours, theirs) in reversed([*zip(_names(maps), [*maps, pooled], strict=True)]):
            p, s = params[name], stats[name]
            x, inner = _normalised(p["inner"], s["inner"], convolve(ours, p["inner"]["kernel"]), train=train)
            if left is not None:
                y = nearest(left, x.shape[1:3])
                weights = matmul(jnp.concatenate([x, y], axis=-1), p["attention"]["kernel"]) + p["attention"]["bias"]
                weights = jax.nn.sigmoid(weights)
                x = weights[..., :1] * x + weights[..., 1:] * y
            left = nearest(x, theirs.shape[1:3])
            kernel = p["outer"]["kernel"]
            y = convolve(left, kernel, padding=kernel.shape[0] // 2)
            y, outer = _normalised(p["outer"], s["outer"], y, train=train)
            views.append(y)
            targets.append(jax.lax.stop_gradient(theirs))
            new_stats[name] = {"inner": inner, "outer": outer}
        return tuple(reversed(views)), tuple(reversed(targets)), new_stats

    def stages(self, student: Outputs, teacher: Outputs) -> Pairs:
        """All pairs of maps."""
        return stage_pairs(self.pairs, student, teacher)

    def describe(self, student: Outputs, teacher: Outputs) -> str:
        """At which width."""
        width = self._common_width(student)
        return f"fused from the pooled vector back at width {width}, nearest neighbour, 3x3 convolutions, BatchNorm"

    def _common_width(self, student: Outputs) -> int:
        return min(positive_count("width", self.width), student.pooled.shape[-1])


class ClassDistances(NamedTuple):
    """The teacher's distances between classes, the transport costs of WKD-L; nothing is learned.

    `class_distances`, by the cosine, of each class's mean pooled vector over the training images, minus the mean over
    all of them: our choice. The paper compares the logits for the images of two classes by their kernel alignment, or
    the rows of the last layer by the cosine; a network given as a function does not expose its last layer.

    Lv, Yang and Li, 2024, https://arxiv.org/abs/2412.08139.

    Attributes:
      sharpness: kappa of `class_distances`.
    """

    sharpness: float = 1.0

    def init(self, key: Array, student: Outputs, teacher: Outputs) -> tuple[PyTree, PyTree]:
        """No parameters; all classes equally far apart until they are measured."""
        classes = teacher.logits.shape[-1]
        return {}, {"class_cost": 1.0 - jnp.eye(classes, dtype=jnp.float32)}

    def apply(
        self, params: PyTree, stats: PyTree, student: Outputs, teacher: Outputs, *, train: bool
    ) -> tuple[None, Float[Array, "classes classes"], PyTree]:
        """None for the student, and the costs `[K, K]`."""
        return None, jax.lax.stop_gradient(stats["class_cost"]), stats

    def sums(self, teacher: Outputs, labels: np.ndarray) -> dict[str, np.ndarray]:
        """For every class, the sum of the pooled vectors and the number of images."""
        member = (labels == np.arange(teacher.logits.shape[-1])[:, None]).astype(np.float64)
        return {"total": member @ np.asarray(teacher.pooled, np.float64), "count": member.sum(1)}

    def measured(self, totals: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """The costs; a class without images is unrelated to every other."""
        total, count = totals["total"], totals["count"][:, None]
        means = np.where(count > 0, total / np.maximum(count, 1.0) - total.sum(0) / count.sum(), 0.0)
        return {"class_cost": class_distances(jnp.asarray(means, jnp.float32), sharpness=self.sharpness)}

    def stages(self, student: Outputs, teacher: Outputs) -> Pairs:
        """None: it compares classes."""
        return ()

    def describe(self, student: Outputs, teacher: Outputs) -> str:
        """The number of classes."""
        return f"distances between {teacher.logits.shape[-1]} classes, measured on the teacher"


def stage_pairs(pairs: Sequence[Sequence[int]], student: Outputs, teacher: Outputs) -> Pairs:
    """Pairs of stages, counted from 0; empty means every stage after the stem that both networks have, index by index.

    Raises:
      ValueError: a network does not have a stage, or there is no pair.
    """
    ours, theirs = len(student.features), len(teacher.features)
    if not pairs:
        if min(ours, theirs) < 2:
            raise ValueError(
                f"pairs must be given: after the stem, the networks have {ours - 1} and {theirs - 1} stages"
            )
        return tuple((stage, stage) for stage in range(1, min(ours, theirs)))
    return tuple((_stage("student", i, ours), _stage("teacher", j, theirs)) for i, j in pairs)


def init_projections(
    projections: Mapping[str, AnyProjection], student: Outputs, teacher: Outputs, key: Array
) -> tuple[PyTree, PyTree]:
    """Fresh parameters and statistics of several projections, by name, for these networks' shapes."""
    params, stats = {}, {}
    for index, (name, projection) in enumerate(sorted(projections.items())):
        params[name], stats[name] = projection.init(jax.random.fold_in(key, index), student, teacher)
    return params, stats


def measure_teacher(
    projections: Mapping[str, AnyProjection], stats: PyTree, batches: Iterable[tuple[Outputs, Any]]
) -> PyTree:
    """Fill in the statistics that are measured on the teacher, once before training.

    Args:
      projections: by name.
      stats: their fresh statistics, by name.
      batches: the teacher's outputs in evaluation mode, with the labels; read once for all projections, and not at all
        if none needs it.

    Returns:
      The statistics; sums are accumulated on the host in float64 over all batches.
    """
    measured = {name: projection for name, projection in projections.items() if isinstance(projection, Measured)}
    if not measured:
        return stats
    totals: dict[str, Any] = {}
    for outputs, labels in batches:
        for name, projection in measured.items():
            sums = projection.sums(outputs, np.asarray(labels))
            totals[name] = jax.tree.map(np.add, totals[name], sums) if name in totals else sums
    filled = {name: stats[name] | projection.measured(totals[name]) for name, projection in measured.items()}
    return stats | filled


def project(
    projections: Mapping[str, AnyProjection],
    params: PyTree,
    stats: PyTree,
    student: Outputs,
    teacher: Outputs,
    *,
    train: bool = True,
) -> tuple[dict[str, Any], dict[str, Any], PyTree]:
    """Both networks' views by projection name, and the new statistics; see `AnyProjection.apply`."""
    ours, theirs, new_stats = {}, {}, {}
    for name, projection in projections.items():
        ours[name], theirs[name], new_stats[name] = projection.apply(
            params[name], stats[name], student, teacher, train=train
        )
    return ours, theirs, new_stats


# --- what the kinds share ---------------------------------------------------------------------------------------------


def convolve(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels filters"],
    *,
    stride: int = 1,
    padding: int = 0,
) -> Float[Array, "batch _ _ filters"]:
    """Cross-correlation with a kernel: its columns side by side as channels, its rows summed."""
    kernel_height, kernel_width, channels, filters = kernel.shape
    if padding:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def strided(x: Array, axis: int, start: int, size: int) -> Array:
        count = (x.shape[axis] - size) // stride + 1
        return jax.lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)

    if kernel_width > 1 or stride > 1:
        x = jnp.concatenate([strided(x, 2, column, kernel_width) for column in range(kernel_width)], axis=-1)
    rows = kernel.reshape(kernel_height, kernel_width * channels, filters)
    products = [matmul(strided(x, 1, row, kernel_height), rows[row]) for row in range(kernel_height)]
    return sum(products[1:], start=products[0])


def upsample_convolve(
    x: Float[Array, "batch height width channels"], kernel: Float[Array, "4 4 channels filters"]
) -> Float[Array, "batch _ _ filters"]:
    """Transposed 4x4 convolution at stride 2 and padding 1, which doubles height and width.

    Inserting zeros and correlating would mostly multiply zeros: the four phases of the result see four taps each. The
    kernel is that of the correlation: PyTorch's, rotated by 180 degrees.
    """
    batch, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    phases = [
        [convolve(x[:, a : a + height + 1, b : b + width + 1], kernel[a::2, b::2]) for b in range(2)] for a in range(2)
    ]
    rows = [jnp.stack(row, axis=3) for row in phases]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, kernel.shape[-1])


def nearest(x: Float[Array, "batch _ _ channels"], size: Sequence[int]) -> Float[Array, "batch _ _ channels"]:
    """The map at another size by nearest neighbour: index i reads floor(i * old size / new size).

    This is PyTorch's rule, whose scale is rounded to float32 first: 15 of the 4,096 pairs of sizes up to 64, such as
    26 -> 22, 14 -> 46 and 30 -> 58, have an index that differs. None is met with images of 32x32, 64x64 or 224x224.
    """

    def chosen(length: int, count: int) -> np.ndarray | None:
        if length == count:
            return None
        return np.arange(length) == np.arange(count)[:, None] * length // count

    return resample(x, chosen(x.shape[1], size[0]), chosen(x.shape[2], size[1]))


def _maps(pairs: Pairs, student: Outputs, teacher: Outputs) -> list[tuple[Array, Array]]:
    """The joined maps; the teacher's are constants."""
    return [
        (student.features[i].astype(jnp.float32), jax.lax.stop_gradient(teacher.features[j].astype(jnp.float32)))
        for i, j in pairs
    ]


def _shapes(pairs: Pairs, student: Outputs, teacher: Outputs) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(student.features[i].shape, teacher.features[j].shape) for i, j in pairs]


def _names(pairs: Sequence[Any]) -> list[str]:
    """Names of what `Review` fuses."""
    return [*(f"pair{index}" for index in range(len(pairs))), "pooled"]


def _is_twice(larger: tuple[int, ...], smaller: tuple[int, ...]) -> bool:
    return larger[1] == 2 * smaller[1] and larger[2] == 2 * smaller[2]


def _init_norm(width: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Parameters and statistics of a batch normalisation, all separate arrays, since a step donates them all."""

    def ones_and_zeros(one: str, zero: str) -> dict[str, Array]:
        return {one: jnp.ones(width, jnp.float32), zero: jnp.zeros(width, jnp.float32)}

    return ones_and_zeros("scale", "bias"), ones_and_zeros("var", "mean")


def _normalised(params: PyTree, stats: PyTree, y: Array, *, train: bool) -> tuple[Array, dict[str, Array]]:
    """Batch normalisation, and the running statistics after it."""
    mean, var = (y.mean((0, 1, 2)), y.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
    keep = MOMENTUM if train else 1.0
    running = {"mean": keep * stats["mean"] + (1 - keep) * mean, "var": keep * stats["var"] + (1 - keep) * var}
    y = (y - mean) * (jax.lax.rsqrt(var + EPSILON) * params["scale"]) + params["bias"]
    return y, jax.lax.stop_gradient(running)


def _kernels(key: Array, shapes: Mapping[str, tuple[int, ...]], *, variance: float = 1.0) -> dict[str, Array]:
    """Kernels of `variance` / fan-in, cut from one draw: XLA on CPU takes a second to compile each new shape."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    numbers = jnp.split(jax.random.normal(key, (sum(sizes),), jnp.float32), np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(shape) * (math.prod(shape[:-1]) / variance) ** -0.5
        for (name, shape), part in zip(shapes.items(), numbers, strict=True)
    }


def _nested(flat: Mapping[str, Array]) -> dict[str, Any]:
    """`{"a/b": x}` as `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree


def _stage(role: str, index: int, count: int) -> int:
    if not -count <= index < count:
        raise ValueError(f"the {role} has stages 0 to {count - 1} (or -1 to {-count} from the end), got {index}")
    return index % count
