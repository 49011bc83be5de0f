"""What importing the package loads, and in which direction its modules may import each other."""

import ast
import pathlib
import subprocess
import sys

import pytest

import gompertz_jax as gj

PACKAGE = pathlib.Path(gj.__file__).parent
HEAVY = ["flax", "orbax", "tensorflow_datasets", "tensorflow", "ott", "matplotlib", "sklearn"]

NUMERICAL = {"jax", "jaxtyping", "numpy", "optax", "ott"}
# layer -> (other packages it may import, layers of this package that it may import); None: any. A layer is a module or
# a folder right below the package.
RULES = {
    "_checks": (NUMERICAL, set()),
    "_numerics": (NUMERICAL, set()),
    "schedules": (NUMERICAL, {"_checks", "_numerics"}),
    "intact": (set(), set()),
    "losses": (NUMERICAL, {"_checks", "_numerics", "losses"}),
    "network": (NUMERICAL, {"_checks"}),
    "record": (NUMERICAL, {"_checks", "network"}),
    "projections": (NUMERICAL, {"_checks", "_numerics", "losses", "network"}),
    "terms": (NUMERICAL, {"losses", "network", "projections", "record"}),
    "objective": (NUMERICAL, {"_checks", "schedules", "projections", "record", "terms"}),
    "data_parallel": (NUMERICAL, set()),
    "state": (NUMERICAL, {"_checks", "network", "objective", "projections"}),
    "step": (
        NUMERICAL,
        {"_checks", "data_parallel", "losses", "network", "objective", "projections", "record", "schedules", "state"},
    ),
    "models": (None, {"_checks", "_numerics", "intact", "network", "models"}),
}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_loads_neither_networks_nor_data_nor_transport():
    loaded = run(f"import sys, gompertz_jax; print(*(name for name in {HEAVY} if name in sys.modules))")
    assert loaded == []


def test_transport_in_closed_form_loads_no_solver():
    code = (
        "import sys, jax.numpy as jnp, gompertz_jax as gj; gj.gaussian_wasserstein(jnp.ones((2, 3)), jnp.ones((2, 3)))"
    )
    assert run(f"{code}; print(*(name for name in {HEAVY} if name in sys.modules))") == []


def test_what_is_loaded_on_first_use_is_listed_and_found():
    names = run("import gompertz_jax as gj; print(*dir(gj))")
    assert {
        "models", "SinkhornDiagnostics", "class_sinkhorn_distance", "sinkhorn_distance", "wasserstein_logits",
    } <= {*names}  # fmt: skip
    loaded = run(
        "import sys, gompertz_jax as gj; gj.sinkhorn_distance; "
        f"print(*(name for name in {HEAVY} if name in sys.modules))"
    )
    assert "ott" in loaded and "tensorflow" not in loaded
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        gj.no_such_name  # noqa: B018


def test_a_star_import_gives_the_public_names_and_nothing_else():
    names = run("from gompertz_jax import *; print(*(name for name in dir() if name[:2] != '__'))")
    source = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    exported = {
        alias.asname for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names
    } - {None}
    assert {*names} == exported and len(names) > 70
    assert {"models", "sinkhorn_distance", "soft_target_kl", "make_train_step"} <= exported


def imports(path):
    """The modules that a file imports, anywhere in it, as absolute dotted names."""
    package = ("gompertz_jax", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            # `from . import name` may name a module or an attribute of the package.
            yield from ([base] if node.module else (f"{base}.{alias.name}" for alias in node.names))


def layer(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_imports_point_inward(path):
    if layer(path) == "__init__":
        return  # the public face re-exports everything; what it loads is tested above
    packages, layers = RULES.get(layer(path), (None, None))
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "gompertz_jax":
            assert layers is None or (rest and rest[0] in layers), f"{path.name} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert packages is None or top in packages, f"{path.name} imports {name}"
            assert top != "flax" or layer(path) == "models", f"{path.name} imports flax, which only models may"
        # OTT imports Flax: only the module that is loaded on first use may import it.
        assert top != "ott" or path.name == "_sinkhorn.py", f"{path.name} imports {name}"


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "losses").mkdir()
    file = tmp_path / "losses" / "one.py"
    file.write_text(
        "import flax.nnx as nnx, numpy\nfrom jax import lax\nfrom . import two\nfrom .three import x\n"
        "from .. import models\nfrom ..training.loop import y\ndef f():\n    import ott\n"
    )
    assert set(imports(file)) == {
        "flax.nnx", "numpy", "jax", "gompertz_jax.losses.two", "gompertz_jax.losses.three", "gompertz_jax.models",
        "gompertz_jax.training.loop", "ott",
    }  # fmt: skip
    assert layer(file) == "losses"
