"""Processes of a test run: started here, ended by the run itself, also when that is killed with -9.

Also what servers need: a directory of the run, free ports, certificates. Everything here blocks and may be called
from any thread.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "Certificates",
    "Process",
    "ServerFailed",
    "certificates",
    "directory",
    "end_all",
    "free_port",
    "logs",
    "wait_until",
]

_SUPERVISE = str(Path(__file__).with_name("supervise.py"))
_lock = threading.RLock()
_alive: set[Process] = set()
_used_ports: set[int] = set()
_names: dict[str, int] = {}


class ServerFailed(Exception):
    """A server did not start, or did not do in time what it was asked for; says so with the end of its log."""


class Process:
    """A command under the supervisor of ``supervise.py``; what it prints goes to the file ``log``."""

    def __init__(self, command: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path) -> None:
        self.log = log
        self._lock = threading.Lock()
        control, self._control = os.pipe()
        try:
            with log.open("ab") as output:
                self._popen = subprocess.Popen(
                    [sys.executable, "-I", "-S", _SUPERVISE, str(control), "run", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=dict(env),
                    cwd=cwd,
                    pass_fds=[control],
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._control)
            raise
        finally:
            os.close(control)
        with _lock:
            _alive.add(self)

    @property
    def exit_code(self) -> int | None:
        """What the command ended with, as a shell gives it; None while it runs."""
        with self._lock:
            return self._popen.poll()

    def pids(self) -> list[int]:
        """The command's process and all below it, without the supervisor."""
        found = [self._popen.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found.extend(map(int, children.read_text().split()))
        return found[1:]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command and everything below it; SIGSTOP makes a peer that has gone silent."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def terminate(self, timeout: float) -> None:
        """Ask the command to end, and kill what is left of it after ``timeout`` seconds."""
        with self._lock:
            if self._control >= 0:
                with contextlib.suppress(BrokenPipeError):
                    os.write(self._control, b"t")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._popen.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """Kill the command and everything that it started with SIGKILL; returns when all of it has gone."""
        with self._lock:
            if self._control >= 0:
                os.close(self._control)
                self._control = -1
            self._popen.wait(30)
        with _lock:
            _alive.discard(self)

    def tail(self, lines: int = 40) -> str:
        """The end of what the command has printed."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return str(error)


@cache
def _root() -> Path:
    """The directory of this test process, and a process that removes it if this one cannot."""
    root = Path(tempfile.mkdtemp(prefix="twistedcelery-"))
    root.chmod(0o755)
    control, mine = os.pipe()
    janitor = subprocess.Popen(
        [sys.executable, "-I", "-S", _SUPERVISE, str(control), "remove", str(root)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        pass_fds=[control],
        start_new_session=True,
    )
    os.close(control)

    def remove() -> None:
        end_all()
        shutil.rmtree(root, ignore_errors=True)
        os.close(mine)
        janitor.wait(30)

    atexit.register(remove)
    return root


def directory(name: str) -> Path:
    """Make a new directory that lives as long as this process."""
    with _lock:
        _names[name] = number = _names.get(name, 0) + 1
        path = _root() / f"{name}-{number}"
    path.mkdir()
    return path


def end_all() -> None:
    """Kill every process that was started here."""
    with _lock:
        alive = list(_alive)
    for process in alive:
        process.kill()


def logs() -> dict[str, str]:
    """The end of what each living process printed, by the name of its directory."""
    with _lock:
        return {process.log.parent.name: process.tail() for process in _alive}


def free_port() -> int:
    """A loopback port that nobody listens on, and that no call gets a second time.

    Below the range of outgoing connections: otherwise a client that keeps trying a port whose server is down can
    connect to itself, and the server cannot come back.
    """
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        port = random.randrange(10000, max(first_outgoing, 12000))
        with _lock, socket.socket() as probe:
            if port in _used_ports:
                continue
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                _used_ports.add(port)
                return port
    raise ServerFailed("no free port found")


def wait_until(
    condition: Callable[[], object], *, timeout: float, what: str, process: Process | None = None
) -> None:
    """Wait until the condition is true, which may raise OSError while it is not.

    Fails with `ServerFailed` after ``timeout`` seconds, and at once where the process has ended.
    """
    deadline = time.monotonic() + timeout
    while True:
        trouble: object = "not yet"
        try:
            if condition():
                return
        except OSError as error:
            trouble = repr(error)
        ended = process is not None and process.exit_code is not None
        if ended or time.monotonic() > deadline:
            how = f"ended with {process.exit_code}" if process and ended else f"{trouble} after {timeout} s"
            raise ServerFailed(f"{what}: {how}\n{process.tail() if process else ''}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, what it has signed for 127.0.0.1 and localhost, and an unrelated authority."""

    authority: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path
    #: A certificate of the same authority for another host name.
    misnamed: Path
    misnamed_key: Path
    #: An authority that has signed none of these.
    stranger: Path


@cache
def certificates() -> Certificates:
    """The certificates of this test process."""
    # The demo starts its servers with this module, and has no use for certificates.
    import trustme

    where = directory("certificates")
    where.chmod(0o755)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(where / "authority.pem"))
    trustme.CA().cert_pem.write_to_path(str(where / "stranger.pem"))
    for name, identities in {
        "server": ["localhost", "127.0.0.1"],
        "client": ["client@example.org"],
        "misnamed": ["elsewhere.example.org"],
    }.items():
        issued = authority.issue_cert(*identities, common_name=name)
        issued.private_key_pem.write_to_path(str(where / f"{name}.key"))
        for part in issued.cert_chain_pems:
            part.write_to_path(str(where / f"{name}.pem"), append=True)
    return Certificates(
        authority=where / "authority.pem",
        server=where / "server.pem",
        server_key=where / "server.key",
        client=where / "client.pem",
        client_key=where / "client.key",
        misnamed=where / "misnamed.pem",
        misnamed_key=where / "misnamed.key",
        stranger=where / "stranger.pem",
    )
