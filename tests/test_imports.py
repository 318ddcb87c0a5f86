"""Loaded modules cost no path lookups while another package is imported, and are found afterwards."""

import inspect
import os

import pytest

from allranks.base import imports
from allranks.run import checkpoint


@pytest.fixture
def looked_up(monkeypatch):
    """The paths that inspect has looked up since it was asked for the last time."""
    paths = []
    real = os.path.realpath

    def note(path, *more, **options):
        paths.append(str(path))
        return real(path, *more, **options)

    monkeypatch.setattr(os.path, "realpath", note)
    monkeypatch.setattr(inspect, "modulesbyfile", {})
    monkeypatch.setattr(inspect, "_filesbymodname", {})
    return paths


def code_of_nobody():
    return compile("1", "/nobody/has/this.py", "exec")


def test_loaded_modules_are_looked_up_only_outside_the_block(looked_up):
    with imports.without_path_lookups():
        inspect.getmodule(code_of_nobody())
    inside = len(looked_up)
    looked_up.clear()
    inspect.getmodule(code_of_nobody())
    assert inside < 10
    assert len(looked_up) > 100


def test_a_module_is_found_by_its_code_after_the_block(looked_up):
    with imports.without_path_lookups():
        assert inspect.getmodule(checkpoint.read.__code__) is None
    assert inspect.getmodule(checkpoint.read.__code__) is checkpoint
