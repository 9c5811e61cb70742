"""What the app's broker settings say about servers, and the order in which they are tried."""

from __future__ import annotations

import ssl
from itertools import cycle, islice
from typing import Any

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from kombu.utils.functional import shufflecycle
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._urls import Server, failover, servers


def listed(url: Any, **conf: Any) -> list[Server]:
    """The servers of an app with these settings."""
    app = Celery(broker=url, set_as_current=False)
    app.conf.update(conf)
    connection = app.connection_for_write()
    found = servers(connection)
    assert connection._transport is None, "a transport was made"
    return found


def only(url: Any, **conf: Any) -> Server:
    (server,) = listed(url, **conf)
    return server


class ServersTests(SynchronousTestCase):
    def test_amqp_defaults(self) -> None:
        """A bare amqp:// has py-amqp's defaults, 127.0.0.1 for localhost included."""
        server = only("amqp://")
        self.assertEqual(
            (server.transport, server.host, server.port, server.userid, server.password, server.virtual_host),
            ("amqp", "127.0.0.1", 5672, "guest", "guest", "/"),
        )
        self.assertEqual(server.name, "localhost")
        self.assertEqual(server.connect_timeout, 4.0)
        self.assertIs(server.ssl, False)
        self.assertIsNone(server.heartbeat)
        self.assertIsNone(server.login_method)

    def test_amqp_url(self) -> None:
        """Every part of a URL is read as kombu reads it, its parameters included."""
        server = only(
            "pyamqp://m%40e:p%2Fw@broker.test:1234/v%2Fh?heartbeat=3.5&connect_timeout=9&login_method=EXTERNAL"
        )
        self.assertEqual(
            (server.transport, server.host, server.port, server.userid, server.password, server.virtual_host),
            ("amqp", "broker.test", 1234, "m@e", "p/w", "v/h"),
        )
        self.assertEqual(
            (server.heartbeat, server.connect_timeout, server.login_method), (3.5, 9.0, "EXTERNAL")
        )
        self.assertEqual(server.url, "amqp://m%40e@broker.test:1234/v/h")

    def test_password_is_hidden(self) -> None:
        """Neither the URL for messages nor the repr holds the password."""
        server = only("amqp://me:s3cret@h//")
        self.assertNotIn("s3cret", server.url + repr(server))

    def test_settings(self) -> None:
        """broker_* settings fill in what the URL leaves out; a callable password is kept as it is."""
        ask = lambda: "x"  # noqa: E731
        server = only(
            "h1", broker_user="me", broker_password=ask, broker_vhost="v", broker_port=99, broker_login_method="AMQPLAIN",
            broker_connection_timeout=None, broker_transport_options={"confirm_publish": True},
        )  # fmt: skip
        self.assertEqual(
            (server.host, server.port, server.userid, server.virtual_host), ("h1", 99, "me", "v")
        )
        self.assertIs(server.password, ask)
        self.assertEqual(server.login_method, "AMQPLAIN")
        self.assertIsNone(server.connect_timeout)
        self.assertEqual(server.transport_options, {"confirm_publish": True})

    def test_amqp_transport_options(self) -> None:
        """For AMQP the transport options win, as they are py-amqp's own arguments."""
        options = {"host": "other:77", "userid": "u", "password": "p", "virtual_host": "w", "heartbeat": 4}
        server = only("amqp://a:b@h/v", broker_transport_options=options)
        self.assertEqual((server.host, server.port, server.userid, server.password), ("other", 77, "u", "p"))
        self.assertEqual((server.virtual_host, server.heartbeat), ("w", 4.0))

    def test_tls(self) -> None:
        """TLS comes from the scheme, from broker_use_ssl, or from the URL's parameters."""
        self.assertEqual((only("amqps://h").port, only("amqps://h").ssl), (5671, True))
        self.assertEqual(only("amqp://h", broker_use_ssl=True).url, "amqps://guest@h:5671//")
        settings = {"ca_certs": "/ca.pem"}
        self.assertEqual(only("amqp://h", broker_use_ssl=settings).ssl, settings)
        self.assertEqual(only("amqps://h?ssl_ca_certs=/ca.pem").ssl, {"ssl_ca_certs": "/ca.pem"})
        self.assertIs(only("amqp://h?ssl=false").ssl, False)
        self.assertIs(only("amqp://h?ssl=true").ssl, True)

    def test_rediss_is_verified(self) -> None:
        """A rediss:// URL without settings is verified, unlike kombu's fallback; with settings those count."""
        self.assertIs(only("rediss://h").ssl, True)
        self.assertEqual(only("rediss://h?ssl_cert_reqs=none").ssl, {"ssl_cert_reqs": ssl.CERT_NONE})
        self.assertEqual(
            only("redis://h", broker_use_ssl={"ssl_cert_reqs": "required"}).url, "rediss://h:6379//"
        )

    def test_redis(self) -> None:
        """Redis has its own default port, no default user, and the database in place of the virtual host."""
        server = only("redis://:pw@/3")
        self.assertEqual(
            (server.transport, server.host, server.port, server.userid, server.password, server.virtual_host),
            ("redis", "127.0.0.1", 6379, None, "pw", "3"),
        )
        self.assertEqual(server.url, "redis://127.0.0.1:6379/3")

    def test_unix_socket(self) -> None:
        """redis+socket:// has a path, and its database in the query."""
        server = only("redis+socket://u:p@/run/r.sock?virtual_host=2")
        self.assertEqual(
            (server.transport, server.path, server.host, server.port), ("redis", "/run/r.sock", "", 0)
        )
        self.assertEqual((server.userid, server.password, server.virtual_host), ("u", "p", "2"))
        self.assertEqual(server.url, "redis+socket://u@/run/r.sock")
        self.assertEqual(only("redis+socket:///run/r.sock").virtual_host, "/")

    def test_ipv6(self) -> None:
        """An IPv6 address is bracketed in the URL."""
        server = only("amqp://[::1]:5/")
        self.assertEqual((server.host, server.url), ("::1", "amqp://guest@[::1]:5//"))

    def test_host_and_port(self) -> None:
        """A plain host name may have a port behind it."""
        self.assertEqual((only("h:7").host, only("h:7").port), ("h", 7))

    def test_other_transports(self) -> None:
        """What is neither AMQP nor Redis is listed too, without a port; a transport class goes by its type."""
        from kombu.transport.memory import Transport

        self.assertEqual(only("memory://").url, "memory:////")
        self.assertEqual(only("h", broker_transport=Transport).transport, "memory")

    def test_alternates(self) -> None:
        """The whole list is read, in order; what a URL leaves out is inherited as kombu's switch inherits it."""
        found = listed("amqp://a:b@h1:1/v;pyamqp://h2; amqp://c:d@h3:3//")
        self.assertEqual(
            [server.url for server in found], ["amqp://a@h1:1/v", "amqp://guest@h2:1/v", "amqp://c@h3:3//"]
        )
        self.assertEqual([server.password for server in found], ["b", "guest", "d"])
        self.assertEqual([server.source for server in found][1], "pyamqp://h2")
        found = listed(["amqp://h1", "h2", "amqps://h3"])
        self.assertEqual([server.host for server in found], ["h1", "h2", "h3"])
        self.assertEqual([bool(server.ssl) for server in found], [False, False, True])
        found = listed(["amqp://h1;amqp://h2", "amqp://h3"])
        self.assertEqual([server.host for server in found], ["h1", "h2", "h3"])

    def test_alternates_like_kombu(self) -> None:
        """The list equals what a kombu connection becomes when it switches down its alternates."""
        url = "amqp://a:b@h1:1/v;pyamqp://h2;amqp://c:d@h3:3//;amqps://h4/w?heartbeat=7;amqp://:x@h5:9"
        app = Celery(broker=url, set_as_current=False)
        connection = app.connection_for_write()
        for server in servers(connection):
            info = connection.info()
            self.assertEqual(
                (
                    server.host,
                    server.port,
                    server.userid,
                    server.password,
                    server.virtual_host,
                    server.heartbeat,
                ),
                tuple(
                    info[key]
                    for key in ("hostname", "port", "userid", "password", "virtual_host", "heartbeat")
                ),
            )
            connection.maybe_switch_next()

    def test_sentinels(self) -> None:
        """Sentinels inherit nothing from each other; their port is 26379."""
        self.assertEqual([server.port for server in listed("sentinel://a:1;sentinel://b")], [1, 26379])

    def test_unix_alternate(self) -> None:
        """A UNIX socket may be an alternate."""
        self.assertEqual([s.path for s in listed("redis://h;redis+socket:///r.sock")], [None, "/r.sock"])

    def test_refused(self) -> None:
        """A parameter that kombu does not know, or a malformed value, is named, and no password is told."""
        for url, what in (
            ("amqp://h;amqp://u:s3cret@h2?foo=1", "amqp://u:**@h2/: unknown parameter 'foo'"),
            ("amqp://h;amqp://u:s3cret@h2:port", "broker_url: amqp://... cannot be read"),
            ("amqp://h?connect_timeout=soon", "broker URL h: could not convert string to float: 'soon'"),
            ("amqp://h;amqp://h2?heartbeat=often", "broker URL amqp://h2/: could not convert"),
        ):
            error = self.assertRaises(ImproperlyConfigured, listed, url)
            self.assertIn(what, str(error))
            self.assertNotIn("s3cret", str(error))


class FailoverTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.servers = [Server(transport="amqp", host=name, source=f"amqp://{name}") for name in "abcd"]

    def order(self, strategy: Any, count: int, *, of: int = 4) -> str:
        return "".join(server.host for server in islice(failover(self.servers[:of], strategy), count))

    def test_round_robin(self) -> None:
        """One after the other, without end, the first one first."""
        for strategy in (None, "round-robin", cycle):
            self.assertEqual(self.order(strategy, 9), "abcdabcda")

    def test_one_server(self) -> None:
        """A single server comes for ever, whatever the strategy."""
        self.assertEqual(self.order("shuffle", 3, of=1), "aaa")

    def test_shuffle(self) -> None:
        """The first one first; every round holds each server once; the order changes."""
        for strategy in ("shuffle", shufflecycle):
            order = self.order(strategy, 400)
            self.assertEqual(order[0], "a")
            rounds = [order[i : i + 4] for i in range(0, 400, 4)]
            self.assertEqual({"".join(sorted(one)) for one in rounds}, {"abcd"})
            self.assertGreater(len(set(rounds)), 5)

    def test_callable(self) -> None:
        """A callable is given the URLs as they are configured, and its first item is left out."""
        given: list[Any] = []

        def backwards(urls: list[str]):
            given.append(urls)
            return cycle(reversed(urls))

        self.assertEqual(self.order(backwards, 6), "acbadc")
        self.assertEqual(given, [["amqp://a", "amqp://b", "amqp://c", "amqp://d"]])

    def test_callable_that_ends(self) -> None:
        """An iterator that ends is asked for anew."""
        self.assertEqual(self.order(iter, 9), "abcdabcda")

    def test_bad_strategies(self) -> None:
        """An unknown name is refused at once; unknown URLs and none at all when they come."""
        error = self.assertRaises(ImproperlyConfigured, failover, self.servers, "fastest")
        self.assertIn("'fastest'", str(error))
        error = self.assertRaises(ImproperlyConfigured, self.order, lambda _: iter(()), 2)
        self.assertIn("no URL", str(error))
        error = self.assertRaises(ImproperlyConfigured, self.order, lambda _: cycle(["amqp://u:s3cret@x"]), 2)
        self.assertIn("amqp://u:**@x", str(error))
        error = self.assertRaises(
            ImproperlyConfigured, self.order, lambda _: cycle(["amqp://a", "amqp://u:s3cret/@x"]), 2
        )
        self.assertIn("gave amqp://..., which", str(error))
