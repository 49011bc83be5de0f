"""Which arguments are legal: types, shapes and ranges, and the messages that refuse others.

A number that is known before tracing (a Python or NumPy number, a concrete array) is checked and becomes a Python
float, so that no closure captures an array. A traced number (a schedule evaluated inside the step, a parameter that is
differentiated) cannot be checked and is passed on as it is.
"""

import dataclasses
import functools
import inspect
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import AbstractArray, Array

Scalar = int | float | np.generic | np.ndarray | Array

# A legal number is one that float32 holds as a normal number: results are computed in float32 unless the inputs are
# wider, and 1e-300 would reach a division there as 0.
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)

LARGEST_COUNT = 2**31 - 1

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_REALS = frozenset(("bool", *_FLOATS, *_INTEGERS))

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check a public function's arguments against its annotations, one by one, before anything is computed.

    For an array, only what concerns it alone is checked: that it is an array of floats or integers, that it is not
    empty, and its number of axes. The function itself checks how shapes fit together; `finite_number` and
    `positive_count` check numbers.

    Raises:
      TypeError: an argument has another type or dtype.
      ValueError: an array is empty or has another number of axes.
    """
    signature = inspect.signature(function)
    options = {name: _options(parameter.annotation) for name, parameter in signature.parameters.items()}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}(): {error}") from None
        for name, value in given.items():
            _check(name, value, options[name])
        return function(*args, **kwargs)

    return call


def compiled(function: Callable[P, R], **options: Any) -> Any:
    """`jax.jit(function, **options)`, `checked`, with JAX's own refusal of an argument in our words.

    JAX refuses what it cannot take before the function, and with it the check, is traced. So after a call has failed
    the check is repeated, on the trees' leaves too; a call that succeeds costs nothing.

    Raises:
      TypeError, ValueError: as `checked`; an array of the donated argument is in another one, too.
    """
    signature = inspect.signature(function)
    donated = options.get("donate_argnums")
    assert donated is None or isinstance(donated, int)
    function = checked(function)
    program = jax.jit(function, **options)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return program(*args, **kwargs)
        except jax.errors.JaxRuntimeError:
            # The program's arguments were accepted, and may be donated by now.
            if donated is not None:
                _check_not_shared(signature.bind(*args, **kwargs).arguments, [*signature.parameters][donated])
            raise
        except Exception:
            try:
                for name, value in signature.bind(*args, **kwargs).arguments.items():
                    _check(name, value, _options(signature.parameters[name].annotation))
                    check_leaves(name, value)
            except (TypeError, ValueError) as refusal:
                raise refusal from None
            raise

    vars(call).update(lower=program.lower, trace=program.trace)
    return call


def check_fields(instance: Any) -> None:
    """`checked` for a dataclass: check its fields against their annotations.

    Raises:
      TypeError, ValueError: as `checked`.
    """
    for field in dataclasses.fields(instance):
        _check(field.name, getattr(instance, field.name), _options(field.type))


def check_leaves(name: str, tree: Any, *, or_shapes: bool = False) -> None:
    """Refuse a tree whose leaves are not arrays to JAX (or, with `or_shapes`, shapes), naming the place in it.

    Raises:
      TypeError: a leaf is not an array of numbers, or the tree's keys or static parts cannot be compared.
      ValueError: an array was donated.
    """
    try:
        leaves = jax.tree.leaves_with_path(tree)
        structure = jax.tree.structure(tree)
        comparable = hash(structure) == hash(structure) and structure == jax.tree.structure(tree)
    except Exception as error:
        raise TypeError(f"{name} must be a tree of arrays, got one that has no order or no equality: {error}") from None
    if not comparable:
        raise TypeError(f"{name} must be a tree of arrays, got one that does not equal itself")
    for path, leaf in leaves:
        place = name + jax.tree_util.keystr(path)
        try:
            jax.typeof(leaf)
            is_array = or_shapes or not isinstance(leaf, jax.ShapeDtypeStruct)
        except Exception:
            is_array = False
        if not is_array:
            raise TypeError(f"{place} must be an array of numbers, got {shown(leaf)}")
        if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted():
            raise ValueError(f"{place} was donated to an earlier call: pass on what that call returned in its place")


def _check_not_shared(arguments: Mapping[str, Any], donated: str) -> None:
    """Refuse arguments of which another one holds an array of the donated one, itself and not a copy of it."""
    given = {id(leaf) for leaf in jax.tree.leaves(arguments[donated])}
    for name, value in arguments.items():
        for path, leaf in jax.tree.leaves_with_path(value) if name != donated else ():
            if id(leaf) in given:
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} shares an array with {donated}, which is donated: "
                    f"pass a copy, jax.tree.map(jnp.copy, {name})"
                ) from None


def shown(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, int) and abs(value) > LARGEST_COUNT:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.200}"


def _options(annotation: Any) -> tuple[Any, ...]:
    """What a union allows."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _check(name: str, value: Any, options: tuple[Any, ...]) -> None:
    if any(_accepts(option, value) for option in options):
        return
    wanted = " or ".join(dict.fromkeys(filter(None, map(_in_words, options))))
    if isinstance(value, jax.Array | np.ndarray):
        fault = TypeError if not any(_is_of_dtype(option, value) for option in options) else ValueError
        masked = "masked " if isinstance(value, np.ma.MaskedArray) else ""
        raise fault(f"{name} must be {wanted}, got {masked}{value.dtype.name} of the shape {value.shape}")
    raise TypeError(f"{name} must be {wanted}, got {shown(value)}")


def _accepts(option: Any, value: Any) -> bool:
    """Whether a value is what one of its argument's annotations says, as far as it is checked here."""
    if _is_array(option):
        return _is_of_dtype(option, value) and 0 not in value.shape and _has_axes(option, value)
    if option is None or option is types.NoneType:
        return value is None
    origin = get_origin(option) or option
    if origin is Callable:
        return callable(value)
    if not isinstance(origin, type) or origin in (Any, int, float, object, inspect.Parameter.empty, *get_args(Scalar)):
        return True
    return isinstance(value, np.bool_ if origin is bool and isinstance(value, np.generic) else origin)


def _is_array(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, AbstractArray)


def _dtypes(option: Any) -> tuple[str, ...]:
    """The names of the dtypes that an array's annotation allows: floats and integers of any width and sign."""
    named = option.dtypes if isinstance(option.dtypes, tuple) else ("float32", "int32")  # jaxtyping's Shaped
    floats, integers = (_FLOATS if "float32" in named else ()), (_INTEGERS if "int32" in named else ())
    return floats + integers or named


def _is_of_dtype(option: Any, value: Any) -> bool:
    if not _is_array(option) or not isinstance(value, jax.Array | np.ndarray) or isinstance(value, np.ma.MaskedArray):
        return False
    if option.dtypes == ("prng_key",):
        return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return value.dtype.name in _dtypes(option)


def _has_axes(option: Any, value: Any) -> bool:
    fixed = len(option.dims)
    return value.ndim == fixed if option.index_variadic is None else value.ndim >= fixed - 1


def _in_words(option: Any) -> str:
    if _is_array(option):
        names = _dtypes(option)
        if "prng_key" in names or names == ("uint32",):
            return "a random key"
        kind = " or ".join(name for name, dtype in (("floats", "float32"), ("integers", "int32")) if dtype in names)
        return f"an array of {kind} [{option.dim_str}], not empty" if option.dim_str else f"a scalar of {kind}"
    if option is types.NoneType:
        return "None"
    if get_origin(option) is Callable:
        return "a function"
    return getattr(get_origin(option) or option, "__name__", str(option))


def is_traced(value: Any) -> bool:
    """Whether the value is known only inside a transformation, so that it cannot be inspected."""
    return isinstance(value, Tracer)


def check_real(name: str, value: Any) -> None:
    """Refuse what is not a real number or an array of real numbers, known or traced, and of any shape.

    Raises:
      TypeError: it is something else.
      ValueError: it is an integer of more than 32 bits.
    """
    if not _is_real(value):
        raise TypeError(f"{name} must be a real number or an array of real numbers, got {shown(value)}")
    if isinstance(value, int | np.integer) and abs(int(value)) > LARGEST_COUNT:
        raise ValueError(f"{name} must lie within 32 bits, got {shown(int(value))}")


def _is_real(value: Any) -> bool:
    if isinstance(value, jax.Array | np.ndarray | np.generic) and not isinstance(value, np.ma.MaskedArray):
        return value.dtype.name in _REALS
    return isinstance(value, int | float)


def finite_number(
    name: str, value: Scalar, *, legal: str = "a finite number", accept: Callable[[float], bool] | None = None
) -> float | Array:
    """Check a scalar argument and return it as a Python float; a traced one is returned as it is.

    Raises:
      TypeError: if `value` is not a real number.
      ValueError: if it is not a scalar, or is concrete and not finite or not accepted.
    """
    if not _is_real(value):
        raise TypeError(f"{name} must be {legal}, got {shown(value)}")
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be {legal}, got an array of shape {np.shape(value)}")
    if is_traced(value):
        return value  # pyright: ignore[reportReturnType]
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {legal}, got an integer beyond every float") from None
    if not abs(number) <= _LARGEST or (accept is not None and not accept(number)):
        raise ValueError(f"{name} must be {legal}, got {number!r}")
    return number


def positive_number(name: str, value: Scalar) -> float | Array:
    """`finite_number`, and positive."""
    return finite_number(
        name, value, legal="a positive number within float32's range", accept=lambda number: number >= _SMALLEST
    )


def temperature_number(name: str, value: Scalar) -> float | Array:
    """`positive_number` whose square, the factor of a loss at that temperature, is finite, too."""
    return finite_number(
        name,
        value,
        legal="a positive number whose square is within float32's range",
        accept=lambda number: number >= _SMALLEST and number * number <= _LARGEST,
    )


def fraction(name: str, value: Scalar, low: float, high: float, *, legal: str) -> float | Array:
    """`finite_number`, strictly between `low` and `high`."""
    return finite_number(name, value, legal=legal, accept=lambda number: low < number < high)


def fraction_from_zero(name: str, value: Scalar) -> float | Array:
    """`finite_number`, from 0 up to, not including, 1."""
    return finite_number(name, value, legal="in [0, 1)", accept=lambda number: 0.0 <= number < 1.0)


def positive_count(name: str, value: Any) -> int:
    """Check an argument that counts something and return it as a Python int.

    Raises:
      ValueError: if `value` is not an integer, or is below 1 or above what 32 bits hold.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if not 1 <= count <= LARGEST_COUNT:
        raise ValueError(f"{name} must be a positive integer, got {shown(count if count else value)}")
    return count
