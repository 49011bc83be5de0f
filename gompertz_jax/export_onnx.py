"""A network's logits as an ONNX graph, by jax2onnx, which is imported only here and only when needed."""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, Literal

INSTALL = "pip install onnx onnx-ir onnxruntime equinox dm-pix && pip install --no-deps jax2onnx"
INPUT, OUTPUT = "images", "logits"

# Where the primitives that only call keep what they call.
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def write_onnx(file: Path, logits: Callable[[Any], Any], image_shape: tuple[int, ...]) -> None:
    """Write the graph of `logits`, images `[B, H, W, C]` float32 -> `[B, K]`, for any batch size.

    Raises:
      ImportError: jax2onnx or what it needs is not installed.
    """
    import onnx  # pyright: ignore[reportMissingImports]
    from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]

    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about every value whose type it leaves out
    try:
        model = to_onnx(
            portable(logits),
            inputs=[("batch", *image_shape)],
            model_name="student",
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
    finally:
        logger.setLevel(level)
    onnx.save(model, str(file))


def read_onnx(file: Path) -> Callable[[Any], np.ndarray]:
    """The function that a graph computes, by onnxruntime on the CPU.

    Raises:
      ImportError: onnxruntime is not installed.
    """
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: session.run([OUTPUT], {INPUT: np.asarray(images)})[0]


def portable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays to one array, without what the converter cannot express.

    It has no rule for `platform_index`, by which the convolutions choose their form, so the one for any platform is
    taken. Its maximum over windows has as many axes as the array, of which onnxruntime accepts three, so slices are
    compared.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from gompertz_jax.export_onnx import portable
      >>> either = lambda x: jax.lax.platform_dependent(x, cpu=lambda x: x + 1, default=lambda x: x * 10)
      >>> float(either(jnp.float32(2))), float(portable(either)(jnp.float32(2)))
      (3.0, 20.0)
    """

    def call(*arrays: Any) -> Any:
        closed = jax.make_jaxpr(function)(*arrays)
        return _evaluate(closed.jaxpr, closed.consts, arrays)[0]

    return call


def _evaluate(jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        primitive, parameters, given = equation.primitive, equation.params, list(map(read, equation.invars))
        inner = parameters[_CALLS[primitive.name]] if primitive.name in _CALLS else None
        if primitive.name == "platform_index":
            results = [parameters["platforms"].index(None)]
        elif primitive.name == "cond" and isinstance(given[0], int):
            branch = parameters["branches"][given[0]]
            results = _evaluate(branch.jaxpr, branch.consts, given[1:])
        elif primitive.name == "reduce_window_max":
            results = [_window_max(*given, **parameters)]
        elif inner is not None:
            results = _evaluate(inner.jaxpr, inner.consts, given)
        else:
            results = primitive.bind(*given, **parameters)
            results = results if primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _window_max(
    x: Any,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **dilations: Sequence[int],
) -> Any:
    """The maximum over windows, as that of one strided slice for each place in the window."""
    if any(step != 1 for steps in dilations.values() for step in steps):
        raise NotImplementedError(f"a maximum over dilated windows: {dilations}")
    x = jnp.pad(x, padding, constant_values=-jnp.inf)
    slices = []
    for offset in np.ndindex(*window_dimensions):
        axes = []
        for start, size, stride, length in zip(offset, window_dimensions, window_strides, x.shape, strict=True):
            whole = size == stride == 1  # such as the batch, whose length is not known
            axes.append(slice(None) if whole else slice(start, length - size + 1 + start, stride))
        slices.append(x[tuple(axes)])
    return functools.reduce(lax.max, slices)
