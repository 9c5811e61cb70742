"""Getting to Redis: TLS, unix sockets, users, databases, Sentinel; and what is said where it cannot be."""

from __future__ import annotations

import ssl
from typing import Any

import redis

from tests.integration._clients import outcomes, patient
from tests.integration._redis import RedisTestCase
from tests.support import servers
from tests.support.processes import certificates
from tests.support.servers import wait_for_file
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    NotSent,
    Refused,
    ResultLost,
    TLSFailed,
    VirtualHostNotFound,
)


class Provider(redis.CredentialProvider):
    """Gives the credentials of the ACL tests."""

    def get_credentials(self):
        return ("caller", "callers")


class Ways(RedisTestCase):
    """Each way to the shared server, whose worker goes the plain one."""

    async def check(self, app):
        """Have a call made."""
        tx = self.client(app)
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)).get(timeout=30), 3)

    async def test_tls_by_url(self):
        """``rediss://`` with parameters verifies the server."""
        await self.check(self.app(self.server.tls_url, self.server.tls_url))

    async def test_tls_by_settings(self):
        """``broker_use_ssl`` and ``redis_backend_use_ssl`` with plain and TLS URLs."""
        settings = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": str(certificates().authority)}
        for scheme in ("redis", "rediss"):
            url = f"{scheme}://localhost:{self.server.tls_port}/0"
            await self.check(self.app(url, url, broker_use_ssl=settings, redis_backend_use_ssl=settings))

    async def test_tls_unverified(self):
        """A certificate that nobody vouches for is refused, unless the settings say otherwise."""
        url = f"rediss://localhost:{self.server.tls_port}/0"
        tx = self.client(self.app(url))
        calling = tx.send_task("tests.add", args=(1, 2), ignore_result=True)
        error = await self.failure_of(calling, NotSent)
        self.assertIsInstance(error.__cause__, TLSFailed)
        settings = {"ssl_cert_reqs": ssl.CERT_NONE}
        await self.check(self.app(url, broker_use_ssl=settings))

    async def test_unix_socket(self):
        """``redis+socket://``, for both."""
        url = self.server.socket_url
        await self.check(self.app(f"{url}?virtual_host=0", f"{url}?virtual_host=0"))

    async def test_database(self):
        """A database that there is not is an error of its own, at once."""
        url = self.server.database_url(99)
        tx = self.client(self.app(url), outage_wait=30)
        error = await self.failure_of(tx.send_task("tests.add", ignore_result=True), NotSent)
        self.assertIsInstance(error.__cause__, VirtualHostNotFound)
        tx = self.client(self.app(None, url))
        await self.failure_of(tx.AsyncResult("x").state(), VirtualHostNotFound)
        error = await self.failure_of(tx.AsyncResult("x").get(), ResultLost)
        self.assertIn("DB index", str(error))

    async def test_nobody_there(self):
        """With nobody listening calls fail by the retry policy, in the words of the system."""
        url = "redis://127.0.0.1:1/0"
        tx = self.client(self.app(url, url))
        error = await self.failure_of(tx.send_task("tests.add"), NotSent)
        self.assertIn("refused", str(error))
        self.assertNotIsInstance(error, AuthenticationFailed)
        await self.failure_of(tx.AsyncResult("x").state(), ConnectionFailed)


class Users(RedisTestCase):
    """Passwords, users and what they may do."""

    def start_servers(self):
        self.server = servers.Redis(
            password="secret",
            options={
                "user": [
                    "caller on >callers ~* &* +@all -@dangerous +info",
                    "quiet on >quiets ~* resetchannels +@all",
                    "reader on >readers ~nothing* &* +@all",
                ]
            },
        )
        self.server.start()
        self.broker = self.backend = self.server.url
        self.worker = servers.Worker(self.broker, self.backend)
        self.worker.start()

    def tearDown(self):
        super().tearDown()

        def stop():
            self.worker.kill()
            self.server.kill()

        return self.in_thread(stop)

    def url(self, user, password):
        return f"redis://{user}:{password}@127.0.0.1:{self.server.port}/0"

    async def test_users(self):
        """A password, a user, and a credential provider each log in; what is wrong is said, and not tried for ever."""
        for app in (
            self.app(),
            self.app(self.url("caller", "callers"), self.url("caller", "callers")),
            self.app(
                f"redis://127.0.0.1:{self.server.port}/0?credential_provider={__name__}.Provider",
                f"redis://127.0.0.1:{self.server.port}/0?credential_provider={__name__}.Provider",
            ),
        ):
            tx = self.client(app)
            self.assertEqual(await tx.send_task("tests.add", args=(1, 2)).get(timeout=30), 3)
            await tx.stopService()
        wrong = self.url("caller", "wrong")
        tx = self.client(self.app(wrong), outage_wait=30)
        error = await self.failure_of(tx.send_task("tests.add"), NotSent)
        self.assertIsInstance(error.__cause__, AuthenticationFailed)
        self.assertNotIn("wrong@", str(error))
        await tx.stopService()
        tx = self.client(self.app(None, wrong))
        error = await self.failure_of(tx.send_task("tests.add", args=(1, 2)), ResultLost)
        self.assertIn("WRONGPASS", str(error))

    async def test_without_subscriptions(self):
        """A user who may not subscribe gets results all the same, by reading."""
        tx = self.client(self.app(None, self.url("quiet", "quiets")))
        callings = [tx.send_task("tests.add", args=(1, number)) for number in range(20)]
        self.assertEqual(await outcomes(callings), [1 + number for number in range(20)])
        self.assertEqual(await tx.send_task("tests.sleep", args=(0.5,)), 0.5)

    async def test_without_keys(self):
        """A user who may not touch the queue or the result is told so by the server's own words."""
        tx = self.client(self.app(self.url("reader", "readers")))
        error = await self.failure_of(tx.send_task("tests.add", args=(1, 2)), Refused)
        self.assertIn("NOPERM", str(error))
        tx = self.client(self.app(None, self.url("reader", "readers")))
        error = await self.failure_of(tx.send_task("tests.add", args=(1, 2)), Refused)
        self.assertIn("NOPERM", str(error))


class Failover(RedisTestCase):
    """Sentinel."""

    def start_servers(self):
        """Each test has its own."""

    async def test_failover(self):
        """With calls in flight the master is killed: each call ends, the confirmed ones run at the new master."""
        sentinel = servers.Sentinel(password="secret")
        await self.in_thread(sentinel.start)
        self.addCleanup(self.in_thread, sentinel.stop)
        options = {"master_name": sentinel.master_name, "socket_timeout": 2}
        settings: dict[str, Any] = {
            "broker_transport_options": options,
            "result_backend_transport_options": options,
        }
        self.broker = self.backend = sentinel.url
        worker = await self.own_worker(settings=settings)
        path = self.temporary()
        tx = self.client(patient(self.app(**settings)), outage_wait=30)
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        first = sentinel.nodes[0]
        callings = [tx.send_task("tests.record", args=(str(path), number)) for number in range(200)]
        waiting = outcomes([calling.get(timeout=30) for calling in callings])
        await callings[100].when_sent()
        await self.in_thread(first.kill)
        # Stock workers do not always survive it.
        await self.in_thread(worker.kill)
        late = [tx.send_task("tests.record", args=(str(path), number)) for number in range(200, 250)]
        await self.in_thread(sentinel.wait_for_master_after, first)
        await self.own_worker(settings=settings)
        self.assertEqual(await outcomes(calling.get(timeout=30) for calling in late), list(range(200, 250)))
        lines = await self.in_thread(wait_for_file, path, 250, 1.0)
        self.assertLessEqual(set(range(200, 250)), set(map(int, lines)))
        # Of the others, those that had reached the old master alone may be lost with it.
        for calling in callings:
            calling.cancel()
            calling.addErrback(lambda _: None)
        waiting.cancel()
        waiting.addErrback(lambda _: None)
