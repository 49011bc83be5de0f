"""The discipline of the whole suite: annotated shapes and dtypes of every call are checked (jaxtyping, beartype)."""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

from jaxtyping import install_import_hook

install_import_hook("gompertz_jax", "beartype.beartype")

collect_ignore = ["torch_networks.py"]  # imports torch, which is for test_import_torch.py to look for

_CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config):
    """One cache of compiled programs for all workers and the processes they start; runs compile the same few again."""
    if _CACHE not in os.environ:
        config.gompertz_cache = os.environ[_CACHE] = tempfile.mkdtemp(prefix="gompertz_jax_tests_")
    # The suite compiles thousands of programs and runs each for an instant.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if version("jaxlib").startswith("0.10."):  # later ones do not know this flag, and compile faster without it
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", flags)
    gc.set_threshold(200_000, 50, 100)  # tracing makes objects by the million, and hardly any cycle
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # the programs of tests are small


def pytest_unconfigure(config):
    if hasattr(config, "gompertz_cache"):
        shutil.rmtree(config.gompertz_cache, ignore_errors=True)
        del os.environ[_CACHE]
