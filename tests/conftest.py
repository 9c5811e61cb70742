"""What holds for all tests: servers are ended with the run, and a failure shows what they said."""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path

import pytest

_FAILED = pytest.StashKey[bool]()


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: long runs under load, for `make soak` only")


def pytest_collection_modifyitems(config, items):
    """Leave the soak tests out unless they are asked for."""
    if config.getoption("markexpr"):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]


@pytest.fixture(autouse=True)
def _temporary_names(request, monkeypatch):
    """Keep what trial's ``mktemp`` names out of the working directory: only trial's own runner changes that."""

    def mktemp():
        return str(Path(tempfile.mkdtemp(dir=request.getfixturevalue("tmp_path")), "temp"))

    if hasattr(request.instance, "mktemp"):
        monkeypatch.setattr(request.instance, "mktemp", mktemp)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    # Only where a test has loaded it: unit tests start nothing.
    processes = sys.modules.get("tests.support.processes")
    if report.failed and processes is not None:
        report.sections += [(f"log of {name}", text) for name, text in processes.logs().items()]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    done = yield
    if item.stash.get(_FAILED, False):
        # What it has left unfinished was kept by its traceback, and would be logged into some later test.
        gc.collect()
    return done


def pytest_sessionfinish():
    processes = sys.modules.get("tests.support.processes")
    if processes is not None:
        processes.end_all()
