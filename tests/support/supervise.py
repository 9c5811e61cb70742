"""Run one command, and end it with all that it started when whoever asked for it is gone.

A script of its own, started by ``processes.py`` as ``supervise.py CONTROL run COMMAND...`` or
``supervise.py CONTROL remove DIRECTORY``. CONTROL is the reading end of a pipe whose other end only the test
process holds. The byte ``t`` on it asks the command to end (SIGTERM); end of file, which the kernel sees to
however the test process went, kills at once. Being a subreaper, this process is the parent of whatever
the command leaves behind (epmd, RabbitMQ's monitors), and ends that too.
"""

# Without pathlib it starts in 20 ms.
# ruff: noqa: PTH110, PTH123, PTH208
from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time

__all__ = ["main"]

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD]


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(f"prctl({option}) failed")


def _descendants() -> list[int]:
    """All processes below this one, as ``/proc`` shows them now."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                parent = int(stat.read().rpartition(b")")[2].split()[1])
        except OSError:
            continue  # it has gone meanwhile
        children.setdefault(parent, []).append(int(name))
    found = [os.getpid()]
    for pid in found:
        found.extend(children.get(pid, []))
    return found[1:]


def _kill_all() -> None:
    """Kill all descendants; those of the killed become children of ours, so go on until there is none."""
    while True:
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _spawn(command: list[str]) -> int:
    supervisor = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the supervisor itself be killed
        if os.getppid() == supervisor:
            os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error}\n".encode())
    os._exit(127)


def _run(control: int, command: list[str]) -> int:
    """Supervise the command; returns its exit status as a shell gives it."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    child = _spawn(command)
    while True:
        ready = select.select([control, woken], [], [])[0]
        signals = os.read(woken, 256) if woken in ready else b""
        order = os.read(control, 1) if control in ready else None
        if order == b"":
            _kill_all()
            return 128 + signal.SIGKILL
        if order or signal.SIGTERM in signals:
            os.kill(child, signal.SIGTERM)  # not reaped yet, so the id is still the child's
        if signal.SIGCHLD in signals:
            with contextlib.suppress(ChildProcessError):
                while (gone := os.waitpid(-1, os.WNOHANG))[0]:
                    if gone[0] == child:
                        _kill_all()
                        code = os.waitstatus_to_exitcode(gone[1])
                        return code if code >= 0 else 128 - code


def _remove(control: int, directory: str) -> int:
    """Wait until the test process has gone, then remove its directory, which others may still be leaving."""
    while os.read(control, 1):
        pass
    for _ in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.exists(directory):
            return 0
        time.sleep(0.1)
    return 1


def main(arguments: list[str]) -> int:
    """Do what the module's docstring says."""
    control, order, *rest = arguments
    os.set_inheritable(int(control), False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    return _run(int(control), rest) if order == "run" else _remove(int(control), rest[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
