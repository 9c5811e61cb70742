"""Attempts to connect: credentials, Sentinels, failures, cancelling."""

from __future__ import annotations

from typing import Any

from twisted.internet import error
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_peer import RedisPeer, array, bulk
from twistedcelery._urls import Server
from twistedcelery.errors import AuthenticationFailed, ConnectionFailed, ServerUnreachable, TLSFailed
from twistedcelery.redis.connection import ConnectionConfig, State
from twistedcelery.redis.protocol import CommandProtocol, SubscriberProtocol
from twistedcelery.redis.sentinel import ANSWER_WITHIN, MASTER_WITHIN, SentinelTarget
from twistedcelery.redis.settings import RedisServer, Sentinels
from twistedcelery.redis.target import RedisTarget, targets

MASTER = "10.0.0.9"


def server(host, port=6379, **given):
    config = given.pop("config", {})
    where = Server(transport="redis", host=host, port=port, virtual_host="0", ssl=given.pop("ssl", False))
    return RedisServer(server=where, config=ConnectionConfig(url=where.url, **config), **given)


def master_at(host, port=6379, *, flags="master", others=2, old=None):
    """Make what a Sentinel answers that takes this server for the master; ``old`` is where its state still is."""

    def answer(command):
        if command[1] != b"master":
            return array(bulk(host.encode()), bulk(b"%d" % port))
        fields = {
            "name": "mymaster",
            "ip": old or host,
            "port": port,
            "flags": flags,
            "num-other-sentinels": others,
        }
        return array(*(bulk(str(one).encode()) for pair in fields.items() for one in pair))

    return answer


class Line(StringTransport):
    """One connection of the network below."""

    def __init__(self, peer):
        super().__init__()
        self.peer = peer
        self.ending = self.gone = False

    def abortConnection(self):
        self.ending = True

    loseConnection = abortConnection


class Pool:
    """A thread pool whose work is done when the test says so."""

    def __init__(self):
        self.asked: list[Any] = []

    def callInThreadWithCallback(self, done, function, *args):
        self.asked.append((done, function, args))

    def work(self):
        ((done, function, args),) = self.asked
        try:
            done(True, function(*args))
        except ValueError:
            done(False, Failure())


class Network(MemoryReactorClock):
    """A reactor with Redis servers at some addresses; all others refuse, or are silent where ``silent``."""

    def __init__(self, **peers):
        super().__init__()
        self.peers = {host.replace("_", "."): peer for host, peer in peers.items()}
        self.silent: set[str] = set()
        self.seen = 0
        self.lines: list[tuple[str, Any, Line]] = []
        self.pool = Pool()

    def getThreadPool(self):
        return self.pool

    def callFromThread(self, callable, *args, **kwargs):  # noqa: A002  # Twisted's name
        callable(*args, **kwargs)

    def go(self):
        """Let everything happen that takes no time."""
        while self._step():
            self.advance(0)

    def _step(self):
        acted = False
        moved = True
        while moved:
            moved = False
            while self.seen < len(self.tcpClients):
                host, port, factory, *_ = self.tcpClients[self.seen]
                self.seen += 1
                moved = True
                self._connect(host, port, factory)
            for _, protocol, line in self.lines:
                if line.value() and not line.gone:
                    data = line.value()
                    line.clear()
                    moved = True
                    for answer in line.peer.receive(data):
                        protocol.dataReceived(answer)
                if line.ending and not line.gone:
                    line.gone = moved = True
                    protocol.connectionLost(Failure(error.ConnectionAborted()))
            acted = acted or moved
        return acted

    def _connect(self, host, port, factory):
        if host in self.silent:
            return
        peer = self.peers.get(host)
        if peer is None:
            factory.clientConnectionFailed(None, Failure(error.ConnectionRefusedError()))
            return
        protocol = factory.buildProtocol(IPv4Address("TCP", host, port))
        line = Line(peer)
        self.lines.append((host, protocol, line))
        protocol.makeConnection(line)

    def open(self):
        """Which hosts still have a connection."""
        return [host for host, _, line in self.lines if not line.gone]


def network(**peers):
    return Network(**{f"10_0_0_{name[1:]}": peer for name, peer in peers.items()})


def sentinel(answer):
    return RedisPeer({b"SENTINEL": answer})


class TargetTests(SynchronousTestCase):
    def attempt(self, reactor, wanted, kind: Any = CommandProtocol):
        target: RedisTarget[Any] = RedisTarget(reactor, wanted, kind)
        connecting = target.connect()
        reactor.go()
        return connecting

    def test_connects(self):
        """An attempt gives the open protocol."""
        for kind in (CommandProtocol, SubscriberProtocol):
            reactor = network(h9=RedisPeer())
            protocol = self.successResultOf(self.attempt(reactor, server(MASTER), kind=kind))
            self.assertIs(protocol.connection.state, State.OPEN)
            self.assertIs(type(protocol), kind)

    def test_credentials(self):
        """User and password are those of the settings; a user without a password logs in with an empty one."""
        for given, auth in (
            ({"password": "secret"}, [[b"AUTH", b"secret"]]),
            ({"password": "secret", "username": "me"}, [[b"AUTH", b"me", b"secret"]]),
            ({"username": "me"}, [[b"AUTH", b"me", b""]]),
            ({}, []),
        ):
            peer = RedisPeer()
            self.successResultOf(self.attempt(network(h9=peer), server(MASTER, **given)))
            self.assertEqual(peer.commands, [*auth, [b"PING"]])

    def test_asked_credentials(self):
        """Callable passwords and credential providers are asked in a thread, for each attempt."""

        class Provider:
            def get_credentials(self):
                return ("me", "token")

        for given, auth in (
            ({"password": lambda: "secret"}, [b"AUTH", b"secret"]),
            ({"password": lambda: "secret", "username": "me"}, [b"AUTH", b"me", b"secret"]),
            ({"credential_provider": Provider()}, [b"AUTH", b"me", b"token"]),
        ):
            peer = RedisPeer()
            reactor = network(h9=peer)
            connecting = self.attempt(reactor, server(MASTER, **given))
            self.assertNoResult(connecting)
            reactor.pool.work()
            reactor.go()
            self.successResultOf(connecting)
            self.assertEqual(peer.commands[0], auth)

    def test_no_credentials(self):
        """A provider that raises fails the attempt, which may be made again."""

        def broken():
            raise ValueError("no token today")

        reactor = network(h9=RedisPeer())
        connecting = self.attempt(reactor, server(MASTER, password=broken))
        reactor.pool.work()
        failed = self.failureResultOf(connecting, AuthenticationFailed).value
        self.assertIn("no token today", str(failed))
        self.assertFalse(failed.permanent)

    def test_cancelled_while_asking(self):
        """Cancelled while a provider thinks, nothing connects afterwards."""
        reactor = network(h9=RedisPeer())
        connecting = self.attempt(reactor, server(MASTER, password=lambda: "secret"))
        connecting.cancel()
        self.failureResultOf(connecting, CancelledError)
        reactor.pool.work()
        reactor.go()
        self.assertEqual(reactor.lines, [])

    def test_unusable_tls(self):
        """TLS settings that cannot be used are a `TLSFailed`."""
        reactor = network(h9=RedisPeer())
        failed = self.failureResultOf(
            self.attempt(reactor, server(MASTER, ssl={"ssl_nonsense": 1})), TLSFailed
        )
        self.assertIn("nonsense", str(failed.value))

    def test_refused(self):
        """A refused connection is a `ServerUnreachable` that names the server."""
        failed = self.failureResultOf(self.attempt(network(), server(MASTER)), ServerUnreachable)
        self.assertIn(MASTER, str(failed.value))

    def test_failed_login_leaves_nothing(self):
        """A failed greeting leaves no connection."""
        reactor = network(h9=RedisPeer({b"PING": b"-NOAUTH no\r\n"}))
        self.failureResultOf(self.attempt(reactor, server(MASTER)), AuthenticationFailed)
        self.assertEqual(reactor.open(), [])

    def test_targets(self):
        """Servers are tried in turn, without end, each by the attempt that fits it."""
        watched = server("10.0.0.1", sentinels=Sentinels(servers=[], master_name="m"))
        plain = server(MASTER)
        endless = targets(network(), [plain, watched], CommandProtocol)
        first, second, third = next(endless), next(endless), next(endless)
        self.assertIs(first, third)
        self.assertEqual((first.url, second.url), (plain.url, watched.url))
        self.assertEqual((type(first), type(second)), (RedisTarget, SentinelTarget))


class SentinelTests(SynchronousTestCase):
    def setUp(self):
        self.master = RedisPeer()

    def target(self, reactor, count=2, minimum=0, **given):
        watchers = [server(f"10.0.0.{number + 1}", 26379, **given) for number in range(count)]
        sentinels = Sentinels(servers=watchers, master_name="mymaster", min_other_sentinels=minimum)
        whole = server(
            "10.0.0.1", 26379, sentinels=sentinels, password="secret", config={"db": 2, "master_only": True}
        )
        made: SentinelTarget[Any] = SentinelTarget(reactor, whole, CommandProtocol)
        return made

    def connect(self, reactor, **given):
        connecting = self.target(reactor, **given).connect()
        reactor.go()
        return connecting

    def asked(self, reactor):
        return [host for host, *_ in reactor.tcpClients]

    def test_master(self):
        """The first Sentinel that knows the master is asked, with its own login, and only once."""
        watcher = sentinel(master_at(MASTER))
        reactor = network(h1=watcher, h9=self.master)
        protocol = self.successResultOf(self.connect(reactor, password="other"))
        self.assertEqual(
            watcher.commands,
            [
                [b"AUTH", b"other"],
                [b"PING"],
                [b"SENTINEL", b"get-master-addr-by-name", b"mymaster"],
                [b"SENTINEL", b"master", b"mymaster"],
            ],
        )
        self.assertEqual(
            self.master.commands, [[b"AUTH", b"secret"], [b"SELECT", b"2"], [b"ROLE"], [b"PING"]]
        )
        self.assertEqual((self.asked(reactor), reactor.open()), (["10.0.0.1", MASTER], [MASTER]))
        self.assertEqual(protocol.config.url, "redis://10.0.0.9:6379/0")

    def test_next_sentinel(self):
        """A Sentinel that refuses, does not know, denies or talks nonsense is passed over."""
        for answer in (
            b"*-1\r\n",
            b"-ERR No such master with that name\r\n",
            b"-NOPERM no\r\n",
            b":1\r\n",
            array(bulk(b"a")),
            array(bulk(b"10.0.0.9"), bulk(b"6379")),  # also as its state
            b"!\r\n",
        ):
            reactor = network(h1=sentinel(answer), h2=sentinel(master_at(MASTER)), h9=self.master)
            self.successResultOf(self.connect(reactor))
            self.assertEqual(reactor.open(), [MASTER])

    def test_sentinel_gone(self):
        """The one that answered last is asked first the next time."""
        reactor = network(h2=sentinel(master_at(MASTER)), h9=self.master)
        target = self.target(reactor)
        for _ in range(2):
            connecting = target.connect()
            reactor.go()
            self.successResultOf(connecting)
        self.assertEqual(self.asked(reactor), ["10.0.0.1", "10.0.0.2", MASTER, "10.0.0.2", MASTER])

    def test_sentinel_silent(self):
        """A Sentinel that does not answer gets its time, and no more."""
        reactor = network(h2=sentinel(master_at(MASTER)), h9=self.master)
        reactor.silent.add("10.0.0.1")
        connecting = self.connect(reactor)
        self.assertNoResult(connecting)
        reactor.advance(ANSWER_WITHIN)
        reactor.go()
        protocol = self.successResultOf(connecting)
        self.assertEqual(reactor.getDelayedCalls(), [protocol._timer])

    def test_stale_sentinel(self):
        """A server that is no master any more is left, and the next Sentinel asked."""
        replica = RedisPeer({b"ROLE": array(bulk(b"slave"))})
        reactor = network(
            h1=sentinel(master_at("10.0.0.8")), h2=sentinel(master_at(MASTER)), h8=replica, h9=self.master
        )
        self.successResultOf(self.connect(reactor))
        self.assertEqual(reactor.open(), [MASTER])

    def test_master_down(self):
        """A Sentinel that says itself that the master is down is passed over; not during a failover, when it knows the new one."""
        for flags in ("s_down,master", "master,o_down", "slave", "master,disconnected"):
            first = sentinel(master_at("10.0.0.8", flags=flags))
            reactor = network(h1=first, h2=sentinel(master_at(MASTER)), h8=self.master, h9=self.master)
            self.successResultOf(self.connect(reactor))
            self.assertEqual(self.asked(reactor), ["10.0.0.1", "10.0.0.2", MASTER])
        first = sentinel(master_at(MASTER, flags="master,s_down", old="10.0.0.8"))
        reactor = network(h1=first, h9=self.master)
        self.successResultOf(self.connect(reactor))
        self.assertEqual(self.asked(reactor), ["10.0.0.1", MASTER])

    def test_master_silent(self):
        """A master that is named and says nothing does not use up the attempt: the next Sentinel is asked."""
        reactor = network(h1=sentinel(master_at("10.0.0.8")), h2=sentinel(master_at(MASTER)), h9=self.master)
        reactor.silent.add("10.0.0.8")
        connecting = self.connect(reactor)
        self.assertNoResult(connecting)
        reactor.advance(MASTER_WITHIN)
        reactor.go()
        self.successResultOf(connecting)
        self.assertEqual(reactor.open(), [MASTER])

    def test_next_sentinel_after_cancelling(self):
        """An attempt that was cut short is not begun with the same Sentinel again."""
        reactor = network(h1=sentinel(master_at("10.0.0.8")), h2=sentinel(master_at(MASTER)), h9=self.master)
        reactor.silent.add("10.0.0.8")
        target = self.target(reactor)
        connecting = target.connect()
        reactor.go()
        connecting.cancel()
        self.failureResultOf(connecting)
        connecting = target.connect()
        reactor.go()
        self.successResultOf(connecting)
        self.assertEqual(self.asked(reactor), ["10.0.0.1", "10.0.0.8", "10.0.0.2", MASTER])

    def test_minimum(self):
        """A Sentinel that sees too few others is not believed."""
        few, enough = (sentinel(master_at(MASTER, others=number)) for number in (1, 2))
        reactor = network(h1=few, h2=enough, h9=self.master)
        self.successResultOf(self.connect(reactor, minimum=2))
        self.assertEqual(self.asked(reactor), ["10.0.0.1", "10.0.0.2", MASTER])

    def test_nobody_knows(self):
        """Where no Sentinel helps, the error says what each said, and leaves nothing."""
        reactor = network(h1=sentinel(b"*-1\r\n"))
        failed = self.failureResultOf(self.connect(reactor), ServerUnreachable).value
        self.assertIn("does not know the master", str(failed))
        self.assertIn("10.0.0.2", str(failed))
        self.assertEqual((reactor.open(), reactor.getDelayedCalls()), ([], []))

    def test_wrong_password_everywhere(self):
        """Where every way ends at the same wrong password, no other attempt helps."""
        master = RedisPeer({b"AUTH": b"-WRONGPASS no\r\n"})
        watchers = {"h1": sentinel(master_at(MASTER)), "h2": sentinel(master_at(MASTER))}
        failed = self.failureResultOf(self.connect(network(h9=master, **watchers)), ConnectionFailed).value
        self.assertIsInstance(failed, AuthenticationFailed)
        self.assertTrue(failed.permanent)

    def test_cancelled(self):
        """Cancelled at any step, the attempt stops there, and leaves no connection and no timer."""
        for silent, holding in (("10.0.0.1", None), (MASTER, None), (None, "sentinel"), (None, "master")):
            watcher, master = sentinel(master_at(MASTER)), RedisPeer()
            watcher.hold, master.hold = holding == "sentinel", holding == "master"
            reactor = network(h1=watcher, h2=sentinel(master_at(MASTER)), h9=master)
            reactor.silent.add(silent)
            connecting = self.connect(reactor)
            self.assertNoResult(connecting)
            connecting.cancel()
            reactor.go()
            self.failureResultOf(connecting)
            self.assertNotIn("10.0.0.2", self.asked(reactor))
            self.assertEqual((reactor.open(), reactor.getDelayedCalls()), ([], []))

    def test_cancelled_between_questions(self):
        """Cancelled while the Sentinel thinks, it stops asking."""
        watcher = sentinel(master_at(MASTER))
        reactor = network(h1=watcher, h2=watcher, h9=self.master)
        watcher.answers[b"PING"] = lambda command: self.hold(watcher)
        connecting = self.connect(reactor)
        self.assertNoResult(connecting)
        connecting.cancel()
        reactor.go()
        self.failureResultOf(connecting)
        self.assertEqual((reactor.open(), self.asked(reactor)), ([], ["10.0.0.1"]))

    def hold(self, watcher):
        watcher.answers[b"SENTINEL"] = b""
        return b"+PONG\r\n"
