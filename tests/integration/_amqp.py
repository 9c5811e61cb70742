"""What the integration tests over RabbitMQ share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.integration._clients import ClientTestCase
from tests.support import servers

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from tests.support.rabbitmq import RabbitMQ

__all__ = ["AMQPTestCase"]


class AMQPTestCase(ClientTestCase):
    """Tests that call the tasks of the shared worker through the shared RabbitMQ, which carries the replies too."""

    server: RabbitMQ

    def start_servers(self):
        self.server = servers.rabbitmq()
        self.broker, self.backend = self.server.url, "rpc://"
        servers.worker(self.broker, self.backend)

    def queues(self, server: RabbitMQ | None = None) -> Deferred[set[str]]:
        """List the names of all queues."""
        listing = self.in_thread((server or self.server).ctl, "list_queues", "name")
        return listing.addCallback(lambda text: set(text.split()))
