"""Our side of step_time.py, as a worker: it makes the weights of a cell, and runs this package's training step.

Weights and batch go through one .npz, from which torch_step.py reads the same.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import hardware
from _worker import Stopwatch, peak_memory, reset_peak_memory, serve

import gompertz_jax as gj
from gompertz_jax.models.layers import BatchNorm
from gompertz_jax.projections import measure_teacher

IMAGE_SHAPE = (32, 32, 3)

# --- weights ----------------------------------------------------------------------------------------------------------


def make_weights(task, path):
    """Write both networks, the projection and the batch of a cell as one flat .npz."""
    keys = jax.random.split(jax.random.key(task["seed"]), 6)
    create = partial(gj.models.create, num_classes=task["classes"], mean=task["mean"], std=task["std"])
    images = make_images(keys[0], 128)
    teacher = calibrated(create(task["teacher"], key=keys[1]), images)
    student = calibrated(create(task["student"], key=keys[2]), images)
    objective = gj.gompertz_objective(total_steps=1)
    state = gj.init_state(student, optax.identity(), objective, IMAGE_SHAPE, teacher=teacher, key=keys[3])
    outputs = jax.jit(lambda teacher, images: teacher.forward(images, train=False)[0])(teacher, images)
    tree = {
        "teacher": {"params": teacher.params, "stats": teacher.stats},
        "student": {"params": student.params, "stats": student.stats},
        "projections": state.projections,
        "projection_stats": measure_teacher(
            objective.projections, state.projection_stats, [(outputs, np.zeros(len(images)))]
        ),
        "images": make_images(keys[4], task["batch"]),
        "labels": jax.random.randint(keys[5], (task["batch"],), 0, task["classes"]),
    }
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    np.savez(path, **{"/".join(entry.key for entry in place): np.asarray(leaf) for place, leaf in leaves})


def rolled(batch, step):
    """The batch in another order at every step, which changes no loss.

    With the same batch at every step the compiler would take the frozen teacher's passes out of the loop over the
    steps.
    """
    return {name: jnp.roll(values, step, 0) for name, values in batch.items()}


def make_images(key, batch):
    """Random images with structure on every scale: for pure noise, all maps and input gradients would look alike."""
    total = 0.0
    for index, size in enumerate((2, 4, 8, 16, 32)):
        field = jax.random.normal(jax.random.fold_in(key, index), (batch, size, size, IMAGE_SHAPE[2]))
        total += jax.image.resize(field, (batch, *IMAGE_SHAPE), "linear")
    return jax.nn.sigmoid(total)


def calibrated(network, images):
    """The network with the batch statistics of these images; with those of initialisation, deep networks blow up."""
    _, moved = jax.jit(lambda network, images: network.forward(images, train=True))(network, images)
    keep = BatchNorm.momentum
    stats = jax.tree.map(lambda new, old: (new - keep * old) / (1 - keep), moved, network.stats)
    return network.replace(stats=stats)


def read_weights(task, path):
    """The nested tree that `make_weights` wrote; in float64 where the task is."""
    tree = {}
    with np.load(path) as arrays:
        for name in arrays.files:
            *parents, leaf = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            array = jnp.asarray(arrays[name])
            node[leaf] = array.astype(jnp.float64) if task["dtype"] == "float64" and name != "labels" else array
    return tree


# --- the step ---------------------------------------------------------------------------------------------------------


def make_network(task, role, arrays):
    """The teacher or the student with the arrays of the file."""
    dtype = "float32" if task["dtype"] == "float64" else task["dtype"]  # float64 images raise a float32 network
    create = partial(gj.models.create, task[role], num_classes=task["classes"], dtype=dtype)
    shapes = jax.eval_shape(lambda key: create(key=key), jax.random.key(0))
    return shapes.replace(**arrays, mean=task["mean"], std=task["std"])


def without_loops(network):
    """A network without the hint that it is frozen: XLA would count only one turn of a loop over its blocks."""

    def apply(params, stats, images, *, train, key=None, offsets=None):
        return network.apply(params, stats, images, train=train, key=key, offsets=offsets)

    return network.replace(apply=apply)


def make_objective(task):
    """The row's terms at constant weights; the others are left out."""
    weights = task["weights"]
    return gj.gompertz_objective(
        total_steps=1,
        curve=gj.constant_schedule(1.0),
        soft_target_weight=weights.get("kd", 0.0),
        temperature=task["temperature"],
        wasserstein_weight=weights.get("wasserstein", 0.0),
        gradient_weight=weights.get("gradient", 0.0),
    )


def make_optimizer(task):
    return optax.chain(
        optax.add_decayed_weights(task["weight_decay"]),
        optax.trace(task["momentum"], nesterov=True),
        optax.scale_by_learning_rate(task["learning_rate"]),
    )


class Program:
    """What the worker serves: the compiled step of one cell and its state."""

    def __init__(self):
        self.stopwatch = Stopwatch()

    def build(self, task, path, steps_per_dispatch):
        """The step of a cell, not yet compiled; its state, teacher and batch are kept here."""
        objective, optimizer = make_objective(task), make_optimizer(task)
        tree = read_weights(task, path)
        student = make_network(task, "student", tree["student"])
        distils = any(term.distils for term in objective.terms)
        self.teacher = make_network(task, "teacher", tree["teacher"]) if distils else None
        self.batch = {"image": tree["images"], "label": tree["labels"]}
        state = gj.init_state(student, optimizer, objective, IMAGE_SHAPE, teacher=self.teacher)
        if objective.projections:
            state = state._replace(
                projections=tree["projections"],
                projection_stats=tree["projection_stats"],
                opt_state=optimizer.init({"student": state.params, "projections": tree["projections"]}),
            )
        self.state = jax.tree.map(jnp.array, state)  # the step donates it
        return gj.make_train_step(
            student,
            optimizer,
            objective,
            make_batch=rolled,
            steps_per_dispatch=steps_per_dispatch,
            term_gradients_every=task.get("term_gradients_every"),
        )

    def count(self, task, path, platform):
        """Operations of a step as it is handed to the compiler of a platform, which need not be here."""
        other = Program()
        train_step = other.build(task, path, 1)
        teacher = None if other.teacher is None else without_loops(other.teacher)
        program = train_step.trace(other.state, teacher, other.batch)
        return program.lower(lowering_platforms=(platform,)).cost_analysis()["flops"]

    def prepare(self, task, path, steps_per_dispatch):
        """Compile, and take the first steps: the seconds of each phase, and the losses to compare."""
        self.steps_per_dispatch = steps_per_dispatch
        train_step = self.build(task, path, steps_per_dispatch)
        marks = [time.perf_counter()]
        program = train_step.trace(self.state, self.teacher, self.batch)
        marks.append(time.perf_counter())
        program = program.lower()
        marks.append(time.perf_counter())
        self.compiled = program.compile()
        marks.append(time.perf_counter())
        phases = dict(zip(("trace", "lower", "compile"), np.diff(marks).tolist(), strict=True))

        checked = []
        while len(checked) < task["checked_steps"]:
            metrics = jax.device_get(self.dispatch())
            named = {name: metrics[name] for name in metrics if name.endswith("/raw") or name == "gradient_norm"}
            checked += [{name: float(v[i]) for name, v in named.items()} for i in range(steps_per_dispatch)]
        self.run(steps_per_dispatch)
        counted = self.compiled.cost_analysis() or {}
        prepared = {
            "phases": phases,
            "compile_seconds": sum(phases.values()),
            "checked": checked[: task["checked_steps"]],
            "sinkhorn_iterations": (
                float(metrics["wasserstein/iterations"][-1]) if "wasserstein" in task["weights"] else None
            ),
            "step_seconds": self.stopwatch.last["seconds"] / steps_per_dispatch,
            "platform": jax.default_backend(),
            "flops": counted.get("flops"),
            "bytes": counted.get("bytes accessed"),
            "peak_bytes": peak(),
        }
        self.stopwatch = Stopwatch()
        reset_peak_memory()
        return prepared

    def dispatch(self):
        """Let the program take its steps; their metrics."""
        self.state, metrics = self.compiled(self.state, self.teacher, self.batch)
        return metrics

    def run(self, steps):
        """Seconds that so many steps take."""
        with self.stopwatch:
            for _ in range(max(1, steps // self.steps_per_dispatch)):
                metrics = self.dispatch()
            jax.block_until_ready((self.state, metrics))
        return self.stopwatch.last

    def finish(self):
        """Peak memory since the preparation, how idle the process was between its turns, and whether all was finite."""
        return {
            "peak_bytes": peak(),
            "idle_load": self.stopwatch.idle_load(),
            "sound": int(self.state.failed_step) < 0,
        }


def peak():
    """From the accelerator's allocator, or resident memory."""
    statistics = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return statistics["peak_bytes_in_use"] if statistics else peak_memory()


# --- what the machine can do ------------------------------------------------------------------------------------------


def measure_peaks(dtype):
    """Arithmetic of a large matrix product, and memory traffic of a large copy, the best of several."""
    on_cpu = jax.default_backend() == "cpu"
    size, length = (2048, 2**26) if on_cpu else (8192, 2**29)
    matrix, vector = jnp.ones((size, size), dtype), jnp.ones(length, dtype)
    product = best_seconds(jax.jit(jnp.matmul), matrix, matrix)
    copy = best_seconds(jax.jit(jnp.negative), vector)
    return {"flops_per_second": 2 * size**3 / product, "bytes_per_second": 2 * vector.nbytes / copy}


def best_seconds(function, *arguments, repetitions=5):
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    program = Program()
    serve(
        {
            "hardware": hardware,
            "make_weights": make_weights,
            "count": program.count,
            "prepare": program.prepare,
            "run": program.run,
            "finish": program.finish,
            "measure_peaks": measure_peaks,
        }
    )
