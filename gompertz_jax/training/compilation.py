"""Compiled programs kept on disk between starts."""

from pathlib import Path

import jax

_BY_DEFAULT = 1.0  # JAX's default for the fewest seconds that a kept program takes to compile


def keep_compiled(directory: str) -> None:
    """Let JAX keep compiled programs in `directory` and reuse them; the user's own setting takes precedence.

    What cannot be read there, for instance because a kill cut it short, is compiled again, with a warning.

    Args:
      directory: made when it is first written to; "" keeps nothing.
    """
    if directory and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
        # JAX leaves out what compiles in under a second: before its first step a run has some forty such programs,
        # which take 2.6 s together.
        if jax.config.jax_persistent_cache_min_compile_time_secs == _BY_DEFAULT:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
