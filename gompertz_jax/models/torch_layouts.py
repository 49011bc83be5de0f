"""The networks here under the names that PyTorch's programs give their tensors, in both directions.

Layouts of RepDistiller (https://github.com/HobbitLong/RepDistiller), which mdistiller
(https://github.com/megvii-research/mdistiller) shares, of torchvision and of timm.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ..network import Network, PyTree
from . import from_card
from .mobilenet import GROUPS

Module = tuple[str, ...]

# Mean and standard deviation per channel with which each program normalises, by layout and number of classes.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NORMALISATION = {
    ("repdistiller", 100): ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),  # CIFAR-100
    ("torchvision", 1000): _IMAGENET,
    ("timm", 1000): _IMAGENET,
}


class Layout(NamedTuple):
    """How one program names the modules of a network.

    Attributes:
      name: "repdistiller", "torchvision" or "timm".
      module: a path of ours, such as `("stage1_block1", "first", "conv")`, -> its name.
      options: those options of `create` that this program's network has.
      stem: the convolution that reads the images.
    """

    name: str
    module: Callable[[Module], str]
    options: Mapping[str, Any] = {}
    stem: Module = ("stem", "conv")


class Imported(NamedTuple):
    """A network with what is needed to describe it."""

    network: Network
    layout: str
    card: dict[str, Any]


def layouts(model: str, options: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts in which a network may come; the first is the one in which it is exported."""
    if model == "mobilenetv2":
        tables = Layout("repdistiller", _mobilenet_tables)
        imagenet = {"stem": "imagenet", "width": 1.0}
        others = (Layout("torchvision", _mobilenet_torchvision, imagenet), Layout("timm", _mobilenet_timm, imagenet))
        if options.get("stem") == "imagenet":
            return (*others, tables)
        return (tables,) if "stem" in options else (tables, *others)  # theirs have no other stem
    if model in ("resnet18", "resnet34", "resnet50"):
        tables = Layout("repdistiller", _resnet("shortcut", "linear"))
        others = (Layout("torchvision", _resnet("downsample", "fc")),)  # timm names them in the same way
        return (*others, tables) if options.get("stem") == "imagenet" else (tables, *others)
    if model.startswith("wrn"):
        return (Layout("repdistiller", _wrn),)
    if model.startswith("vgg"):
        return (Layout("repdistiller", _vgg, stem=("stage1_conv1", "conv")),)
    if model.startswith("shufflenet"):
        return (Layout("repdistiller", _shufflenet(model)),)
    return (Layout("repdistiller", _resnet("downsample", "fc")),)


def _numbers(name: str) -> tuple[int, int]:
    stage, index = re.findall(r"\d+", name)
    return int(stage), int(index) - 1


def _resnet(shortcut: str, head: str) -> Callable[[Module], str]:
    units = {"first": 1, "second": 2, "reduce": 1, "middle": 2, "expand": 3}
    parts = {"conv": "conv", "norm": "bn"}

    def module(path: Module) -> str:
        if path == ("head",):
            return head
        if path[0] == "stem":
            return f"{parts[path[1]]}1"
        stage, index = _numbers(path[0])
        unit = f"{shortcut}.{int(path[2] == 'norm')}" if path[1] == "shortcut" else f"{parts[path[2]]}{units[path[1]]}"
        return f"layer{stage}.{index}.{unit}"

    return module


def _wrn(path: Module) -> str:
    outside = {"stem": "conv1", "last_norm": "bn1", "head": "fc"}
    if path[0] in outside:
        return outside[path[0]]
    inside = {
        "first_norm": "bn1",
        "first": "conv1",
        "second_norm": "bn2",
        "second": "conv2",
        "shortcut": "convShortcut",
    }
    stage, index = _numbers(path[0])
    return f"block{stage}.layer.{index}.{inside[path[1]]}"


def _vgg(path: Module) -> str:
    if path == ("head",):
        return "classifier"
    stage, index = _numbers(path[0])
    return f"block{stage - 1}.{3 * index + (path[1] == 'norm')}"  # convolution, normalisation, ReLU


def _shufflenet(model: str) -> Callable[[Module], str]:
    units = {"reduce": 1, "first": 1, "depthwise": 2, "expand": 3, "second": 3}
    # Version 2 begins every stage with a unit of two branches, of which the left one is counted first.
    halving = {"left_depthwise": 1, "left": 2, "first": 3, "depthwise": 4, "second": 5}

    def module(path: Module) -> str:
        kind = "bn" if "norm" in path[-1] else "conv"
        if path == ("head",):
            return "linear"
        if path[0] in ("stem", "last"):
            return f"{kind}{1 if path[0] == 'stem' else 2}"
        stage, index = _numbers(path[0])
        numbers = halving if model == "shufflenetv2" and index == 0 else units
        return f"layer{stage}.{index}.{kind}{numbers[path[1].removesuffix('_norm')]}"

    return module


def _mobilenet_tables(path: Module) -> str:
    outside = {"stem": "conv1", "last": "conv2"}
    if path == ("head",):
        return "classifier.0"
    if path[0] in outside:
        return f"{outside[path[0]]}.{int(path[1] == 'norm')}"
    group, index = _numbers(path[0])
    units = {"expand": 0, "depthwise": 3, "project": 6}
    return f"blocks.{group - 1}.{index}.conv.{units[path[1].removesuffix('_norm')] + ('norm' in path[-1])}"


def _mobilenet_torchvision(path: Module) -> str:
    norm = int("norm" in path[-1])
    if path == ("head",):
        return "classifier.1"
    if path[0] in ("stem", "last"):
        return f"features.{0 if path[0] == 'stem' else 1 + sum(blocks for *_, blocks in GROUPS)}.{norm}"
    group, index = _numbers(path[0])
    block = 1 + sum(blocks for *_, blocks in GROUPS[: group - 1]) + index
    widened = int(group > 1)  # the first block has no expansion
    units = {"expand": f"0.{norm}", "depthwise": f"{widened}.{norm}", "project": f"{widened + 1 + norm}"}
    return f"features.{block}.conv.{units[path[1].removesuffix('_norm')]}"


def _mobilenet_timm(path: Module) -> str:
    norm = "norm" in path[-1]
    if path == ("head",):
        return "classifier"
    if path[0] in ("stem", "last"):
        return f"bn{1 + (path[0] == 'last')}" if norm else f"conv_{'stem' if path[0] == 'stem' else 'head'}"
    group, index = _numbers(path[0])
    names = ("conv_dw", "conv_pw") if group == 1 else ("conv_pw", "conv_dw", "conv_pwl")
    units = ("depthwise", "project") if group == 1 else ("expand", "depthwise", "project")
    number = units.index(path[1].removesuffix("_norm"))
    return f"blocks.{group - 1}.{index}.{f'bn{number + 1}' if norm else names[number]}"


# --- both directions --------------------------------------------------------------------------------------------------

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _named(tree: PyTree, layout: Layout) -> list[tuple[str, Any]]:
    """Every leaf of a tree of parameters or statistics with its PyTorch name, in the order of the leaves."""
    named = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        *module, kind = (entry.key for entry in path)
        named.append((f"{layout.module(tuple(module))}.{_LEAVES[kind]}", leaf))
    return named


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _axes(len(shape)))


def _axes(dimensions: int) -> tuple[int, ...]:
    """Ours `[h, w, in, out]` or `[in, out]` -> PyTorch's `[out, in, h, w]` or `[out, in]`."""
    return {4: (3, 2, 0, 1), 2: (1, 0)}.get(dimensions, tuple(range(dimensions)))


def to_state_dict(network: Network, model: str, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A network's arrays under PyTorch's names: RepDistiller's, or torchvision's for the "imagenet" stem.

    Args:
      network: one of `create`.
      model: its name.
      options: its options.

    Returns:
      float32 arrays by name, in PyTorch's order of axes; PyTorch's count of batches seen is left out.
    """
    layout, *_ = layouts(model, options)
    named = _named(network.params, layout) + _named(network.stats, layout)
    return {name: np.asarray(leaf, np.float32).transpose(_axes(leaf.ndim)) for name, leaf in named}


def from_state_dict(
    tensors: Mapping[str, np.ndarray],
    model: str,
    *,
    mean: ArrayLike | Sequence[float] | None = None,
    std: ArrayLike | Sequence[float] | None = None,
    dtype: str = "float32",
    options: Mapping[str, Any] | None = None,
) -> Imported:
    """A network from PyTorch's tensors; classes and channels are read off them, and so is the layout.

    Args:
      tensors: arrays by PyTorch's names, as `tensor_files.read_state_dict` gives them.
      model: a name of `create`.
      mean: per-channel mean of images in [0, 1]; None where the layout implies it (CIFAR-100 in RepDistiller's,
        ImageNet in torchvision's and timm's).
      std: per-channel standard deviation, in the same way.
      dtype: dtype of the arithmetic.
      options: options of `create`; by default those of the layout's own network.

    Returns:
      The network, the layout's name, and the card of `from_card`.

    Raises:
      ValueError: an unknown model; tensors that are missing, unexpected or of another shape, all of them named; a
        normalisation that is not known.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    options, tried = dict(options or {}), []
    for layout in layouts(model, options):
        chosen = dict(layout.options) | _stem(model, tensors) | options
        head, stem = (tensors.get(f"{layout.module(path)}.weight") for path in (("head",), layout.stem))
        channels = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
        card = {
            "model": model,
            "options": chosen,
            "dtype": dtype,
            "num_classes": head.shape[0] if head is not None and head.ndim == 2 else 1000,
            "in_channels": channels,
            "mean": (0.0,) * channels,
            "std": (1.0,) * channels,
        }
        shapes = from_card(card)
        tried.append((_faults(tensors, shapes, layout), layout, card, shapes))
    faults, layout, card, shapes = min(tried, key=lambda one: len(one[0]))
    if faults:
        raise ValueError(
            f"the tensors are not those of {model} in the layout of {layout.name}:\n  " + "\n  ".join(faults)
        )
    known = _NORMALISATION.get((layout.name, card["num_classes"])) if card["in_channels"] == 3 else None
    if (mean is None or std is None) and known is None:
        raise ValueError(
            f"mean and std: the normalisation of {model} is not known for {card['num_classes']} classes in the layout "
            f"of {layout.name}; give both, per channel, of images in [0, 1] (--mean and --std)"
        )
    for key, given, default in (("mean", mean, 0), ("std", std, 1)):
        values = np.asarray(known[default] if given is None and known else given, np.float64)
        if values.shape not in ((), (1,), (card["in_channels"],)):
            raise ValueError(
                f"{key}: {values.size} numbers, and the channels of this network's images are {card['in_channels']}; "
                f"give one number, or one for each channel (--{key})"
            )
        card[key] = np.broadcast_to(values, card["in_channels"]).tolist()
    network = from_card(card)

    def filled(tree: PyTree) -> PyTree:
        arrays = [
            jnp.asarray(np.asarray(tensors[name], np.float32).transpose(np.argsort(_axes(leaf.ndim))))
            for name, leaf in _named(tree, layout)
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), arrays)

    network = network.replace(
        params=filled(shapes.params),
        stats=filled(shapes.stats),
        mean=jnp.asarray(network.mean),
        std=jnp.asarray(network.std),
    )
    return Imported(network, layout.name, card)


def _stem(model: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The option `stem` of the networks that have either, by the size of the first kernel."""
    first = tensors.get("conv1.weight")
    if model not in ("resnet18", "resnet34", "resnet50") or first is None or first.ndim != 4:
        return {}
    return {"stem": "imagenet" if first.shape[2] == 7 else "cifar"}


def _faults(tensors: Mapping[str, np.ndarray], shapes: Network, layout: Layout) -> list[str]:
    expected = {
        name: _shape(leaf.shape) for tree in (shapes.params, shapes.stats) for name, leaf in _named(tree, layout)
    }
    missing = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    unexpected = [f"unexpected: {name} {tensor.shape}" for name, tensor in tensors.items() if name not in expected]
    mismatched = [
        f"mismatched: {name} is {tensors[name].shape} of {tensors[name].dtype}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and (tensors[name].shape != shape or not jnp.issubdtype(tensors[name].dtype, jnp.floating))
    ]
    return missing + unexpected + mismatched
