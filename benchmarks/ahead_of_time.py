"""What train.py would run on accelerators that are not here, compiled for them: whether it compiles, what it takes.

    pip install 'jax[cuda13]'       # for h100
    python benchmarks/ahead_of_time.py --configs configs/cifar10.py --target h100 --devices 1 8
    pip install 'jax[tpu]'          # for a TPU by its topology; its chips are divided by --devices
    python benchmarks/ahead_of_time.py --configs configs/cifar10.py --target v5e:2x4 --devices 1 8
    python benchmarks/ahead_of_time.py --configs configs/cifar10_small.py --students 8 --layouts devices map vmap unroll

XLA's compilers need no device. A program is one dispatch of a config's step: batch and augmentation from uint8 images,
both forward passes, all terms, update, metrics; with `--students`, a comparison of so many, all with the config's
objective. Sizes are MiB of one device: the arguments (weights, optimiser, teacher, training images) and the scratch
memory beside them. `operations` are the instructions of one step that a device is given one after another, one turn of
every inner loop; `collectives`, those of them with which devices communicate.

Nothing is run: this says nothing of speed, nor of whether results are right. On a GPU the library's convolutions are
not chosen (that takes a device), and their workspaces are not in the scratch memory.
"""

import argparse
import collections
import itertools
import os
import re
import runpy
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators that are here are left alone
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from _common import save_record, versions
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import gompertz_jax as gj
from gompertz_jax import models
from gompertz_jax.students import LAYOUTS, Students, divides, grouped, make_comparison_step, stacked
from gompertz_jax.training.augment import make_batch
from gompertz_jax.training.data import Dataset
from gompertz_jax.training.drive import Plan
from gompertz_jax.training.images import Split
from gompertz_jax.training.networks import network_shapes
from gompertz_jax.training.objectives import build_objective
from gompertz_jax.training.optim import learning_rate, make_optimizer

ROOT = Path(__file__).resolve().parents[1]

# What XLA asks to know of a GPU: NVIDIA's data sheet, and the CUDA programming guide on compute capability 9.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  l2_cache_size: 52428800  memory_bandwidth: 3352320000000  device_memory_size: 84929347584
}
"""
IMAGES = {
    "cifar10": (50_000, (32, 32, 3), 10),
    "cifar100": (50_000, (32, 32, 3), 100),
    "digits": (1_438, (8, 8, 1), 10),
}
COLLECTIVE = re.compile("all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute")
LAUNCHED = re.compile(
    rf" ((?:{COLLECTIVE.pattern}|copy)(?:-start)?|fusion|custom-call|convolution|dot|reduce|sort|scatter|gather"
    r"|dynamic-update-slice|while|conditional)\("
)


def devices_of(target, count):
    """So many devices of a kind that need not be here."""
    try:
        if target == "h100":
            os.environ["XLA_FLAGS"] = (
                f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # no device to time
            )
            described = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x{count}x1")
        else:
            described = topologies.get_topology_desc(target, platform="tpu")
    except (NotImplementedError, RuntimeError, ValueError) as error:
        sys.exit(f"error: --target={target}: {error}; h100 needs jax[cuda13], and a TPU's topology jax[tpu]")
    if len(described.devices) < count:
        sys.exit(f"error: --devices={count}: {target} has {len(described.devices)}")
    return described.devices[:count]


def experiment(file, dtype, steps):
    """A config's networks as shapes, its objective, optimiser and batches."""
    path, *variant = file.split(":")
    sys.path.insert(0, str(ROOT))
    config = runpy.run_path(path)["get_config"](*variant)
    count, shape, classes = IMAGES[config.data.name]
    count -= config.data.validation
    images = Split(np.zeros((count, *shape), np.uint8), np.zeros(count, np.int32))  # of which only the shapes matter
    normal = (0.5,) * shape[-1], (0.25,) * shape[-1]
    dataset = Dataset(config.data.name, classes, images, None, *normal, (), lambda: images)
    plan = Plan.of(config.recipe, config, count)
    dtypes = {"dtype": dtype} if dtype else {}
    student, teacher = (network_shapes(config[role].to_dict() | dtypes, dataset) for role in ("student", "teacher"))
    objective = build_objective(config, plan.steps)
    optimizer = make_optimizer(config.recipe, learning_rate(config.recipe, steps_per_epoch=plan.steps_per_epoch))
    draw = partial(make_batch, seed=0, batch_size=config.recipe.batch_size, **config.augment)
    return {
        "student": student,
        "teacher": teacher if any(term.distils for term in objective.terms) else None,
        "objective": objective,
        "optimizer": optimizer,
        "draw": draw,
        "data": tuple(images),
        "image_shape": shape,
        "steps": steps or plan.steps_per_dispatch,
    }


def traced(described, mesh, students, layout):
    """The step, traced on the devices of a mesh."""
    student, teacher, objective = (described[name] for name in ("student", "teacher", "objective"))
    dividing = mesh if not students or divides(layout) else None  # as the loop's feed
    options = {
        "make_batch": lambda data, step: described["draw"](*data, step, mesh=dividing),
        "steps_per_dispatch": described["steps"],
        "mesh": mesh,
    }

    def begin(student, teacher):
        state = gj.init_state(student, described["optimizer"], objective, described["image_shape"], teacher=teacher)
        return Students(jnp.int32(0), (stacked([state] * students),)) if students else state

    if students:
        groups = grouped([objective] * students)
        step = make_comparison_step(student, described["optimizer"], groups, layout=layout, **options)
    else:
        step = gj.make_train_step(student, described["optimizer"], objective, **options)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def held(leaf):
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)  # a normalisation is float64 on the host
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=everywhere)

    state = jax.eval_shape(begin, student, teacher)
    return step.trace(*jax.tree.map(held, (state, teacher, described["data"])))


def instructions(text):
    """How often each kind of instruction that a device is given stands in a compiled program."""
    found = collections.Counter()
    fused = True
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            fused = "fused" in head[1] or "fusion" in head[1]
        elif not fused and (kind := LAUNCHED.search(line)):
            found[kind[1].removesuffix("-start")] += 1
    return found


def compiled(described, target, count, students, layout):
    """What is known of one program, as JSON."""
    mesh = Mesh(np.asarray(devices_of(target, count)), ("data",), axis_types=(AxisType.Auto,))
    # A loop over the teacher's equal blocks is chosen by the backend that is here.
    with mock.patch.object(models, "loops_pay", lambda: False):
        trace = traced(described, mesh, students, layout)
        started = time.perf_counter()
        program = trace.lower(lowering_platforms=("cuda" if target == "h100" else "tpu",)).compile()
    memory = program.memory_analysis()
    return {
        "compile_seconds": time.perf_counter() - started,
        "argument_bytes": memory.argument_size_in_bytes,
        "scratch_bytes": memory.temp_size_in_bytes,
        "instructions": dict(instructions(program.as_text())),
    }


def main():
    """Print a row for every program; write them as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["configs/cifar10.py"], metavar="FILE[:VARIANT]")
    parser.add_argument("--target", default="h100", help="h100, or the topology of a TPU such as v5e:2x4")
    parser.add_argument("--devices", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", help="of both networks instead of the config's")
    parser.add_argument("--steps", type=int, help="a dispatch; default: the config's")
    parser.add_argument("--students", type=int, default=0, help="of a comparison; 0: a run's one")
    parser.add_argument("--layouts", nargs="+", default=["devices"], choices=LAYOUTS, help="of a comparison")
    parser.add_argument("--json")
    options = parser.parse_args()
    sizes = f"{'compile s':>11}{'arguments':>11}{'scratch':>9}{'operations':>12}"
    print(f"{'config':36}{'devices':>8}{'layout':>9}{sizes}  collectives")
    programs = []
    layouts = options.layouts if options.students else [None]
    for file in options.configs:
        described = experiment(file, options.dtype, options.steps)
        for count, layout in itertools.product(options.devices, layouts):
            found = compiled(described, options.target, count, options.students, layout)
            programs.append({"config": file, "devices": count, "layout": layout, **found})
            met = ", ".join(f"{n} {name}" for name, n in found["instructions"].items() if COLLECTIVE.fullmatch(name))
            print(
                f"{file:36}{count:8}{layout or '':>9}{found['compile_seconds']:11.0f}"
                f"{found['argument_bytes'] / 2**20:11,.0f}{found['scratch_bytes'] / 2**20:9,.0f}"
                f"{sum(found['instructions'].values()):12,}  {met}",
                flush=True,
            )
    packages = versions("jax", "flax", "optax", "jax-cuda13-plugin", "libtpu")
    save_record(options, options.target, packages, programs=programs)


if __name__ == "__main__":
    main()
