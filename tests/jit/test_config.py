"""Environment variables: every one is read, misspelt ones are noticed, bad values are refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from cute_infer import config
from cute_infer.errors import ConfigError


def test_defaults():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = config.read({"PATH": "/bin"})
    assert read == config.Config(cache_dir=read.cache_dir) and read.cache_dir.name == "cute_infer"


def test_every_variable():
    read = config.read(
        {
            "CUTE_INFER_CACHE_DIR": "/a",
            "CUTE_INFER_BUNDLE": "/b:/c",
            "CUTE_INFER_ARCH": "sm_80",
            "CUTE_INFER_JIT": "off",
            "CUTE_INFER_BACKEND": "reference",
            "CUTE_INFER_PROGRESS": "off",
            "CUTE_INFER_VALIDATE": "0",
            "CUTE_INFER_DUMP_DIR": "/d",
        }
    )
    assert read == config.Config(Path("/a"), (Path("/b"), Path("/c")), "sm_80", False, "reference", "off", False, Path("/d"))


def test_the_table_lists_every_variable():
    assert set(re.findall(r"^ {4}(CUTE_INFER_\w+)", config.__doc__, re.MULTILINE)) == set(config.VARIABLES)


def test_unknown_variables_warn():
    with pytest.warns(UserWarning, match="CUTE_INFER_CACHEDIR.*CUTE_INFER_CACHE_DIR"):
        config.read({"CUTE_INFER_CACHEDIR": "/a"})


@pytest.mark.parametrize("name, value", [("JIT", "yes"), ("BACKEND", "cuda"), ("PROGRESS", "on"), ("VALIDATE", "true")])
def test_values_outside_the_list_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"CUTE_INFER_{name}") as error:
        config.read({f"CUTE_INFER_{name}": value})
    assert value in str(error.value)


def test_read_once(monkeypatch):
    before = config.get_config()
    monkeypatch.setenv("CUTE_INFER_JIT", "off")
    assert config.get_config() is before
    assert not config.reload_config().jit
