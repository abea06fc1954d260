"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import posae.cli
import posae.pipeline
import posae.store

NEED_MORE = ("posae.pipeline.interop.saelens", "posae.pipeline.interop.saebench")
"""What needs packages that are not installed by default, and has no examples."""

MODULES = [
    m.name
    for p in (posae.store, posae.pipeline, posae.cli)
    for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")
    if m.name not in NEED_MORE
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
