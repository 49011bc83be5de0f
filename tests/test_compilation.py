"""What is kept of compiled programs, and that the user's own setting stands."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gompertz_jax.training.compilation import keep_compiled
from gompertz_jax.training.config import get_default

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def as_installed():
    """JAX's own settings, with no cache."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    compilation_cache.reset_cache()
    for name, value in zip(SETTINGS, (None, 1.0), strict=True):
        jax.config.update(name, value)
    yield
    compilation_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("as_installed")
def test_programs_are_kept_however_fast_they_compile(tmp_path):
    keep_compiled(str(tmp_path / "cache"))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    jax.jit(lambda x: x * 3.25)(1.0)
    assert list((tmp_path / "cache").glob("jit__lambda*-cache"))


@pytest.mark.usefixtures("as_installed")
def test_nothing_is_kept_unless_asked():
    keep_compiled("")
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("as_installed")
def test_a_run_keeps_its_programs_where_it_says_whatever_an_earlier_one_in_the_process_said(tmp_path):
    for number, name in enumerate(("first", "second", "")):
        keep_compiled(str(tmp_path / name) if name else "")
        jax.jit(lambda x, factor=number + 4.25: x * factor)(1.0)
    assert [len(list((tmp_path / name).glob("jit__lambda*-cache"))) for name in ("first", "second")] == [1, 1]
    assert [getattr(jax.config, name) for name in SETTINGS] == [None, 1.0]
    keep_compiled(str(tmp_path / "first"))
    jax.config.update(SETTINGS[0], "own")
    keep_compiled("")
    assert jax.config.jax_compilation_cache_dir == "own"


@pytest.mark.usefixtures("as_installed")
def test_several_processes_keep_programs_only_where_the_user_says_that_all_see_them(tmp_path, monkeypatch):
    default = get_default().compilation_cache
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    keep_compiled(default)
    assert jax.config.jax_compilation_cache_dir is None
    keep_compiled(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    jax.config.update(SETTINGS[0], "own")
    keep_compiled(default)
    assert jax.config.jax_compilation_cache_dir == "own"


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("own", [{SETTINGS[0]: "own"}, {SETTINGS[1]: 5.0}])
def test_the_users_own_settings_stand(own, tmp_path):
    for name, value in own.items():
        jax.config.update(name, value)
    keep_compiled(str(tmp_path))
    for name, value in own.items():
        assert getattr(jax.config, name) == value
