"""Malformed configs and malformed arguments: whatever is given, one error of ours that names it, and soon.

    python benchmarks/fuzz.py --examples 4000
    python benchmarks/fuzz.py --examples 80 --derandomize

Hypothesis draws them. A config is a small one in which up to three keys have other values, other types, are gone, or
are new; it goes through `train_and_evaluate` up to the first work. A call is one of a function that `gompertz_jax`
exports, or of one that such a function returned (a schedule, a step), with legal arguments but for one to three, which
are replaced, or malformed in a part; it is traced, not run. What is legal by chance counts as accepted; an error raised
by a function that was passed in is counted separately. All else must be refused within seconds: a config with a
RunError, a call with a ValueError or TypeError, raised by the code of this package, whose message names a changed key
or argument, or the part of it. Everything else is listed, and the exit status is then 1.
"""

import argparse
import collections
import contextlib
import functools
import inspect
import io
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ["JAX_TRACEBACK_FILTERING"] = "off"

import hypothesis
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from _common import save_record, versions
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import helpers  # noqa: E402
import test_extremes as extremes  # noqa: E402

import gompertz_jax as gj  # noqa: E402
from gompertz_jax import schedules  # noqa: E402
from gompertz_jax.training import data, loop  # noqa: E402
from gompertz_jax.training.errors import RunError  # noqa: E402
from gompertz_jax.training.objectives import LOSSES  # noqa: E402

PACKAGE = str(Path(gj.__file__).parent)
SECONDS = 30  # of the processor: others may be busy, too

NUMBERS = [0, 1, 2, 3, -1, 7, 96, 2**31, -(10**30), 10**400, True, 0.0, 0.5, 1.0, -0.5, 1.5, 1e-320, 1e30, 1e300]
NUMBERS += [float("nan"), float("inf"), -float("inf"), 1j, np.float32("nan"), np.int64(-3), np.complex64(1j)]
OTHERS = [None, "", "text", "\0", "-1", "nan", b"", [], (), {}, {"a": 1}, {1}, object(), range(3), ...]
OTHERS += [[None], [1, "a"], (0,), (1, 2), (-1, -1), (99, 99), (0, 1, 2), ((0, 0),), ((9, 9),), ("a", "b"), [[1.5]]]


class Accepted(Exception):
    """What was drawn is legal: the work would begin now."""


# --- configs ----------------------------------------------------------------------------------------------------------

ATOMS = ["curve", "0", "1", "-1", "1e400", "nan", "x", "gompertz()", "linear(start=8, end=2)", "cosine(until=0)"]
ATOMS += ["gompertz(rate=-1)", "gompertz_through(inflection=2)", "logistic(midpoint='a')", "linear(None)", "(", "1;1"]
ATOMS += ["gompertz(**{})", "linear(start=10**9)", "[1]", "lambda: 1", "__import__('os')", "linear(start=1,start=2)"]
ATOMS += ["(" * 200, "-" * 3000 + "1", "1*" * 3000 + "1", "9" * 5000, "\0", "\ud800", "ａ", "linear(start=True)"]
WRAPPED = ["{}", "reversed({})", "matched({})", "progress({})", "0.5 * {}", "{} * {}", "{} + 1", "{}()"]
SCHEDULES = st.builds(lambda form, one, two: form.format(one, two), *map(st.sampled_from, (WRAPPED, ATOMS, ATOMS)))
PLACES = ["~nobody-of-that-name", "x" * 300, "x/" * 3000, "/dev/null", "folder:~nobody-of-that-name"]
PLACES += ["arrays:" + "x" * 300, "folder:\0", "arrays:/dev/null", "folder:", "arrays:"]
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(OTHERS),
    st.sampled_from(PLACES),
    SCHEDULES,
    st.text(max_size=8),
    st.floats(),
    st.integers(),
)
OPTIONS = sorted({name for loss in LOSSES.values() for name in inspect.signature(loss.term).parameters} - {"record"})
WORDS = ["loss", "weight", "every_k_steps", "width", "stem", "student_stage", "teacher_stage", "hidden", *OPTIONS]
WORDS += ["resize", "sharpness", "unknown", "a.b", ""]
TERMS = st.fixed_dictionaries(
    {"loss": st.sampled_from([*LOSSES, "unknown", None, 3])},
    optional={name: VALUES for name in ("weight", "every_k_steps", *OPTIONS)},
)


@functools.cache
def places():
    """Every group and key of a config, dotted."""

    def below(tree, prefix=""):
        for key, value in tree.items():
            yield prefix + key
            if isinstance(value, ml_collections.ConfigDict):
                yield from below(value, f"{prefix}{key}.")

    return list(below(helpers.small_config()))


OPEN = ("student.options", "teacher.options", "objective.terms", "objective.projections", "objective.terms.kd")
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.deferred(lambda: st.sampled_from(places())), VALUES),
        st.tuples(st.just("delete"), st.deferred(lambda: st.sampled_from(places())), st.none()),
        st.tuples(
            st.just("set"),
            st.builds("{}.{}".format, st.sampled_from([*OPEN, "recipe", "data"]), st.sampled_from(WORDS)),
            VALUES,
        ),
        st.tuples(st.just("set"), st.just("objective.terms.extra"), st.one_of(TERMS, VALUES)),
        st.tuples(
            st.just("set"),
            st.just("student.model"),
            st.sampled_from(["resnet8", "resnet8x4", "mobilenetv2", "resnet9"]),
        ),
    ),
    min_size=1,
    max_size=3,
)


def changed(changes):
    """A small config with these changes, whatever its types; None where ml_collections cannot hold them."""
    config = helpers.small_config()
    for action, place, value in changes:
        *groups, key = place.split(".")
        try:
            with config.unlocked(), config.ignore_type():
                parent = functools.reduce(lambda group, name: group[name], groups, config)
                if action == "delete":
                    del parent[key]
                else:
                    parent[key] = value
        except Exception:
            return None
    return config


def try_config(changes, directory):
    """What became of a config: "accepted", "refused", or what is wrong with the answer."""
    config = changed(changes)
    if config is None:
        return "not a config"
    names = {name for _, place, _ in changes for name in place.split(".") if name}
    names |= {name for _, _, value in changes if isinstance(value, dict) for name in value}
    return outcome(lambda: loop.train_and_evaluate(config, directory / "run"), RunError, names)


# --- calls ------------------------------------------------------------------------------------------------------------


def linear(seed):
    """A network that costs nothing."""

    def apply(params, stats, images, *, train, key=None):
        pooled = images.mean((1, 2))
        return gj.Outputs(pooled @ params, (images,), pooled), stats

    return gj.Network(apply, jax.random.normal(jax.random.key(seed), (2, 3)), {}, np.zeros(2), np.ones(2))


STUDENT, TEACHER, OPTIMIZER = linear(0), linear(1), optax.sgd(0.1, momentum=0.9)
SCHEDULE, BY_PROGRESS = gj.linear_schedule(10), gj.by_progress(gj.gompertz_schedule(1))
ALONE, EVERYTHING = gj.student_alone(), gj.gompertz_objective(10, curve=BY_PROGRESS)
SOME = gj.gompertz_objective(10, curve=BY_PROGRESS, wasserstein_weight=0.0)
BATCH = {"image": jnp.full((6, 4, 4, 2), 0.5), "label": jnp.arange(6) % 3}
LEGAL = {
    "total_steps": 100,
    "schedule": SCHEDULE,
    "curve": SCHEDULE,
    "value": 0.5,
    "inflection": 0.4,
    "record": helpers.record(),
    "student": STUDENT,
    "optimizer": OPTIMIZER,
    "objective": SOME,
    "image_shape": (4, 4, 2),
    "name": "resnet8",
    "num_classes": 3,
    "key": jax.random.key(0),
    "first": SCHEDULE,
    "second": BY_PROGRESS,
    "step": 3,
    "progress": 0.5,
    "images": BATCH["image"],
    "train": False,
    "directory": "/nowhere",
}
CLASSES = {"Network": vars(STUDENT), "Record": vars(helpers.record()), "ByProgress": vars(BY_PROGRESS)}
CARD = {"model": "resnet18", "options": {"stem": "cifar"}, "dtype": "float32", "num_classes": 3}
CARD |= {"in_channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
# Where a part of an argument is malformed, it is this that the message names.
PARTS = {
    "state": ["state"],
    "data": ["batch", "image", "images", "label"],
    "batch": ["image", "images", "label"],
    "teacher": ["network's", "teacher_logits"],
    "network": ["network's"],
    "student": ["network's"],
    "card": ["name", *CARD["options"], *CARD],
}


def _scheduled(schedule):
    return lambda step: schedule(step)


@functools.cache
def prepared():
    """What the constructors and makers return, and what takes a tree or options, by name, with legal arguments."""
    curves = {
        "gompertz_schedule": gj.gompertz_schedule(100),
        "gompertz_through": gj.gompertz_through(100, inflection=0.4),
        "logistic_schedule": gj.logistic_schedule(100),
        "linear_schedule": SCHEDULE,
        "cosine_schedule": gj.cosine_schedule(100),
        "constant_schedule": gj.constant_schedule(0.5),
        "reversed_schedule": gj.reversed_schedule(SCHEDULE, 10),
        "matched_constant": gj.matched_constant(SCHEDULE, 10),
        "product": schedules.product(SCHEDULE, SCHEDULE),
        "product with Optax": schedules.product(optax.linear_schedule(0.0, 1.0, 10), SCHEDULE),
    }
    found = {f"{name}(...)": (_scheduled(curve), {"step": 3}) for name, curve in curves.items()}
    found["by_progress(...).value"] = BY_PROGRESS.value, {"progress": 0.5, "step": 3}
    evaluated = {"network": STUDENT, "images": BATCH["image"], "labels": BATCH["label"]}
    found["models.from_card"] = gj.models.from_card, {"card": CARD}
    for model, options in (("resnet18", {"stem": "cifar"}), ("mobilenetv2", {"stem": "cifar", "width": 0.5})):
        found[f"models.create, {model}"] = _created(model), {"num_classes": 3, "width": None} | options
    found["make_eval_step(...)"] = gj.make_eval_step(), evaluated
    for name, objective in (("student_alone", ALONE), ("everything", EVERYTHING)):
        state = gj.init_state(STUDENT, OPTIMIZER, objective, (4, 4, 2), teacher=TEACHER)
        arguments = {"state": state, "teacher": TEACHER}
        train = gj.make_train_step(STUDENT, OPTIMIZER, objective)
        found[f"make_train_step(...), {name}"] = train, arguments | {"data": BATCH}
        report = gj.make_gradient_report(STUDENT, objective)
        found[f"make_gradient_report(...), {name}"] = report, arguments | {"batch": BATCH}
    return found


def _created(model):
    """`models.create` of a network that has options."""

    def create(num_classes, stem, width):
        options = {"stem": stem} if width is None else {"stem": stem, "width": width}
        return gj.models.create(model, num_classes=num_classes, key=LEGAL["key"], **options)

    return create


@functools.cache
def functions():
    """Every function that the package exports, what a network, a zoo and the schedules offer, and what those return."""
    found = {name: getattr(gj, name) for name in dir(gj) if inspect.isfunction(getattr(gj, name)) and name[0] != "_"}
    found = {name: function for name, function in found.items() if function.__module__.startswith("gompertz_jax")}
    found |= {"models.create": gj.models.create, "models.load": gj.models.load, "Network.forward": STUDENT.forward}
    found |= {"schedules.value_at": schedules.value_at, "schedules.product": schedules.product}
    found |= {name: getattr(gj, name) for name in CLASSES}
    found |= {name: function for name, (function, _) in prepared().items()}
    return {name: function for name, function in found.items() if arguments_of(function)}


def arguments_of(function):
    """Their names."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]


@functools.cache
def legal(name):
    """Legal arguments of a function, by name."""
    if name in prepared():
        return prepared()[name][1]
    if name in CLASSES:
        return dict(CLASSES[name])
    case, function = extremes.Case(), functions()[name]
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if name not in extremes.LOSSES:
        return {argument: LEGAL[argument] for argument in needed}
    made = {argument: extremes.ARGUMENTS[argument](case) for argument in needed}
    arguments = {argument: make(array) for argument, (array, make) in made.items()}
    if {"x", "labels"} <= arguments.keys():
        arguments["labels"] = jnp.arange(5) % 3 + jnp.zeros((case.batch, 1), int)
    return arguments


DTYPES = ["float32", "int32", "bool", "complex64", "float16", "uint8", "longdouble", "object", "str"]
KEYS = [jax.random.key(0), jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 3)]
GIVEN = [lambda *_, **__: None, lambda *_, **__: "a", lambda *_, **__: jnp.zeros(7), lambda x, *_, **__: x]
PIECES = [
    SCHEDULE,
    BY_PROGRESS,
    STUDENT,
    ALONE,
    gj.Outputs(1, 2, 3),
    gj.Term("a", None, None),
    gj.Progress(),
    OPTIMIZER,
]
PIECES += [gj.Projection(), gj.Projection, jax.ShapeDtypeStruct((2, 3), jnp.float32), np.datetime64(0, "s")]
ARRAYS = st.builds(
    lambda shape, dtype, make: make(np.zeros(shape, dtype)),
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from(DTYPES),
    st.sampled_from([lambda array: array, lambda array: array if array.dtype.char in "gOU" else jnp.asarray(array)]),
)
ANYTHING = st.one_of(st.sampled_from([*NUMBERS, *OTHERS, *KEYS, *GIVEN, *PIECES]), st.text(max_size=5), ARRAYS)


def deformed(array):
    """The same array in other shapes and dtypes."""
    array = np.asarray(array)
    axes = np.atleast_1d(array)
    yield from (array[None], array[..., None], array.ravel(), axes[:0], axes[..., :0], array.tolist(), axes[..., :1])
    yield from (axes[0], np.concatenate([axes, axes]), array.T, np.repeat(axes, 2, axis=-1))
    yield from (jax.ShapeDtypeStruct(array.shape, array.dtype), np.ma.masked_array(array))
    yield from (array.astype(dtype) for dtype in DTYPES)


@st.composite
def misfits(draw, usual):
    """A legal value of which one part is malformed."""
    if isinstance(usual, gj.Network):
        name = draw(st.sampled_from(["params", "stats", "mean", "std"]))
        return usual.replace(**{name: draw(misfits(getattr(usual, name)))})
    if isinstance(usual, dict) and usual:
        key, missing = draw(st.sampled_from(sorted(usual))), draw(st.integers(0, 3)) == 0
        rest = {name: value for name, value in usual.items() if name != key}
        return rest if missing else rest | {key: draw(misfits(usual[key]))}
    if isinstance(usual, tuple) and usual:
        index = draw(st.integers(0, len(usual) - 1))
        parts = (*usual[:index], draw(misfits(usual[index])), *usual[index + 1 :])
        return type(usual)(*parts) if hasattr(usual, "_fields") else parts
    if isinstance(usual, jax.Array) and not jnp.issubdtype(usual.dtype, jax.dtypes.prng_key) and draw(st.booleans()):
        return draw(st.sampled_from(list(deformed(usual))))
    return draw(ANYTHING)


@st.composite
def calls(draw):
    """A function, and what is put in the place of one to three of its arguments."""
    name = draw(st.sampled_from(sorted(functions())))
    names = st.lists(st.sampled_from(arguments_of(functions()[name])), min_size=1, max_size=3, unique=True)
    usual = legal(name)
    return name, {argument: draw(st.one_of(ANYTHING, misfits(usual.get(argument)))) for argument in draw(names)}


def try_call(name, changes):
    """What became of a call."""
    arguments = legal(name) | changes

    def traced():
        jax.eval_shape(lambda: functions()[name](**arguments) is None)
        raise Accepted

    parts = [part for argument in changes for part in PARTS.get(argument, ())]
    return outcome(traced, (ValueError, TypeError), {*changes, *parts})


# --- judgement --------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """It took too long."""


def _alarm(*_):
    raise Hang


GIVEN_FAILED = "a given function failed"
FINE = ("accepted", "refused", "not a config", GIVEN_FAILED)


def outcome(attempt, expected, names):
    """Run it under a clock; "accepted", "refused", or a description of what is wrong."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt()
        return "accepted"
    except Accepted:
        return "accepted"
    except Hang:
        return f"no answer within {SECONDS} s"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = frames[-1]
        if any(passed.filename in (extremes.__file__,) for passed in frames):
            return GIVEN_FAILED
        said = (
            f"{type(error).__name__}: {str(error)[:150]} ({frame.filename.split('site-packages/')[-1]}:{frame.lineno})"
        )
        if not isinstance(error, expected):
            return f"not one of ours: {said}"
        ours = frame.filename.startswith(PACKAGE) or frame.filename == inspect.__file__  # a missing argument
        if not ours:
            return f"out of another package: {said}"
        if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(error)) for name in names):
            return f"names none of {sorted(names)}: {said}"
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def explore(strategy, attempt, examples, derandomize):
    """Draw and try; the count of each outcome, and an example of everything that is wrong."""
    counts, wrong = collections.Counter(), {}
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @settings
    @hypothesis.given(strategy)
    def once(drawn):
        found = attempt(drawn)
        counts[found if found in FINE else "WRONG"] += 1
        if found not in FINE:
            where = found.rpartition("(")[2] if "(" in found else found
            wrong.setdefault((where, found.split(":")[0]), (found, drawn))

    once()
    return counts, list(wrong.values())


def main():
    """Print what was tried and how it ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4000, help="of calls; a fourth as many of configs")
    parser.add_argument("--only", choices=("configs", "calls"))
    parser.add_argument("--derandomize", action="store_true", help="the same ones each time")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    found = versions("hypothesis", "jax", "ml_collections")
    signal.signal(signal.SIGPROF, _alarm)

    def accept(*_):
        raise Accepted

    # Everything before the first work is the real thing; drawing weights and asking git are work.
    loop.claim_workdir, loop.provenance = accept, dict
    loop.network_from = lambda spec, dataset, *, seed: loop.network_shapes(spec, dataset)
    data.load = functools.cache(data.load)
    tried, faults = {}, 0
    with tempfile.TemporaryDirectory(prefix="gompertz_jax_fuzz_") as directory:
        kinds = {
            "configs": (CHANGES, lambda changes: try_config(changes, Path(directory)), options.examples // 4),
            "calls": (calls(), lambda call: try_call(*call), options.examples),
        }
        for kind, (strategy, attempt, examples) in kinds.items():
            if options.only in (None, kind):
                begun = time.monotonic()
                counts, wrong = explore(strategy, attempt, examples, options.derandomize)
                tried[kind] = dict(counts)
                faults += len(wrong)
                for said, drawn in wrong:
                    print(f"{kind}: {said}\n    {str(drawn)[:300]}", flush=True)
                print(
                    f"{kind}: {counts.total():,} tried in {time.monotonic() - begun:.0f} s, {dict(counts)}", flush=True
                )
    print(f"{len(functions())} functions; {found}")
    save_record(options, "", found, tried=tried, faults=faults)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
