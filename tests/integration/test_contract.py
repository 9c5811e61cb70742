"""The contract of calls and results, over each broker and each source of results, in any mix."""

from __future__ import annotations

from tests.integration._clients import ClientTestCase
from tests.integration._places import OverAMQP, OverRedis, RedisOverAMQP
from tests.integration.contract import CallContract, KeptResultContract
from tests.support import servers
from tests.support.servers import Redis


class RPCOverAMQP(CallContract, OverAMQP):
    """RabbitMQ, and replies through it."""


class RedisAndRedis(CallContract, KeptResultContract, OverRedis):
    """One Redis for both."""


class RedisResultsOverAMQP(CallContract, KeptResultContract, RedisOverAMQP):
    """RabbitMQ, and results in Redis."""


class RPCOverRedis(CallContract, ClientTestCase):
    """Redis, and replies through lists of it."""

    def start_servers(self):
        self.broker, self.backend = servers.database("rpc over Redis"), "rpc://"
        servers.worker(self.broker, self.backend)


class TwoRedisServers(CallContract, KeptResultContract, ClientTestCase):
    """One Redis that carries messages, and another that keeps results."""

    other: list[Redis] = []  # noqa: RUF012  # one for all tests

    def start_servers(self):
        if not self.other:
            server = Redis(password="other's own")
            server.start()
            self.other.append(server)
        self.broker, self.backend = servers.database("results elsewhere"), self.other[0].url
        servers.worker(self.broker, self.backend)
