"""What all servers of the tests share: one supervised process with a directory and ports of its own."""

from __future__ import annotations

import os
import shutil
import signal
import threading

from .processes import Process, ServerFailed, directory, wait_until

__all__ = ["Server", "program"]


class Server:
    """What all of them share: one supervised process, begun again on the same ports and directory."""

    #: Seconds that a start and an orderly stop may take.
    start_timeout = 60.0
    stop_timeout = 20.0

    def __init__(self) -> None:
        self.path = directory(type(self).__name__.lower())
        self._process: Process | None = None
        self._lock = threading.RLock()

    def _choose_ports(self) -> None:
        """Choose the ports; comes again where a start failed, as another program may have taken one."""

    def _command(self) -> tuple[list[str], dict[str, str]]:
        """Write the configuration; returns the command and its environment."""
        raise NotImplementedError

    def _is_ready(self) -> bool:
        """Whether the server serves; OSError means no."""
        raise NotImplementedError

    @property
    def process(self) -> Process:
        """The process that was started last."""
        if self._process is None:
            raise ServerFailed("never started")
        return self._process

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.exit_code is None

    @property
    def log(self) -> str:
        """The end of what the server has printed."""
        return self.process.tail()

    def start(self, *, attempts: int = 3) -> None:
        """Start on free ports and wait until the server serves."""
        with self._lock:
            while True:
                self._choose_ports()
                try:
                    self._begin()
                    return
                except ServerFailed:
                    attempts -= 1
                    if not attempts:
                        raise

    def _begin(self) -> None:
        command, env = self._command()
        self._process = process = Process(command, log=self.path / "output.log", env=env, cwd=self.path)
        try:
            what = f"{type(self).__name__} does not start"
            wait_until(self._is_ready, timeout=self.start_timeout, what=what, process=process)
        except BaseException:
            process.kill()
            raise

    def stop(self) -> None:
        """Ask the server to end, and wait until it has."""
        with self._lock:
            if self._process:
                self._process.terminate(self.stop_timeout)

    def kill(self) -> None:
        """Kill the server with SIGKILL; returns when nothing of it runs."""
        with self._lock:
            if self._process:
                self._process.kill()

    def restart(self) -> None:
        """Stop the server where it runs, and start it again on the same ports and with the same data."""
        with self._lock:
            self.stop()
            self._begin()

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): its sockets stay open and say nothing. `resume` before `stop`."""
        self.process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on."""
        self.process.signal(signal.SIGCONT)


def program(*names: str) -> str:
    """The first of these programs that is installed."""
    for name in names:
        found = shutil.which(
            name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"])
        )
        if found:
            return found
    raise ServerFailed(f"none of these is installed: {', '.join(names)}; `make test` says what to install")
