"""A RabbitMQ node for the tests."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import amqp

from .processes import ServerFailed, certificates, free_port, wait_until
from .server import Server, program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["RabbitMQ"]


class RabbitMQ(Server):
    """A RabbitMQ node of its own, with its own epmd.

    Attributes:
        port: where it takes AMQP; ``tls_port`` the same over TLS, where ``tls`` is asked for.
        client_certificate: whether TLS clients have to show a certificate.
        settings: lines of ``rabbitmq.conf``, by name; they replace ours.

    """

    port: int
    tls_port: int | None = None

    def __init__(
        self,
        *,
        tls: bool = False,
        client_certificate: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.tls = tls
        self.client_certificate = client_certificate
        self.settings = settings or {}

    def _choose_ports(self) -> None:
        self.port, self._distribution_port, self._epmd_port = free_port(), free_port(), free_port()
        if self.tls:
            self.tls_port = free_port()

    @property
    def url(self) -> str:
        """The default virtual host, as guest."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    @property
    def tls_url(self) -> str:
        """The default virtual host over TLS."""
        return f"amqps://guest:guest@localhost:{self.tls_port}//"

    def _environment(self) -> dict[str, str]:
        # Not the process's environment: a RABBITMQ_* variable of the caller's would change another node.
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        cookie = "-setcookie twistedcelery"
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            **kept,
            "HOME": str(self.path),
            "RABBITMQ_NODENAME": f"test-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.path / "data"),
            "RABBITMQ_LOG_BASE": str(self.path / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.path / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.path / "plugins"),
            # Few schedulers that do not spin: the machine belongs to the tests too.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none "
            f"{cookie} -kernel inet_dist_use_interface {{127,0,0,1}}",
            "RABBITMQ_CTL_ERL_ARGS": cookie,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP_BYTES": "0",
        }

    @staticmethod
    def _script(name: str) -> str:
        # Debian's wrappers in /usr/sbin switch to the user rabbitmq, who cannot read our directory.
        path = Path("/usr/lib/rabbitmq/bin", name)
        return str(path) if path.exists() else program(name)

    def _command(self) -> tuple[list[str], dict[str, str]]:
        settings = {
            "loopback_users.guest": "true",
            "disk_free_limit.absolute": "1MB",
            "vm_memory_high_watermark.relative": "0.4",
        }
        if self.tls_port:
            certs = certificates()
            settings |= {
                "listeners.ssl.1": f"127.0.0.1:{self.tls_port}",
                "ssl_options.cacertfile": str(certs.authority),
                "ssl_options.certfile": str(certs.server),
                "ssl_options.keyfile": str(certs.server_key),
                "ssl_options.verify": "verify_peer",
                "ssl_options.fail_if_no_peer_cert": str(self.client_certificate).lower(),
            }
        settings |= self.settings
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        (self.path / "rabbitmq.conf").write_text(lines)
        (self.path / "plugins").write_text("[].\n")
        return [self._script("rabbitmq-server")], self._environment()

    def _is_ready(self) -> bool:
        try:
            connection = amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=5, read_timeout=5)
            connection.connect()
            connection.close()
        except amqp.exceptions.AMQPError as error:  # it still starts: the virtual host is not up, for example
            raise OSError(str(error)) from error
        return True

    def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run ``rabbitmqctl``; returns what it printed, and fails with `ServerFailed` where it does."""
        deadline = time.monotonic() + timeout
        while True:
            done = subprocess.run(
                [self._script("rabbitmqctl"), "--quiet", *arguments],
                env=self._environment(),
                cwd=self.path,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
            if not done.returncode:
                return done.stdout
            printed = done.stdout + done.stderr
            # A server that takes connections may still be starting.
            if "'rabbit' app to be running" not in printed or time.monotonic() > deadline:
                raise ServerFailed(f"rabbitmqctl {' '.join(arguments)}: {printed}")

    def delete_queue(self, name: str) -> None:
        """Delete a queue at once, which ``ctl`` takes seconds for."""
        connection = amqp.Connection(f"127.0.0.1:{self.port}")
        connection.connect()
        connection.channel().queue_delete(name)
        connection.close()

    def set_memory_alarm(self, on: bool) -> None:
        """Raise the memory alarm, under which publishing connections are blocked, or end it."""
        self.ctl("set_vm_memory_high_watermark", "0" if on else "0.4")
        wait_until(
            lambda: ("memory" in self.ctl("eval", "rabbit_alarm:get_alarms().")) == on,
            timeout=20,
            what="the memory alarm does not change",
        )

    def add_vhost(self, name: str) -> str:
        """Make a virtual host that guest may use; returns its URL."""
        self.ctl("add_vhost", name)
        self.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{quote(name, safe='')}"

    def add_user(self, name: str, password: str, *, vhosts: Sequence[str] = ("/",)) -> None:
        """Make a user who may do everything in these virtual hosts."""
        self.ctl("add_user", name, password)
        for vhost in vhosts:
            self.ctl("set_permissions", "-p", vhost, name, ".*", ".*", ".*")
