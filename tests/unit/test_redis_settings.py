"""Celery's and kombu's Redis settings, read as connection configs."""

from __future__ import annotations

import ssl
import warnings
from unittest import skipIf

import celery
import redis
from celery.exceptions import ImproperlyConfigured
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery.redis.connection import PING_INTERVAL, SILENCE_TIMEOUT
from twistedcelery.redis.settings import backend_servers, broker_layout, broker_servers


class Provider(redis.CredentialProvider):
    def get_credentials(self):
        return ("me", "token")


def app(broker="memory://", backend=None, **conf):
    made = celery.Celery("proj", broker=broker, backend=backend, set_as_current=False)
    made.conf.update(conf)
    return made


def broker(url, **conf):
    return broker_servers(app(url, **conf).connection_for_write())


def backend(url, **conf):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return backend_servers(app(backend=url, **conf).backend)


class BrokerTests(SynchronousTestCase):
    def test_plain(self):
        """A URL gives host, port, database and login; the password is in no message."""
        (server,) = broker("redis://me:secret@10.0.0.1:7000/3")
        self.assertEqual(
            (server.server.host, server.server.port, server.server.ssl), ("10.0.0.1", 7000, False)
        )
        self.assertEqual((server.config.db, server.username, server.password), (3, "me", "secret"))
        self.assertNotIn("secret", repr(server) + server.url)
        self.assertEqual(server.url, "redis://me@10.0.0.1:7000/3")
        self.assertEqual(server.config.silence_timeout, SILENCE_TIMEOUT)
        self.assertEqual(server.config.ping_interval, 25)

    def test_options(self):
        """The options of ``broker_transport_options`` that concern a connection are honoured."""
        (server,) = broker(
            "redis://10.0.0.1",
            broker_transport_options={
                "socket_timeout": 7, "socket_connect_timeout": 3, "socket_keepalive": True, "client_name": "web",
                "socket_keepalive_options": {4: 5}, "health_check_interval": 0, "retry_on_timeout": True,
                "visibility_timeout": 100,
            },
        )  # fmt: skip
        config = server.config
        self.assertEqual((config.silence_timeout, config.ping_interval, config.client_name), (7, 0, "web"))
        self.assertEqual((config.keepalive, config.keepalive_options), (True, {4: 5}))
        self.assertEqual(server.server.connect_timeout, 3)

    def test_several(self):
        """Every server of the list is read."""
        found = broker("redis://a:1/1;redis://b:2/2")
        self.assertEqual([(each.server.host, each.config.db) for each in found], [("a", 1), ("b", 2)])

    def test_tls(self):
        """``rediss://`` is verified unless a setting says otherwise; ``broker_use_ssl`` works with ``redis://`` too."""
        (server,) = broker("rediss://10.0.0.1")
        self.assertIs(server.server.ssl, True)
        settings = {"ssl_cert_reqs": ssl.CERT_NONE}
        (server,) = broker("redis://10.0.0.1", broker_use_ssl=settings)
        self.assertEqual(server.server.ssl, settings)
        (server,) = broker("rediss://10.0.0.1?ssl_cert_reqs=none")
        self.assertEqual(server.server.ssl, {"ssl_cert_reqs": ssl.CERT_NONE})

    def test_unix_socket(self):
        """``redis+socket://`` gives a path, and keepalive means nothing there."""
        (server,) = broker(
            "redis+socket:///var/run/redis.sock?virtual_host=2",
            broker_transport_options={"socket_keepalive": True},
        )
        self.assertEqual((server.server.path, server.config.db), ("/var/run/redis.sock", 2))
        self.assertFalse(server.config.keepalive)
        (server,) = broker("redis+socket:///var/run/redis.sock?client_name=web&socket_timeout=3")
        self.assertEqual((server.config.client_name, server.config.silence_timeout), ("web", 3.0))

    def test_bad_values(self):
        """What makes no sense is refused by name."""
        for url, options, text in (
            ("redis://10.0.0.1/x", {}, "'x'"),
            ("redis://10.0.0.1", {"client_name": "two words"}, "client_name"),
            ("redis://10.0.0.1", {"socket_timeout": -1}, "socket_timeout=-1"),
            ("redis://10.0.0.1", {"health_check_interval": "often"}, "health_check_interval='often'"),
            ("redis://10.0.0.1", {"socket_keepalive_options": {"idle": 5}}, "socket_keepalive_options"),
            ("redis+socket:///r.sock?nonsense=1", {}, "nonsense"),
        ):
            error = self.assertRaises(ImproperlyConfigured, broker, url, broker_transport_options=options)
            self.assertIn(text, str(error))

    @skipIf(celery.VERSION < (5, 7), "kombu takes none")
    def test_credential_provider(self):
        """A credential provider, by name, is made once; a class that is none is refused."""
        (server,) = broker(f"redis://10.0.0.1?credential_provider={__name__}.Provider")
        self.assertEqual(server.credential_provider.get_credentials(), ("me", "token"))
        none = "redis://10.0.0.1?credential_provider=builtins.object"
        error = self.assertRaises(ImproperlyConfigured, broker, none)
        self.assertIn("credential_provider", str(error))

    def test_sentinel(self):
        """``sentinel://`` gives one server, whose master is refused if it is none, and whom to ask for it."""
        (server,) = broker(
            "sentinel://:secret@s1:26379/2;sentinel://s2:26380/2",
            broker_transport_options={
                "master_name": "mymaster", "min_other_sentinels": 1, "socket_timeout": 5,
                "sentinel_kwargs": {"password": "other", "ssl": True, "ssl_cert_reqs": "none"},
            },
        )  # fmt: skip
        assert server.sentinels is not None
        self.assertTrue(server.config.master_only)
        self.assertEqual((server.password, server.config.db, server.server.ssl), ("secret", 2, False))
        self.assertEqual(
            (server.sentinels.master_name, server.sentinels.min_other_sentinels), ("mymaster", 1)
        )
        asked = [
            (each.server.host, each.server.port, each.password, each.config.db)
            for each in server.sentinels.servers
        ]
        self.assertEqual(asked, [("s1", 26379, "other", 0), ("s2", 26380, "other", 0)])
        self.assertEqual(server.sentinels.servers[0].server.ssl, {"ssl_cert_reqs": "none"})
        self.assertFalse(server.sentinels.servers[0].config.master_only)

    def test_sentinel_without_kwargs(self):
        """Without ``sentinel_kwargs`` the Sentinels' sockets are treated like the master's, and nothing else."""
        (server,) = broker(
            "sentinel://:secret@s1:26379",
            broker_transport_options={"master_name": "mymaster", "socket_timeout": 5, "client_name": "web"},
        )
        assert server.sentinels is not None
        (asked,) = server.sentinels.servers
        self.assertEqual(
            (asked.config.silence_timeout, asked.config.client_name, asked.password), (5, None, None)
        )

    def test_sentinel_bad_values(self):
        """A missing master name, and what redis-py would not take either, are refused by name."""
        for options, text in (
            ({}, "master_name"),
            ({"master_name": "m", "sentinel_kwargs": {"pasword": "x"}}, "'pasword'"),
        ):
            error = self.assertRaises(
                ImproperlyConfigured, broker, "sentinel://s1", broker_transport_options=options
            )
            self.assertIn(text, str(error))


class LayoutTests(SynchronousTestCase):
    def layout(self, db=0, **options):
        return broker_layout(app("redis://", broker_transport_options=options).connection_for_write(), db)

    def test_defaults(self):
        """Without options the layout is kombu's."""
        layout = self.layout(db=3)
        self.assertEqual(
            (layout.sep, layout.priority_steps, layout.global_keyprefix), ("\x06\x16", (0, 3, 6, 9), "")
        )
        self.assertEqual((layout.fanout_prefix, layout.fanout_patterns), ("/3.", True))
        self.assertEqual((layout.legacy_fanout_prefix, layout.body_encoding), (None, "base64"))

    def test_options(self):
        """Options change it."""
        layout = self.layout(
            sep=":", priority_steps=[0, 5], global_keyprefix="p_", fanout_prefix="/x.", fanout_patterns=False
        )
        self.assertEqual((layout.sep, layout.priority_steps, layout.global_keyprefix), (":", (0, 5), "p_"))
        self.assertEqual(self.layout(global_keyprefix=None).global_keyprefix, "")
        self.assertEqual((layout.fanout_prefix, layout.fanout_patterns), ("/x.", False))
        self.assertEqual(self.layout(fanout_prefix=False).fanout_prefix, "")

    def test_no_priorities(self):
        """There has to be one priority step at least."""
        made = app("redis://", broker_transport_options={"priority_steps": []}).connection_for_write()
        error = self.assertRaises(ImproperlyConfigured, broker_layout, made, 0)
        self.assertIn("priority_steps", str(error))

    def test_rolling_upgrade(self):
        """``sentinel_fanout_compat`` adds the old prefix, where it is another one."""
        self.assertEqual(self.layout(sentinel_fanout_compat=True).legacy_fanout_prefix, "/{db}.")
        self.assertIsNone(self.layout(sentinel_fanout_compat=True, fanout_prefix="/x.").legacy_fanout_prefix)


class BackendTests(SynchronousTestCase):
    def test_plain(self):
        """Celery's own backend has parsed the URL; what it found is read."""
        (server,) = backend("redis://me:secret@10.0.0.1:7000/3")
        self.assertEqual((server.server.host, server.server.port, server.config.db), ("10.0.0.1", 7000, 3))
        self.assertEqual((server.username, server.password), ("me", "secret"))
        self.assertEqual(server.config.ping_interval, PING_INTERVAL)
        self.assertEqual(server.config.silence_timeout, 120)
        self.assertNotIn("secret", repr(server) + server.url)

    def test_settings(self):
        """The ``redis_*`` settings that concern a connection are honoured."""
        (server,) = backend(
            "redis://10.0.0.1",
            redis_socket_timeout=7,
            redis_socket_connect_timeout=3,
            redis_socket_keepalive=True,
            redis_backend_health_check_interval=11,
            redis_max_connections=5,
            redis_retry_on_timeout=True,
        )
        config = server.config
        self.assertEqual((config.silence_timeout, config.ping_interval), (7, 11))
        self.assertTrue(config.keepalive)
        self.assertEqual(server.server.connect_timeout, 3)

    @skipIf(celery.VERSION < (5, 6), "Celery has no such setting")
    def test_client_name(self):
        """``redis_client_name`` is honoured."""
        (server,) = backend("redis://10.0.0.1", redis_client_name="web")
        self.assertEqual(server.config.client_name, "web")

    def test_query(self):
        """Parameters of the URL win; unknown ones are refused by name."""
        (server,) = backend("redis://10.0.0.1?socket_timeout=9&health_check_interval=4")
        self.assertEqual((server.config.silence_timeout, server.config.ping_interval), (9, 4))
        error = self.assertRaises(ImproperlyConfigured, backend, "redis://10.0.0.1?sokcet_timeout=9")
        self.assertIn("'sokcet_timeout'", str(error))

    def test_tls(self):
        """``rediss://`` carries its settings over."""
        (server,) = backend("rediss://10.0.0.1?ssl_cert_reqs=required&ssl_ca_certs=/ca.pem")
        self.assertEqual(server.server.ssl, {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": "/ca.pem"})
        self.assertTrue(server.url.startswith("rediss://"))

    @skipIf(celery.VERSION < (5, 7), "Celery refuses it for redis://")
    def test_use_ssl(self):
        """``redis_backend_use_ssl`` makes it TLS."""
        (server,) = backend("redis://10.0.0.1", redis_backend_use_ssl={"ssl_cert_reqs": "none"})
        self.assertEqual(server.server.ssl, {"ssl_cert_reqs": ssl.CERT_NONE})

    def test_unix_socket(self):
        """``redis+socket://`` gives a path and the database of its query."""
        (server,) = backend("redis+socket:///var/run/redis.sock?virtual_host=2")
        self.assertEqual(
            (server.server.path, server.server.host, server.config.db), ("/var/run/redis.sock", "", 2)
        )

    @skipIf(celery.VERSION < (5, 6), "Celery takes none")
    def test_credential_provider(self):
        """A credential provider replaces user and password."""
        (server,) = backend("redis://me:secret@10.0.0.1", redis_backend_credential_provider=Provider())
        self.assertIsInstance(server.credential_provider, Provider)

    def test_sentinel(self):
        """``sentinel://`` gives one server and its Sentinels; the master's login is the first URL's."""
        (server,) = backend(
            "sentinel://:secret@s1:26379/2;sentinel://:secret@s2:26380/2",
            result_backend_transport_options={
                "master_name": "mymaster",
                "sentinel_kwargs": {"password": "x"},
            },
            redis_socket_timeout=4,
        )
        assert server.sentinels is not None
        self.assertEqual((server.password, server.config.db, server.config.silence_timeout), ("secret", 2, 4))
        asked = [(each.server.host, each.server.port, each.password) for each in server.sentinels.servers]
        self.assertEqual(asked, [("s1", 26379, "x"), ("s2", 26380, "x")])
        self.assertTrue(server.config.master_only)
        self.assertEqual(server.sentinels.servers[0].config.silence_timeout, SILENCE_TIMEOUT)
