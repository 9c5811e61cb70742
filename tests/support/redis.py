"""Redis, and Redis Sentinel, for the tests."""

from __future__ import annotations

import contextlib
import os
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

from .processes import certificates, free_port, wait_until
from .server import Server, program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Redis", "Sentinel"]


class Redis(Server):
    """A Redis (or Valkey) server of its own, without persistence unless ``options`` say otherwise.

    Attributes:
        port: where it takes plain connections; ``tls_port`` the same over TLS, where ``tls`` is asked for.
        password: the default user's; ``options``: lines of ``redis.conf``; a list is one line for each item.
        socket: the path of its unix socket, which is always there.

    """

    port: int
    tls_port: int | None = None
    stop_timeout = 10.0

    def __init__(
        self,
        *,
        password: str | None = None,
        tls: bool = False,
        client_certificate: bool = False,
        options: Mapping[str, str | Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self.password = password
        self.tls = tls
        self.client_certificate = client_certificate
        self.options = options or {}
        self.socket = self.path / "redis.sock"
        self._databases = count(1)

    def _choose_ports(self) -> None:
        self.port = free_port()
        if self.tls:
            self.tls_port = free_port()

    @property
    def _login(self) -> str:
        return f":{quote(self.password, safe='')}@" if self.password else ""

    @property
    def url(self) -> str:
        """Database 0, as the default user."""
        return self.database_url(0)

    def database_url(self, number: int) -> str:
        """The same, of another database."""
        return f"redis://{self._login}127.0.0.1:{self.port}/{number}"

    def add_database(self) -> str:
        """Give the URL of a database that nobody was given before."""
        return self.database_url(next(self._databases))

    @property
    def socket_url(self) -> str:
        """Database 0 by the unix socket."""
        return f"redis+socket://{self._login}{self.socket}"

    @property
    def tls_url(self) -> str:
        """Database 0 over TLS, the server's certificate verified."""
        query = f"ssl_cert_reqs=required&ssl_ca_certs={certificates().authority}"
        return f"rediss://{self._login}localhost:{self.tls_port}/0?{query}"

    def _settings(self) -> dict[str, str | Sequence[str]]:
        settings: dict[str, str | Sequence[str]] = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "unixsocket": str(self.socket),
            "dir": str(self.path),
            "daemonize": "no",
            "databases": "64",
            "save": '""',
            "appendonly": "no",
        }
        if self.password:
            settings |= {"requirepass": f'"{self.password}"', "masterauth": f'"{self.password}"'}
        if self.tls_port:
            certs = certificates()
            settings |= {
                "tls-port": str(self.tls_port),
                "tls-ca-cert-file": str(certs.authority),
                "tls-cert-file": str(certs.server),
                "tls-key-file": str(certs.server_key),
                "tls-auth-clients": "yes" if self.client_certificate else "optional",
            }
        return settings | dict(self.options)

    def _write(self, settings: Mapping[str, str | Sequence[str]]) -> str:
        path = self.path / "redis.conf"
        lines = [
            f"{name} {value}"
            for name, values in settings.items()
            for value in ([values] if isinstance(values, str) else values)
        ]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def _command(self) -> tuple[list[str], dict[str, str]]:
        return [program("redis-server", "valkey-server"), self._write(self._settings())], dict(os.environ)

    def client(self, **options: Any) -> redis_py.Redis:
        """A blocking client of redis-py; close it, or use it as a context manager."""
        # redis-py's own retries would turn each refusal into seconds.
        defaults = {"password": self.password, "socket_timeout": 10, "retry": Retry(NoBackoff(), 0)}
        return redis_py.Redis(host="127.0.0.1", port=self.port, **{**defaults, **options})

    def command(self, *arguments: Any) -> Any:
        """Have one command answered, over a connection of its own; OSError where there is no answer.

        Such as when a failover makes a server drop its clients.
        """
        with self.client() as client:
            try:
                return client.execute_command(*arguments)
            except (redis_py.ConnectionError, redis_py.TimeoutError) as error:  # LOADING is one of these
                raise OSError(str(error)) from error

    def _is_ready(self) -> bool:
        return bool(self.command("PING"))


class _SentinelProcess(Redis):
    """One sentinel; it rewrites its own configuration, which is therefore written once."""

    def __init__(self, monitor: Mapping[str, str | Sequence[str]], password: str | None) -> None:
        super().__init__(password=password)
        self._monitor = monitor

    def _command(self) -> tuple[list[str], dict[str, str]]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.path),
            "daemonize": "no",
            **({"requirepass": f'"{self.password}"'} if self.password else {}),
            **self._monitor,
        }
        config = self.path / "redis.conf"
        if not config.exists() or f"port {self.port}" not in config.read_text():
            self._write(settings)
        return [program("redis-sentinel", "valkey-sentinel"), str(config)], dict(os.environ)


class Sentinel:
    """A master, a replica and the sentinels that watch them.

    Attributes:
        nodes: both Redis servers, the first master first; ``sentinels`` the sentinels.
        master_name: under which name they know the master.

    """

    master_name = "twisted-master"

    def __init__(
        self, *, sentinels: int = 3, password: str | None = None, sentinel_password: str | None = None
    ) -> None:
        self._count = sentinels
        self.password = password
        self.sentinel_password = sentinel_password
        self.nodes: list[Redis] = []
        self.sentinels: list[Redis] = []

    @property
    def url(self) -> str:
        """Celery's URL: every sentinel, the servers' password in each."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return ";".join(f"sentinel://{login}127.0.0.1:{one.port}/0" for one in self.sentinels)

    def start(self) -> None:
        """Start all; returns when every sentinel knows the replica and the other sentinels."""
        master = Redis(password=self.password)
        master.start()
        replica = Redis(
            password=self.password,
            options={"replicaof": f"127.0.0.1 {master.port}", "repl-diskless-sync-delay": "0"},
        )
        replica.start()
        self.nodes = [master, replica]
        wait_until(
            lambda: b"master_link_status:up" in _text(replica.command("INFO", "replication")),
            timeout=20,
            what="the replica does not follow",
        )
        name = self.master_name
        monitor: dict[str, str | Sequence[str]] = {
            "sentinel": [
                f"monitor {name} 127.0.0.1 {master.port} {self._count // 2 + 1}",
                *([f'auth-pass {name} "{self.password}"'] if self.password else []),
                *([f'sentinel-pass "{self.sentinel_password}"'] if self.sentinel_password else []),
                f"down-after-milliseconds {name} 1000",
                f"failover-timeout {name} 1000",
            ]
        }
        for _ in range(self._count):
            one = _SentinelProcess(monitor, self.sentinel_password)
            self.sentinels.append(one)
            one.start()
            with contextlib.suppress(redis_py.ResponseError):  # new in Redis 7, and not in Valkey's promise
                one.command("SENTINEL", "DEBUG", "INFO-PERIOD", 500, "PUBLISH-PERIOD", 200)
        wait_until(self._all_known, timeout=30, what="the sentinels do not find each other")

    def _ask(self, sentinel: Redis, question: str) -> Any:
        """Such a name, with its space, has redis-py parse the answer."""
        return sentinel.command(f"SENTINEL {question}", self.master_name)

    def _all_known(self) -> bool:
        for one in self.sentinels:
            state = self._ask(one, "MASTER")
            if state["num-slaves"] != 1 or state["num-other-sentinels"] != self._count - 1:
                return False
            if any(slave["master-link-status"] != "ok" for slave in self._ask(one, "SLAVES")):
                return False
        return True

    def _port(self) -> int:
        """The port on which every running sentinel sees the master, or 0 where they differ."""
        running = [one for one in self.sentinels if one.running]
        ports = {self._ask(one, "GET-MASTER-ADDR-BY-NAME")[1] for one in running}
        return ports.pop() if len(ports) == 1 else 0

    @property
    def master(self) -> Redis:
        """The server that the sentinels name."""
        port = self._port()
        return next(node for node in self.nodes if node.port == port)

    def failover(self) -> None:
        """Have the sentinels make the replica master; returns when all agree and it says so itself."""
        old = self.master
        self._ask(self.sentinels[0], "FAILOVER")
        self.wait_for_master_after(old)

    def wait_for_master_after(self, old: Redis, timeout: float = 30.0) -> None:
        """Wait until another server than ``old`` is master, after `kill` of it for example."""

        def changed() -> bool:
            port = self._port()
            new = next((node for node in self.nodes if node.port == port), None)
            return new is not None and new is not old and new.command("ROLE")[0] == b"master"

        wait_until(changed, timeout=timeout, what="no failover")

    def stop(self) -> None:
        """End all."""
        for one in [*self.sentinels, *self.nodes]:
            one.kill()


def _text(value: Any) -> bytes:
    """What INFO said, which some versions of redis-py parse."""
    if isinstance(value, dict):
        return "\n".join(f"{key}:{item}" for key, item in value.items()).encode()
    return bytes(value)
