"""The discipline of the whole suite: annotated shapes and dtypes of every call are checked (jaxtyping, beartype)."""

from jaxtyping import install_import_hook

install_import_hook("gompertz_jax", "beartype.beartype")
