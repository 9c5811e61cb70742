"""The contract of calls and results, over each broker and each source of results, in any mix."""

from __future__ import annotations

from tests.integration._clients import ClientTestCase
from tests.integration._redis import database
from tests.integration.contract import CallContract, KeptResultContract
from tests.support import servers
from tests.support.servers import Redis


class RPCOverAMQP(CallContract, ClientTestCase):
    """RabbitMQ, and replies through it."""

    def start_servers(self):
        self.broker, self.backend = servers.rabbitmq().url, "rpc://"
        servers.worker(self.broker, self.backend)


class RedisAndRedis(CallContract, KeptResultContract, ClientTestCase):
    """One Redis for both."""

    def start_servers(self):
        self.broker = self.backend = database(servers.redis(), 0)
        servers.worker(self.broker, self.backend)


class RedisOverAMQP(CallContract, KeptResultContract, ClientTestCase):
    """RabbitMQ, and results in Redis."""

    vhost: list[str] = []  # noqa: RUF012  # one for all tests

    def start_servers(self):
        if not self.vhost:
            self.vhost.append(servers.rabbitmq().add_vhost("redis"))
        (self.broker,), self.backend = self.vhost, database(servers.redis(), 1)
        servers.worker(self.broker, self.backend)


class RPCOverRedis(CallContract, ClientTestCase):
    """Redis, and replies through lists of it."""

    def start_servers(self):
        self.broker, self.backend = database(servers.redis(), 2), "rpc://"
        servers.worker(self.broker, self.backend)


class TwoRedisServers(CallContract, KeptResultContract, ClientTestCase):
    """One Redis that carries messages, and another that keeps results."""

    other: list[Redis] = []  # noqa: RUF012  # one for all tests

    def start_servers(self):
        if not self.other:
            server = Redis(password="other's own")
            server.start()
            self.other.append(server)
        self.broker, self.backend = database(servers.redis(), 3), self.other[0].url
        servers.worker(self.broker, self.backend)
