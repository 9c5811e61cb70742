"""Endpoints, TLS settings and attempts, against a server in memory. Every TLS handshake is a real one."""

from __future__ import annotations

import contextlib
import datetime as dt
import ssl
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import trustme
from celery.exceptions import ImproperlyConfigured
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from OpenSSL import SSL
from OpenSSL.crypto import X509
from twisted.internet import defer, error
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import (
    IHostnameResolver,
    IOpenSSLServerConnectionCreator,
    IReactorPluggableNameResolver,
)
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from twisted.test.iosim import ConnectionCompleter
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from twistedcelery._endpoints import Target, dial, endpoint, targets
from twistedcelery._explain import explain
from twistedcelery._tls import _verify, client_tls
from twistedcelery._urls import Server
from twistedcelery.amqp.config import ConnectionConfig as AMQPConfig
from twistedcelery.amqp.protocol import AMQPProtocol
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    ServerUnreachable,
    TLSFailed,
)
from twistedcelery.redis.connection import ConnectionConfig as RedisConfig
from twistedcelery.redis.protocol import CommandProtocol, SubscriberProtocol


class Client(Protocol):
    """Its handshake is one byte from the server."""

    def __init__(self) -> None:
        self.opening: Deferred[None] = Deferred()
        self.waiting: list[Deferred[Exception]] = []
        self.gone: Exception | None = None
        self.aborted: Exception | None = None

    def when_open(self) -> Deferred[None]:
        return self.opening

    def when_closed(self) -> Deferred[Exception]:
        if self.gone is not None:
            return succeed(self.gone)
        self.waiting.append(Deferred())
        return self.waiting[-1]

    def close(self, timeout: float) -> Deferred[None]:
        raise NotImplementedError

    def abort(self, reason: Exception) -> None:
        self.aborted = reason
        if self.gone is None:
            self.transport.abortConnection()  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        if data == b"!" and not self.opening.called:
            self.opening.callback(None)

    def connectionLost(self, reason: Failure = mock.sentinel.unused) -> None:
        self.gone = ConnectionLost("lost")
        self.gone.__cause__ = reason.value
        if not self.opening.called:
            self.opening.errback(self.gone)
        for waiter in self.waiting:
            waiter.callback(self.gone)


class Greeter(Protocol):
    """The server: greets, and keeps its protocol for the test to look at."""

    greeting = b"!"
    made: Greeter | None = None

    def connectionMade(self) -> None:
        Greeter.made = self
        self.transport.write(self.greeting)  # type: ignore[union-attr]


class Silent(Greeter):
    greeting = b""


@implementer(IReactorPluggableNameResolver, IHostnameResolver)
class ResolvingReactor(MemoryReactorClock):
    """Every name is 127.0.0.1. Before Twisted 24 the reactor in memory resolves nothing by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.nameResolver = self

    # mypy-zope counts no self.
    def resolveHostName(  # type: ignore[override]
        self, receiver, hostName, portNumber=0, *_: object, **__: object
    ):
        receiver.resolutionBegan(None)
        receiver.addressResolved(IPv4Address("TCP", "127.0.0.1", portNumber))
        receiver.resolutionComplete()


class EndpointTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor = ResolvingReactor()
        self.completer = ConnectionCompleter(self.reactor)
        self.clients: list[Client] = []

    def build(self, *_: object) -> Client:
        self.clients.append(Client())
        return self.clients[-1]

    def listen(self, protocol: type[Protocol] = Greeter, creator: Any = None) -> None:
        factory: Any = Factory.forProtocol(protocol)
        if creator is not None:
            factory = TLSMemoryBIOFactory(creator, False, factory, clock=self.reactor)
        self.reactor.listenTCP(1, factory)

    def pump(self) -> None:
        """Make the connection, and move bytes until there are none."""
        self.reactor.advance(1)
        pump = self.completer.succeedOnce()
        assert pump is not None
        for _ in range(5):
            pump.flush()
            self.reactor.advance(0.1)

    def plain(self, **kwargs: Any) -> Server:
        return Server(transport="amqp", host="127.0.0.1", port=1, **kwargs)


class PlainTests(EndpointTestCase):
    def test_tcp(self) -> None:
        """Without TLS the endpoint connects to host and port, within the timeout."""
        endpoint(self.reactor, self.plain(), timeout=7).connect(Factory.forProtocol(Protocol))
        ((host, port, _, timeout, _),) = self.reactor.tcpClients
        self.assertEqual((host, port, timeout), ("127.0.0.1", 1, 7))

    def test_host_names(self) -> None:
        """Names that IDNA forbids and resolvers know, such as those with an underscore, are resolved."""
        for host, good in (
            ("my_broker", True),
            ("a_b.c-d.test.", True),
            ("::1", True),
            ("a_..b", False),
            ("", False),
        ):
            server = Server(transport="amqp", host=host, port=1)
            connecting = endpoint(self.reactor, server, timeout=None).connect(Factory.forProtocol(Protocol))
            self.reactor.advance(1)
            self.assertEqual(len(self.reactor.tcpClients), good, host)
            self.reactor.tcpClients.clear()
            if not good:
                self.failureResultOf(connecting, ValueError)

    def test_unix(self) -> None:
        """A path makes a UNIX endpoint."""
        server = Server(transport="redis", path="/run/r.sock")
        endpoint(self.reactor, server, timeout=7).connect(Factory.forProtocol(Protocol))
        self.assertEqual(self.reactor.unixClients[0][0], "/run/r.sock")
        self.assertEqual(self.reactor.unixClients[0][2], 7)


class DialTests(EndpointTestCase):
    def dial(self) -> Deferred[Client]:
        return Target(self.reactor, self.plain(), self.build).connect()

    def test_open(self) -> None:
        """The protocol is given once its handshake is done."""
        self.listen()
        dialled = self.dial()
        self.assertNoResult(dialled)
        self.pump()
        self.assertIs(self.successResultOf(dialled), self.clients[0])
        self.assertIsNone(self.clients[0].aborted)

    def test_refused(self) -> None:
        """A server that cannot be reached is told as such, with its URL and the cause."""
        dialled = self.dial()
        self.reactor.advance(1)
        self.completer.failOnce(Failure(error.ConnectionRefusedError(111, "refused")))
        failed = self.failureResultOf(dialled, ServerUnreachable).value
        self.assertEqual(failed.url, "amqp://127.0.0.1:1//")
        self.assertIsInstance(failed.__cause__, error.ConnectionRefusedError)

    def test_cancel_connecting(self) -> None:
        """Cancelled before TCP is up, the attempt is stopped, and no protocol is made."""
        dialled = self.dial()
        self.reactor.advance(1)
        dialled.cancel()
        self.failureResultOf(dialled, ServerUnreachable)
        self.assertTrue(self.reactor.connectors[0].stoppedConnecting)
        self.assertEqual(self.clients, [])

    def test_cancel_handshaking(self) -> None:
        """Cancelled during the handshake, the connection is aborted, and gone when the Deferred fires."""
        self.listen(Silent)
        dialled = self.dial()
        self.reactor.advance(1)
        pump = self.completer.succeedOnce()
        assert pump is not None
        pump.flush()
        dialled.cancel()
        self.assertNoResult(dialled)
        pump.flush()
        self.assertIsNotNone(self.clients[0].gone)
        self.failureResultOf(dialled, ServerUnreachable)

    def test_handshake_fails(self) -> None:
        """A failed handshake is told with its own error, and the connection is gone by then."""
        self.listen(Silent)
        dialled = self.dial()
        self.reactor.advance(1)
        pump = self.completer.succeedOnce()
        assert pump is not None
        wrong = AuthenticationFailed("wrong password")
        self.clients[0].opening.errback(wrong)
        self.assertNoResult(dialled)
        pump.flush()
        self.assertIs(self.failureResultOf(dialled, AuthenticationFailed).value, wrong)
        self.assertIs(self.clients[0].aborted, wrong)
        self.assertEqual(wrong.url, "amqp://127.0.0.1:1//")
        self.assertIsNone(wrong.__cause__)

    def test_lost_in_handshake(self) -> None:
        """A connection lost during its handshake fails the attempt."""
        self.listen(Silent)
        dialled = self.dial()
        self.reactor.advance(1)
        pump = self.completer.succeedOnce()
        assert pump is not None and Greeter.made is not None  # noqa: PT018
        Greeter.made.transport.loseConnection()  # type: ignore[union-attr]
        pump.flush()
        self.failureResultOf(dialled, ConnectionLost)

    def test_build_fails(self) -> None:
        """An exception while the protocol is made fails the attempt, and keeps its cause."""

        def broken() -> Client:
            raise KeyError("password")

        self.listen()
        dialled = dial(endpoint(self.reactor, self.plain(), timeout=5), broken, "url")
        self.reactor.advance(1)
        self.completer.failOnce(Failure(KeyError("password")))
        self.assertIsInstance(self.failureResultOf(dialled, ConnectionFailed).value.__cause__, KeyError)

    def test_targets(self) -> None:
        """Targets come in the order of the failover strategy, the same one each time for the same server."""
        servers = [Server(transport="amqp", host=name, port=1) for name in ("a", "b")]
        found = targets(self.reactor, servers, self.build)
        first, second, third = next(found), next(found), next(found)
        self.assertEqual([first.url, second.url], ["amqp://a:1//", "amqp://b:1//"])
        self.assertIs(third, first)

    def test_bad_tls_settings(self) -> None:
        """TLS settings that cannot be used fail the attempt for good, and are read again by the next one."""
        server = self.plain(ssl={"ca_certs": "/nonexistent/ca.pem"})
        target = Target(self.reactor, server, self.build)
        for _ in range(2):
            failed = self.failureResultOf(target.connect(), TLSFailed).value
            self.assertTrue(failed.permanent)
            self.assertIn("ca_certs: cannot read /nonexistent/ca.pem: No such file", str(failed))
        self.assertEqual(self.reactor.tcpClients, [])

    def test_endpoint_is_kept(self) -> None:
        """The endpoint is made once for all attempts at a server."""
        target = Target(self.reactor, self.plain(), self.build)
        with mock.patch("twistedcelery._endpoints.endpoint", side_effect=endpoint) as made:
            for _ in range(3):
                target.connect()
        self.assertEqual(made.call_count, 1)


def unencrypted(key: Any) -> bytes:
    data: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return data


@implementer(IOpenSSLServerConnectionCreator)
class ServerOptions:
    """A TLS server's context, bare, so that tests can do with it what they like."""

    def __init__(self) -> None:
        self.context = SSL.Context(SSL.TLS_METHOD)

    def serverConnectionForTLS(self, tlsProtocol: object) -> SSL.Connection:
        return SSL.Connection(self.context, None)


class TLSTests(EndpointTestCase):
    def setUp(self) -> None:
        super().setUp()
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.ca = trustme.CA()
        self.file("ca.pem", self.ca.cert_pem.bytes())
        self.file("other.pem", trustme.CA().cert_pem.bytes())

    def file(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.write_bytes(data)
        return str(path)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def server_options(self, *names: str, client_ca: bool = False) -> ServerOptions:
        options = ServerOptions()
        self.ca.issue_cert(*names).configure_cert(options.context)
        if client_ca:
            self.ca.configure_trust(options.context)
            options.context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        return options

    def attempt(self, settings: Any, *, name: str = "broker.test", options: Any = None) -> Deferred[Client]:
        """One attempt at a TLS server whose certificate is for broker.test."""
        self.reactor = ResolvingReactor()
        self.completer = ConnectionCompleter(self.reactor)
        self.listen(Greeter, options or self.server_options("broker.test"))
        dialled = Target(self.reactor, self.plain(ssl=settings, name=name), self.build).connect()
        self.pump()
        return dialled

    def works(self, settings: Any, **kwargs: Any) -> None:
        self.successResultOf(self.attempt(settings, **kwargs))

    def fails(self, settings: Any, text: str, **kwargs: Any) -> TLSFailed:
        failed = self.failureResultOf(self.attempt(settings, **kwargs), TLSFailed).value
        assert isinstance(failed, TLSFailed)
        self.assertIn(text, str(failed))
        self.assertTrue(failed.permanent)
        self.assertIsNotNone(failed.__cause__)
        return failed

    def refused(self, settings: Any, text: str) -> None:
        refused = self.assertRaises(ImproperlyConfigured, client_tls, "broker.test", settings)
        self.assertIn(text, str(refused))

    # Verification

    def test_right_authority(self) -> None:
        """A certificate of the authority that the settings name is accepted, in both dialects."""
        self.works({"ca_certs": self.path("ca.pem")})
        self.works({"ssl_ca_certs": self.path("ca.pem"), "ssl_cert_reqs": "required"})
        self.works({"ca_certs": self.path("ca.pem"), "cert_reqs": ssl.CERT_OPTIONAL})

    def test_wrong_authority(self) -> None:
        """A certificate of anyone else is refused, and so it is with True, which means the system's."""
        self.fails(
            {"ca_certs": self.path("other.pem")}, "certificate is not trusted: certificate verify failed"
        )
        self.fails(True, "certificate is not trusted")
        self.fails({"cert_reqs": ssl.CERT_OPTIONAL}, "certificate is not trusted")
        self.fails({"cert_reqs": None}, "certificate is not trusted")
        self.fails({"ssl_check_hostname": False}, "certificate is not trusted")

    def test_wrong_name(self) -> None:
        """A certificate for another name is refused, and the message says what to do."""
        settings = {"ca_certs": self.path("ca.pem")}
        self.fails(settings, "not valid for elsewhere.test", name="elsewhere.test")
        self.fails(settings, "server_hostname", name="elsewhere.test")
        self.fails(settings, "not valid for 127.0.0.1", name="127.0.0.1")

    def test_no_name(self) -> None:
        """A certificate without any name is valid for no host."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "broker.test")])
        now = dt.datetime.now(dt.timezone.utc)
        builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now).not_valid_after(now + dt.timedelta(1))
        pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        options = ServerOptions()
        options.context.use_certificate_chain_file(self.file("nameless.pem", pem))
        options.context.use_privatekey_file(self.file("nameless.key", unencrypted(key)))
        trusted = {"ca_certs": self.path("nameless.pem")}
        self.fails(trusted, "cannot be checked for its name", options=options)
        self.works({**trusted, "check_hostname": False}, options=options)

    def test_address(self) -> None:
        """An IP address is verified against the addresses in the certificate."""
        self.works(
            {"ca_certs": self.path("ca.pem")}, name="127.0.0.1", options=self.server_options("127.0.0.1")
        )

    def test_server_hostname(self) -> None:
        """server_hostname says which name to expect; None means the one in the URL."""
        settings = {"ca_certs": self.path("ca.pem"), "server_hostname": "broker.test"}
        self.works(settings, name="elsewhere.test")
        self.works({**settings, "server_hostname": None})

    def test_name_unchecked(self) -> None:
        """check_hostname=False accepts another name, and still no other authority."""
        settings = {"ssl_ca_certs": self.path("ca.pem"), "ssl_check_hostname": False}
        self.works(settings, name="elsewhere.test")
        self.works(settings, name="127.0.0.1")
        self.fails({**settings, "ssl_ca_certs": self.path("other.pem")}, "not trusted", name="elsewhere.test")

    def test_unverified(self) -> None:
        """CERT_NONE accepts any certificate, however it is spelt."""
        for none in (ssl.CERT_NONE, 0, "none", "CERT_NONE", None):
            self.works({"ssl_cert_reqs": none}, name="elsewhere.test")

    def test_server_name_is_sent(self) -> None:
        """The server is told which name is wanted (SNI), verified or not; no address is."""
        for settings in ({"cert_reqs": 0}, {"ca_certs": self.path("ca.pem")}):
            asked: list[bytes | None] = []
            options = self.server_options("broker.test")

            def ask(connection: SSL.Connection, asked: list[bytes | None] = asked) -> None:
                asked.append(connection.get_servername())

            options.context.set_tlsext_servername_callback(ask)
            self.works(settings, options=options)
            self.assertEqual(asked, [b"broker.test"])

    def test_authorities_elsewhere(self) -> None:
        """Authorities may come as text, as DER, as several in one file, or as a directory."""
        pem = self.ca.cert_pem.bytes()
        certificate = x509.load_pem_x509_certificate(pem)
        self.works({"ssl_ca_data": pem.decode()})
        self.works({"ssl_ca_data": certificate.public_bytes(serialization.Encoding.DER)})
        self.works({"ca_certs": self.file("both.pem", trustme.CA().cert_pem.bytes() + b"\n" + pem)})
        # OpenSSL finds a file in a directory by the hash of its subject.
        name = X509.from_cryptography(certificate).subject_name_hash()
        (self.folder / "folder").mkdir()
        self.file(f"folder/{name:08x}.0", pem)
        self.works({"ssl_ca_path": self.path("folder")})

    def test_context(self) -> None:
        """py-amqp's context dictionary is read too."""
        context = {"cafile": self.path("ca.pem"), "purpose": ssl.Purpose.SERVER_AUTH}
        self.works({"context": context})
        self.fails({"context": context}, "not valid for", name="elsewhere.test")
        self.works({"context": {**context, "check_hostname": False}}, name="elsewhere.test")
        self.refused({"context": {"unheard": 1}}, "context['unheard']")

    # The client's certificate

    def test_client_certificate(self) -> None:
        """The client's certificate is shown, whether its key is in a file of its own, in the same, or encrypted."""
        issued = self.ca.issue_cert("client@example.test")
        certificate = self.file("client.pem", b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key = self.file("client.key", issued.private_key_pem.bytes())
        both = self.file("client-both.pem", issued.private_key_and_cert_chain_pem.bytes())
        private = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
        encrypted = self.file(
            "client.encrypted",
            private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"pass"),
            ),
        )
        x25519 = self.file("x25519.key", unencrypted(X25519PrivateKey.generate()))
        trusted = {"ca_certs": self.path("ca.pem")}
        for own in (
            {"certfile": certificate, "keyfile": key},
            {"ssl_certfile": certificate, "ssl_keyfile": key, "ssl_password": "needless"},
            {"certfile": both},
            {"ssl_certfile": certificate, "ssl_keyfile": encrypted, "ssl_password": "pass"},
            {"cert_reqs": 0, "certfile": both},
        ):
            self.works({**trusted, **own}, options=self.server_options("broker.test", client_ca=True))
            assert Greeter.made is not None
            shown = Greeter.made.transport.getPeerCertificate()  # type: ignore[union-attr]
            self.assertIsNotNone(shown)
        for own, text in (
            ({"keyfile": key}, "keyfile needs certfile"),
            ({"certfile": certificate}, f"certfile: no private key of {certificate} in {certificate}"),
            ({"certfile": certificate, "keyfile": encrypted}, f"keyfile: no private key of {certificate}"),
            ({"certfile": certificate, "keyfile": encrypted, "password": "wrong"}, "keyfile: no private key"),
            ({"certfile": certificate, "keyfile": x25519}, f"keyfile: no private key of {certificate}"),
            ({"certfile": key, "keyfile": key}, f"certfile: no certificate in {key}"),
            (
                {"certfile": certificate, "keyfile": self.path("none")},
                f"keyfile: cannot read {self.path('none')}",
            ),
            (
                {"certfile": self.path("ca.pem"), "keyfile": key},
                f"keyfile: no private key of {self.path('ca.pem')} in {key}",
            ),
        ):
            self.refused({**trusted, **own}, text)

    def test_client_certificate_chain(self) -> None:
        """Intermediate certificates in the file are sent with it."""
        issued = self.ca.create_child_ca().issue_cert("client@example.test")
        both = self.file("chain.pem", issued.private_key_and_cert_chain_pem.bytes())
        settings = {"ca_certs": self.path("ca.pem"), "certfile": both}
        self.works(settings, options=self.server_options("broker.test", client_ca=True))

    # Versions and ciphers

    def test_versions(self) -> None:
        """The lowest and the highest TLS version are kept to."""
        trusted = {"ca_certs": self.path("ca.pem")}
        for settings, version in (
            ({}, "TLSv1.3"),
            ({"ssl_version": ssl.PROTOCOL_TLS_CLIENT}, "TLSv1.3"),
            ({"ssl_version": ssl.PROTOCOL_TLSv1_2}, "TLSv1.2"),
            ({"tls_maximum_version": ssl.TLSVersion.TLSv1_2}, "TLSv1.2"),
            ({"tls_minimum_version": ssl.TLSVersion.TLSv1_3}, "TLSv1.3"),
            ({"ssl_min_version": ssl.TLSVersion.MINIMUM_SUPPORTED}, "TLSv1.3"),
            ({"cert_reqs": 0, "tls_maximum_version": ssl.TLSVersion.TLSv1_2}, "TLSv1.2"),
        ):
            self.works({**trusted, **settings})
            assert Greeter.made is not None
            spoken = Greeter.made.transport.getHandle().get_protocol_version_name()  # type: ignore[union-attr]
            self.assertEqual(spoken, version, settings)
        self.refused({"ssl_min_version": 5}, "minimum version 5")
        self.refused(
            {"tls_minimum_version": ssl.TLSVersion.TLSv1_3, "tls_maximum_version": ssl.TLSVersion.TLSv1_2},
            "minimum version TLSv1_3 is above the maximum version TLSv1_2",
        )

    def test_no_common_version(self) -> None:
        """A server that speaks no version that the settings allow is a TLS failure."""
        options = self.server_options("broker.test")
        options.context.set_max_proto_version(SSL.TLS1_2_VERSION)
        settings = {"ca_certs": self.path("ca.pem"), "tls_minimum_version": ssl.TLSVersion.TLSv1_3}
        self.fails(settings, "the TLS handshake failed", options=options)

    def test_ciphers(self) -> None:
        """The ciphers that the settings name are used; nonsense is refused."""
        cipher = "ECDHE-ECDSA-AES256-GCM-SHA384"
        settings = {"ca_certs": self.path("ca.pem"), "ciphers": cipher, "ssl_version": ssl.PROTOCOL_TLSv1_2}
        self.works(settings)
        assert Greeter.made is not None
        self.assertEqual(Greeter.made.transport.getHandle().get_cipher_name(), cipher)  # type: ignore[union-attr]
        self.refused({"ciphers": "NONSENSE"}, "ciphers")

    # What is refused

    def test_unknown_setting(self) -> None:
        """An unknown setting is named, with the known ones."""
        self.refused({"ca_cert": "x"}, "unknown TLS setting 'ca_cert'; known are ca_certs, ca_data")

    def test_unsupported_setting(self) -> None:
        """What another client would check and this one does not is refused when it is set, never left out."""
        self.refused({"ssl_validate_ocsp": True}, "ssl_validate_ocsp is not supported")
        client_tls("broker.test", {"ssl_validate_ocsp": False, "suppress_ragged_eofs": True})

    def test_bad_values(self) -> None:
        """A value that cannot be understood is refused with its key."""
        self.refused({"cert_reqs": "sometimes"}, "cert_reqs='sometimes'")
        self.refused({"cert_reqs": 7}, "cert_reqs=7")
        self.refused({"ca_certs": self.file("empty.pem", b"")}, "ca_certs: no certificate in")
        self.refused({"ssl_ca_data": "nothing"}, "ca_data: no certificate in the given text")
        self.refused({"ssl_ca_data": b"nothing"}, "ca_data: no certificate in the given text")
        self.refused({"ca_path": self.path("nowhere")}, "ca_path: ")

    def test_names(self) -> None:
        """Names with an underscore, or in letters beyond ASCII, are verified like others."""
        settings = {"ca_certs": self.path("ca.pem")}
        underscore = self.server_options("placeholder.test")
        self.fails(settings, "not valid for my_broker", name="my_broker", options=underscore)
        abroad = self.server_options("xn--bcher-kva.test")
        self.works(settings, name="b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.test", options=abroad)

    def test_name_that_no_certificate_has(self) -> None:
        """A host name that cannot be verified is refused with the way out, which works."""
        settings = {"ca_certs": self.path("ca.pem")}
        for name in ("a..b", "a b"):
            refused = self.assertRaises(ImproperlyConfigured, client_tls, name, settings)
            self.assertIn("server_hostname", str(refused))
            client_tls(name, {**settings, "server_hostname": "broker.test"})

    def test_protocol_is_gone(self) -> None:
        """A certificate that comes when nobody waits for it any more is not verified."""
        nobody = mock.Mock(return_value=None)
        self.assertIs(_verify(nobody, None, mock.Mock(), mock.Mock(), 0, 0, 1), False)

    def test_libraries_missing(self) -> None:
        """Without pyOpenSSL or service-identity, the error says what to install."""
        for missing in ("service_identity.hazmat", "OpenSSL"):
            with mock.patch.dict(sys.modules, {missing: None}):
                self.refused(True, "pip install twistedcelery[tls]")

    # Peers that do not speak TLS

    def test_not_tls(self) -> None:
        """A server that answers in the clear is told as such."""
        self.listen(Talker)
        dialled = Target(self.reactor, self.plain(ssl=True), self.build).connect()
        self.pump()
        failed = self.failureResultOf(dialled, TLSFailed).value
        self.assertIn("does not speak TLS on this port", str(failed))

    def test_dropped_in_handshake(self) -> None:
        """A server that drops the connection during the TLS handshake is a lost connection: it may come back."""
        self.listen(Dropper)
        dialled = Target(self.reactor, self.plain(ssl=True), self.build).connect()
        self.pump()
        failed = self.failureResultOf(dialled, ConnectionLost).value
        self.assertFalse(failed.permanent)


class Talker(Protocol):
    def connectionMade(self) -> None:
        self.transport.write(b"AMQP\x00\x00\x09\x01")  # type: ignore[union-attr]


class Dropper(Protocol):
    def dataReceived(self, data: bytes) -> None:
        self.transport.loseConnection()  # type: ignore[union-attr]


def alerted(code: int) -> Exception:
    """What OpenSSL raises in a handshake that the server answers with this fatal alert (RFC 8446, 6)."""
    connection = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
    connection.set_connect_state()
    with contextlib.suppress(SSL.WantReadError):
        connection.do_handshake()
    connection.bio_write(bytes([0x15, 3, 3, 0, 2, 2, code]))
    try:
        connection.do_handshake()
    except SSL.Error as raised:
        return raised
    raise AssertionError(f"alert {code} did not end the handshake")


class ExplainTests(SynchronousTestCase):
    def test_kinds(self) -> None:
        """Each kind of failure becomes the error that says what it means, with its cause and the URL."""
        for cause, kind, text in (
            (
                error.ConnectionRefusedError(111, "refused"),
                ServerUnreachable,
                "cannot connect: Connection was refused",
            ),
            (error.DNSLookupError("no results"), ServerUnreachable, "no results"),
            (error.TimeoutError(), ServerUnreachable, "timeout"),
            (FileNotFoundError(2, "No such file", "/r.sock"), ServerUnreachable, "/r.sock"),
            (defer.CancelledError(), ServerUnreachable, "given up"),
            (error.ConnectionDone(), ConnectionLost, "closed cleanly"),
            (error.ConnectionLost("boo"), ConnectionLost, "boo"),
            (SSL.SysCallError(-1, "Unexpected EOF"), ConnectionLost, "Unexpected EOF"),
            (SSL.ZeroReturnError(), ConnectionLost, "ZeroReturnError"),
            (
                SSL.Error([("SSL routines", "", "unexpected eof while reading")]),
                ConnectionLost,
                "unexpected eof",
            ),
            (SSL.Error([("SSL routines", "", "http request")]), TLSFailed, "does not speak TLS"),
            (SSL.Error("plain text"), TLSFailed, "plain text"),
            (SSL.Error(), TLSFailed, "the TLS handshake failed"),
            (ValueError("odd"), ConnectionFailed, "odd"),
        ):
            explained = explain(cause, "amqp://h")
            self.assertIs(type(explained), kind)
            self.assertIn(text, str(explained))
            self.assertIs(explained.__cause__, cause)
            self.assertEqual(explained.url, "amqp://h")

    def test_passing_tls_trouble(self) -> None:
        """A server in trouble of its own is not a matter of settings."""
        for code, text in (
            (10, "unexpected message"),
            (20, "bad record mac"),
            (22, "record overflow"),
            (50, "decode error"),
            (80, "internal error"),
            (90, "user cancel"),
        ):
            explained = explain(alerted(code), None)
            self.assertIs(type(explained), TLSFailed)
            self.assertIn(text, str(explained))
            self.assertFalse(explained.permanent, text)

    def test_lasting_tls_trouble(self) -> None:
        """A refused certificate, version or cipher is."""
        for code in (40, 42, 44, 45, 46, 48, 70, 71, 116):
            self.assertTrue(explain(alerted(code), None).permanent, code)

    def test_one_explanation(self) -> None:
        """An amqps and a rediss connection say the same of the same alert, in words, and wait where the other waits."""
        for code in (10, 20, 22, *range(40, 52), 60, 70, 71, 80, 90, 109, 110, 112, 116, 120):
            cause = alerted(code)
            told = []
            for protocol in (
                AMQPProtocol(AMQPConfig(url="tls://h"), Clock()),
                CommandProtocol(RedisConfig(url="tls://h"), Clock()),
                SubscriberProtocol(RedisConfig(url="tls://h"), Clock()),
            ):
                protocol.makeConnection(StringTransport())
                opening = protocol.when_open()
                protocol.connectionLost(Failure(cause))
                failed = self.failureResultOf(opening).value
                told.append((type(failed), str(failed), failed.permanent, failed.__cause__))
            self.assertEqual(told, [told[0]] * 3)
            self.assertIs(told[0][0], TLSFailed)
            self.assertNotIn("(", told[0][1])

    def test_words(self) -> None:
        """Where OpenSSL only says that the connection is gone, that is told in words, too."""
        for cause in (
            SSL.SysCallError(104, "ECONNRESET"),
            SSL.Error([("SSL routines", "", "unexpected eof while reading")]),
        ):
            peer = AMQPProtocol(AMQPConfig(url="amqps://h"), Clock())
            peer.makeConnection(StringTransport())
            peer.connectionLost(Failure(cause))
            lost = self.successResultOf(peer.when_closed())
            self.assertIs(type(lost), ConnectionLost)
            self.assertIs(lost.__cause__, cause)
            for text in (str(lost), str(explain(cause, None))):
                self.assertNotIn("(", text)
                self.assertRegex(text, "ECONNRESET|unexpected eof")

    def test_own_errors(self) -> None:
        """An error of this package stays as it is, and is given the URL where it has none."""
        own = AuthenticationFailed("no", url="amqp://other")
        self.assertIs(explain(own, "amqp://h"), own)
        self.assertEqual(own.url, "amqp://other")
        lost = ConnectionLost("lost")
        lost.__cause__ = error.ConnectionDone()
        self.assertIs(explain(Failure(lost), "amqp://h"), lost)
        self.assertEqual(lost.url, "amqp://h")

    def test_without_tls_libraries(self) -> None:
        """Nothing of TLS has to be installed."""
        with mock.patch.dict(sys.modules):
            for name in ("OpenSSL.SSL", "service_identity"):
                sys.modules.pop(name, None)
            self.assertIs(type(explain(ValueError("odd"), None)), ConnectionFailed)
            self.assertIs(
                type(explain(error.ConnectError(), None)),
                ServerUnreachable,
            )
