"""A run of the tests ends, however busy the machine is and whatever hangs.

pytest's ``faulthandler_timeout`` prints all stacks and ends the process of a test that hangs, also
in a native call; pytest-xdist then names the test and goes on with another process. This plugin
ends the rest: programs that a test has left running, and a run that hangs outside of its tests.
"""

import contextlib
import os
import signal
import threading
import time
from typing import Any

import pytest

from tests import programs

_workers: dict[str, int] = {}  # process ids
_running: dict[str, float] = {}  # since when


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("total_timeout", "seconds after which a whole run is stopped", default="0")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        # A group of processes: what a killed worker has started can be ended with it.
        os.setpgid(0, 0)
    elif seconds := float(config.getini("total_timeout")):
        threading.Thread(target=_watch, args=(config, seconds), daemon=True).start()


def pytest_runtest_teardown() -> None:
    programs.end_all()


def pytest_runtest_logstart(nodeid: str) -> None:
    _running[nodeid] = time.monotonic()


def pytest_runtest_logfinish(nodeid: str) -> None:
    _running.pop(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    _running.pop(crashitem)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodeready(node: Any) -> None:
    _workers[node.gateway.id] = node.gateway._rinfo().pid


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    if error and node.gateway.id in _workers:
        _kill_group(_workers.pop(node.gateway.id))


@pytest.hookimpl(trylast=True)  # after pytest-xdist has waited for its workers
def pytest_sessionfinish() -> None:
    while _workers:
        _kill_group(_workers.popitem()[1])


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _watch(config: pytest.Config, seconds: float) -> None:
    """Stops a run that takes too long: all stacks, the summary with the durations, a failure."""
    time.sleep(seconds)
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        reporter.write_line(f"\nstopped after {seconds:.0f} s")
        for test, began in [*_running.items()]:
            reporter.write_line(f"running for {time.monotonic() - began:.0f} s: {test}")
    for pid in [*_workers.values()]:
        os.kill(pid, signal.SIGABRT)  # of which pytest prints all stacks
    os.kill(os.getpid(), signal.SIGINT)  # upon which pytest prints its summary
    time.sleep(60)
    os.kill(os.getpid(), signal.SIGABRT)
