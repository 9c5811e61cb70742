"""What the integration tests over Redis share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import redis as redis_py

from tests.integration._clients import ClientTestCase
from tests.support import servers
from tests.support.servers import Redis

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["RedisTestCase", "contents"]


def contents(url: str) -> dict[bytes, Any]:
    """Read everything that a database holds: lists, sets, sorted sets and strings."""
    with redis_py.Redis.from_url(url) as client:
        readers = {
            b"list": lambda key: client.lrange(key, 0, -1),
            b"set": client.smembers,
            b"hash": client.hgetall,
            b"zset": lambda key: client.zrange(key, 0, -1),
            b"string": client.get,
        }
        keys: Iterable[bytes] = client.scan_iter()
        return {key: readers[client.type(key)](key) for key in keys}


class RedisTestCase(ClientTestCase):
    """Tests that call the tasks of the shared worker through the shared Redis, which keeps the results too."""

    server: Redis

    def start_servers(self):
        self.server = servers.redis()
        self.broker = self.backend = self.server.url
        servers.worker(self.broker, self.backend)

    async def own_server(self, worker: bool = True, **options: Any) -> Redis:
        """Start a server of the test's own, and a worker; what the test does to them hurts nobody."""
        server = Redis(**options)
        await self.in_thread(server.start)
        self.addCleanup(self.in_thread, server.kill)
        self.server = server
        self.broker = self.backend = server.url
        if worker:
            await self.own_worker()
        return server

    async def own_worker(
        self, broker: str | None = None, backend: str | None = None, **options: Any
    ) -> servers.Worker:
        """Start a worker of the test's own."""
        options.setdefault("settings", {"broker_transport_options": {"socket_timeout": 5}})
        worker = servers.Worker(broker or self.broker, backend or self.backend, **options)
        await self.in_thread(worker.start)
        self.addCleanup(self.in_thread, worker.kill)
        return worker
