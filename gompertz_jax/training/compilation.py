"""Compiled programs kept on disk between starts."""

from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from .config import get_default

_DIRECTORY, _LEAST_SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
_BY_DEFAULT = {_DIRECTORY: None, _LEAST_SECONDS: 1.0}  # JAX's own settings
_ours: dict[str, Any] = {}  # what an earlier run of this process set, which is not the user's


def keep_compiled(directory: str) -> None:
    """Let JAX keep compiled programs in `directory` and reuse them; the user's own setting takes precedence.

    What cannot be read there, for instance because a kill cut it short, is compiled again, with a warning.

    Of several processes JAX lets only the first write. Where the others cannot read that, they would compile what the
    first one loads, and on GPUs, where they compile together, wait for it. So the default directory, which may be on
    each host's own disk, is then not used.

    Args:
      directory: made when it is first written to; "" keeps nothing. With several processes all must see it.
    """
    if jax.process_count() > 1 and directory == get_default().compilation_cache:
        directory = ""
    before = getattr(jax.config, _DIRECTORY)
    for name, value in _ours.items():
        if getattr(jax.config, name) == value:
            jax.config.update(name, _BY_DEFAULT[name])
    _ours.clear()
    if directory and getattr(jax.config, _DIRECTORY) is None:
        _ours[_DIRECTORY] = str(Path(directory).expanduser())
        # JAX leaves out what compiles in under a second: before its first step a run has some forty such programs,
        # which take 2.6 s together.
        if getattr(jax.config, _LEAST_SECONDS) == _BY_DEFAULT[_LEAST_SECONDS]:
            _ours[_LEAST_SECONDS] = 0.0
    for name, value in _ours.items():
        jax.config.update(name, value)
    if getattr(jax.config, _DIRECTORY) != before:
        compilation_cache.reset_cache()  # JAX would stay with the directory that it opened first
