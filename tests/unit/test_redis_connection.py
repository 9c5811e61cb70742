"""The sans-IO Redis connection: greeting, commands, transactions, loss, hostile bytes."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Any
from unittest import mock

import hiredis
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_peer import RedisPeer, array, bulk
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    NotSent,
    Refused,
    RemoteProtocolError,
    ServerUnreachable,
    VirtualHostNotFound,
)
from twistedcelery.redis.connection import CommandConnection, Connection, ConnectionConfig, State
from twistedcelery.redis.replies import CommandRefused, NotMaster, NotNow, OutOfRoom, server_error

URL = "redis://10.0.0.1:6379/0"


class Wire:
    """A connection, its peer, and what was told."""

    def __init__(self, config: ConnectionConfig | None = None, answers=None, greet=True):
        self.peer = RedisPeer(answers)
        self.written: list[bytes] = []
        self.opened = 0
        self.drained: list[Exception] = []
        self.bugs: list[BaseException | None] = []
        self.connection = CommandConnection(
            config or ConnectionConfig(url=URL),
            write=self.written.append,
            opened=self._opened,
            ending=lambda: None,
            drained=self.drained.append,
            bug=lambda: self.bugs.append(sys.exc_info()[1]),
        )
        if greet:
            self.connection.start()
            self.flush()

    def _opened(self):
        self.opened += 1

    def flush(self):
        """Carry bytes both ways until nobody says anything."""
        while self.written:
            written, self.written[:] = b"".join(self.written), []
            answer = b"".join(self.peer.receive(written))
            if answer:
                self.connection.receive_data(answer)

    def sent(self) -> list[list[bytes]]:
        """What the server got after the greeting."""
        self.flush()
        return self.peer.commands[1:]


class GreetingTests(SynchronousTestCase):
    def test_nothing_asked_for(self):
        """Without settings the greeting is PING alone, and its answer opens the connection."""
        wire = Wire()
        self.assertEqual(wire.peer.commands, [[b"PING"]])
        self.assertEqual((wire.opened, wire.connection.state), (1, State.OPEN))

    def test_everything_asked_for(self):
        """AUTH, SELECT, CLIENT SETNAME, ROLE and PING leave in one write."""
        config = ConnectionConfig(
            url=URL, credentials=("me", "secret"), db=3, client_name="web", master_only=True
        )
        wire = Wire(config, greet=False)
        wire.connection.start()
        self.assertEqual(len(wire.written), 1)
        wire.flush()
        self.assertEqual(
            wire.peer.commands,
            [
                [b"AUTH", b"me", b"secret"],
                [b"SELECT", b"3"],
                [b"CLIENT", b"SETNAME", b"web"],
                [b"ROLE"],
                [b"PING"],
            ],
        )
        self.assertIs(wire.connection.state, State.OPEN)

    def test_password_is_not_shown(self):
        """A config's repr keeps the password to itself."""
        self.assertNotIn("secret", repr(ConnectionConfig(credentials=("me", "secret"))))

    def check_refused(self, kind, answers, text, config=None):
        error = self.assertRaises(kind, Wire, config, answers)
        self.assertIn(text, str(error))
        self.assertEqual(error.url, URL)
        return error

    def test_wrong_password(self):
        """WRONGPASS, Redis 5's "invalid password" and AUTH without need are a failed login."""
        config = ConnectionConfig(url=URL, credentials=("wrong",))
        for text in (
            b"WRONGPASS invalid username-password pair or user is disabled.",
            b"ERR invalid password",
            b"ERR Client sent AUTH, but no password is set",
        ):
            error = self.check_refused(
                AuthenticationFailed, {b"AUTH": b"-" + text + b"\r\n"}, text.decode(), config
            )
            self.assertTrue(error.permanent)

    def test_password_wanted(self):
        """A server that wants a password which the settings do not have is a failed login."""
        self.check_refused(
            AuthenticationFailed,
            {b"PING": b"-NOAUTH Authentication required.\r\n"},
            "Authentication required",
        )

    def test_protected_mode(self):
        """The farewell of a server in protected mode is a failed login, with its text."""
        wire = Wire(greet=False)
        wire.connection.start()
        self.assertRaises(
            AuthenticationFailed,
            wire.connection.receive_data,
            b"-DENIED Redis is running in protected mode\r\n",
        )

    def test_user_name_before_redis_6(self):
        """Where AUTH takes no user name, it is repeated with the password alone, with all that follows it."""

        def auth(command):
            if len(command) == 3:
                return b"-ERR wrong number of arguments for 'auth' command\r\n"
            return b"+OK\r\n"

        config = ConnectionConfig(url=URL, credentials=("default", "secret"), db=2, master_only=True)
        noauth = iter([b"-NOAUTH Authentication required.\r\n", b"+OK\r\n"])
        wire = Wire(config, {b"AUTH": auth, b"SELECT": lambda _: next(noauth)})
        self.assertEqual(
            wire.peer.commands[4:], [[b"AUTH", b"secret"], [b"SELECT", b"2"], [b"ROLE"], [b"PING"]]
        )
        self.assertEqual((wire.opened, wire.connection.state), (1, State.OPEN))

    def test_wrong_number_without_user(self):
        """The same answer to a password alone is a failed login, not a loop."""
        answers = {b"AUTH": b"-ERR wrong number of arguments for 'auth' command\r\n"}
        self.check_refused(
            AuthenticationFailed, answers, "wrong number", ConnectionConfig(url=URL, credentials=("x",))
        )

    def test_no_such_database(self):
        """A database number out of range, or denied, is a missing virtual host."""
        config = ConnectionConfig(url=URL, db=99)
        for text in (b"ERR DB index is out of range", b"NOPERM this user has no permissions to run 'select'"):
            self.check_refused(VirtualHostNotFound, {b"SELECT": b"-" + text + b"\r\n"}, text.decode(), config)

    def test_not_ready(self):
        """A server that loads its data, or is full, is unreachable for now: tried again."""
        for text in (b"LOADING Redis is loading the dataset in memory", b"ERR max number of clients reached"):
            error = self.check_refused(ServerUnreachable, {b"PING": b"-" + text + b"\r\n"}, text.decode())
            self.assertFalse(error.permanent)

    def test_replica(self):
        """Where the master is wanted, a replica is unreachable, and so is nonsense."""
        config = ConnectionConfig(url=URL, master_only=True)
        for role in (array(bulk(b"slave"), bulk(b"10.0.0.2"), b":6379\r\n"), b"+OK\r\n", array()):
            self.check_refused(ServerUnreachable, {b"ROLE": role}, "not the master", config)

    def test_user_without_ping_and_role(self):
        """A user whom ACLs forbid PING and ROLE is logged in all the same."""
        noperm = b"-NOPERM this user has no permissions to run the command\r\n"
        wire = Wire(ConnectionConfig(url=URL, master_only=True), {b"PING": noperm, b"ROLE": noperm})
        self.assertIs(wire.connection.state, State.OPEN)

    def test_takes_no_writes(self):
        """A server that takes no writes for now can be read from: it is logged in to."""
        misconf = b"-MISCONF Redis is configured to save RDB snapshots\r\n"
        wire = Wire(ConnectionConfig(url=URL, master_only=True), {b"PING": misconf, b"ROLE": misconf})
        self.assertIs(wire.connection.state, State.OPEN)

    def test_name_denied(self):
        """A client name that ACLs forbid is refused, as redis-py refuses it."""
        config = ConnectionConfig(url=URL, client_name="web")
        self.check_refused(
            AuthenticationFailed, {b"CLIENT": b"-NOPERM no permissions\r\n"}, "CLIENT: NOPERM", config
        )

    def test_nonsense(self):
        """An error that no greeting explains is a protocol error."""
        self.check_refused(RemoteProtocolError, {b"PING": b"-ERR what?\r\n"}, "what?")

    def test_lost(self):
        """A connection lost, or closed, during the greeting never opens."""
        for end in ("connection_lost", "drain"):
            wire = Wire(greet=False)
            wire.connection.start()
            getattr(wire.connection, end)(ConnectionLost("cut"))
            wire.connection.receive_data(b"+PONG\r\n")
            self.assertEqual(wire.opened, 0)

    def test_base_class_is_abstract(self):
        """What the two kinds of connection differ in has no meaning of its own."""
        hooks = dict.fromkeys(("write", "opened", "ending", "drained", "bug"), mock.Mock())
        base = Connection(ConnectionConfig(), **hooks)
        self.assertRaises(NotImplementedError, lambda: base.waiting)
        for method, args in (
            (base.ping, ()),
            (base.drain, (1,)),
            (base.connection_lost, (1,)),
            (base._replied, (1,)),
        ):
            self.assertRaises(NotImplementedError, method, *args)


class CommandTests(SynchronousTestCase):
    def test_replies_in_order(self):
        """Replies go to their commands in the order sent, whatever the chunks."""
        wire = Wire(answers={b"GET": lambda command: bulk(command[1])})
        got: list[Any] = []
        for name in ("a", "b", "c"):
            wire.connection.send([("GET", name)], got.append)
        self.assertTrue(wire.connection.waiting)
        wire.flush()
        self.assertEqual(got, [[b"a"], [b"b"], [b"c"]])
        self.assertFalse(wire.connection.waiting)

    def test_several_commands(self):
        """Commands sent together leave in one write, and answer together."""
        wire = Wire(answers={b"GET": b"$-1\r\n"})
        got: list[Any] = []
        wire.connection.send([("SET", "a", 1), ("GET", b"b")], got.append)
        self.assertEqual(len(wire.written), 1)
        self.assertEqual(wire.sent(), [[b"SET", b"a", b"1"], [b"GET", b"b"]])
        self.assertEqual(got, [[b"OK", None]])

    def test_no_commands(self):
        """Nothing to send is done at once."""
        wire = Wire()
        got: list[Any] = []
        wire.connection.send([], got.append)
        self.assertEqual((got, wire.written), ([[]], []))

    def test_first_error_of_several(self):
        """The first error among several replies is the outcome, and it says which server."""
        wire = Wire(answers={b"LPUSH": b"-WRONGTYPE Operation against a key\r\n", b"GET": b"-ERR no\r\n"})
        got: list[Any] = []
        wire.connection.send([("SET", "a", 1), ("LPUSH", "a", 1), ("GET", "a")], got.append)
        wire.flush()
        (error,) = got
        self.assertIsInstance(error, CommandRefused)
        self.assertEqual(str(error), f"WRONGTYPE Operation against a key [{URL}]")

    def test_transaction(self):
        """A transaction's outcome is what EXEC answers."""
        wire = Wire(answers={b"LLEN": b":4\r\n"})
        got: list[Any] = []
        wire.connection.send([("SET", "a", 1), ("LLEN", "b")], got.append, transaction=True)
        self.assertEqual(wire.sent(), [[b"MULTI"], [b"SET", b"a", b"1"], [b"LLEN", b"b"], [b"EXEC"]])
        self.assertEqual(got, [[b"OK", 4]])

    def test_transaction_of_one(self):
        """A single command in a transaction is one too."""
        wire = Wire()
        got: list[Any] = []
        wire.connection.send([("SET", "a", 1)], got.append, transaction=True)
        self.assertEqual(len(wire.sent()), 3)
        self.assertEqual(got, [[b"OK"]])

    def transact(self, exec_answer: bytes, queued: bytes = b"+QUEUED\r\n"):
        wire = Wire()
        got: list[Any] = []
        wire.connection.send([("SET", "a", 1)], got.append, transaction=True)
        wire.connection.receive_data(b"+OK\r\n" + queued + exec_answer)
        return got[0]

    def test_transaction_refused_when_queued(self):
        """The cause is what the queued command answered, not EXECABORT."""
        error = self.transact(b"-EXECABORT Transaction discarded\r\n", b"-OOM command not allowed\r\n")
        self.assertIsInstance(error, OutOfRoom)

    def test_transaction_refused_by_exec(self):
        """An error of EXEC itself is the outcome."""
        self.assertIsInstance(self.transact(b"-EXECABORT Transaction discarded\r\n"), Refused)

    def test_transaction_with_an_error_inside(self):
        """An error inside EXEC's answer is the outcome."""
        self.assertIsInstance(self.transact(array(b"-WRONGTYPE wrong\r\n")), CommandRefused)

    def test_transaction_not_carried_out(self):
        """EXEC that answers nothing means nothing was done."""
        self.assertIsInstance(self.transact(b"*-1\r\n"), Refused)

    def test_unencodable_argument(self):
        """What Redis cannot be told is refused, and leaves nothing behind."""
        wire = Wire()
        told: list[Any] = []
        wire.connection.send([("SET", "a", 1), ("SET", "a", None)], told.append)
        wire.connection.send([("SET", "a", None)], told.append)
        wire.connection.send([("SET", "\udc80", 1)], told.append)
        wire.connection.send([("SET", object(), 1)], told.append, in_pieces=True)
        wire.connection.send([("SET", "\udc80", 1)], told.append, transaction=True)
        self.assertEqual([type(one) for one in told], [Refused] * 5)
        self.assertEqual((wire.written, wire.connection.waiting), ([], False))

    def test_not_open(self):
        """Before it is open, while it drains and after it is lost, a command is not sent, and says so."""
        early, draining, lost = Wire(greet=False), Wire(), Wire()
        draining.connection.drain(ConnectionLost("closed"))
        lost.connection.connection_lost(ConnectionLost("cut"))
        for wire in (early, draining, lost):
            got: list[Any] = []
            wire.connection.send([("SET", "a", 1)], got.append)
            self.assertIsInstance(got[0], NotSent)
            self.assertEqual(got[0].url, URL)
            self.assertEqual(wire.written, [])

    def test_lost(self):
        """A lost connection fails whatever has no answer, once each, and forgets it."""
        wire = Wire()
        got: list[Any] = []
        wire.connection.send([("SET", "a", 1)], got.append)
        wire.connection.send([("SET", "a", 1), ("SET", "b", 1)], got.append)
        wire.connection.receive_data(b"+OK\r\n+OK\r\n")
        cut = ConnectionLost("cut")
        wire.connection.connection_lost(cut)
        wire.connection.connection_lost(cut)
        self.assertEqual(got, [[b"OK"], cut])
        self.assertFalse(wire.connection.waiting)

    def test_error_in_a_callable(self):
        """A callable that raises is reported, and harms neither its neighbours nor the connection."""
        wire = Wire(answers={b"GET": b"-ERR no\r\n"})
        got: list[Any] = []

        def broken(_outcome):
            raise ZeroDivisionError

        wire.connection.send([("SET", "a", 1)], broken)
        wire.connection.send([("GET", "a")], broken)
        wire.connection.send([("SET", "a", 1)], got.append)
        wire.flush()
        wire.connection.send([("SET", "a", 1)], broken)
        wire.connection.connection_lost(ConnectionLost("cut"))
        self.assertEqual([type(bug) for bug in wire.bugs], [ZeroDivisionError] * 3)
        self.assertEqual(got, [[b"OK"]])

    def test_ended_by_a_callable(self):
        """A callable may end the connection in the middle of a read; the rest of it is ignored."""
        wire = Wire()
        cut = ConnectionLost("cut")
        got: list[Any] = []
        wire.connection.send([("SET", "a", 1)], lambda _: wire.connection.connection_lost(cut))
        wire.connection.send([("SET", "a", 1)], got.append)
        wire.flush()
        self.assertEqual(got, [cut])

    def test_ping(self):
        """PING waits for an answer, and takes any."""
        wire = Wire(answers={})
        wire.connection.ping()
        self.assertTrue(wire.connection.waiting)
        wire.flush()
        wire.connection.ping()
        wire.connection.receive_data(b"-NOPERM no\r\n")
        self.assertFalse(wire.connection.waiting)
        self.assertIs(wire.connection.state, State.OPEN)

    def test_unasked_reply(self):
        """A reply that nobody asked for is a protocol error, an unasked error the server's farewell."""
        self.assertRaises(RemoteProtocolError, Wire().connection.receive_data, b"+OK\r\n")
        error = self.assertRaises(ConnectionLost, Wire().connection.receive_data, b"-ERR going down\r\n")
        self.assertIn("going down", str(error))


class DrainTests(SynchronousTestCase):
    def test_idle(self):
        """With nothing due, draining is over at once."""
        wire = Wire()
        reason = ConnectionLost("closed")
        wire.connection.drain(reason)
        self.assertEqual(wire.drained, [reason])

    def test_waits_for_answers(self):
        """What is due is waited for."""
        wire = Wire()
        got: list[Any] = []
        wire.connection.send([("SET", "a", 1)], got.append)
        wire.connection.send([("SET", "a", 1), ("SET", "a", 1)], got.append)
        reason = ConnectionLost("closed")
        wire.connection.drain(reason)
        self.assertEqual(wire.drained, [])
        wire.flush()
        self.assertEqual((len(got), wire.drained), (2, [reason]))

    def test_after_loss(self):
        """There is nothing to drain after a loss."""
        wire = Wire()
        wire.connection.connection_lost(ConnectionLost("cut"))
        wire.connection.drain(ConnectionLost("closed"))
        self.assertEqual((wire.drained, wire.connection.state), ([], State.CLOSED))

    def test_became_a_replica(self):
        """READONLY: the command was not carried out, nothing more is taken, and what is due still comes."""
        wire = Wire(answers={b"LPUSH": b"-READONLY You can't write against a read only replica.\r\n"})
        got: list[Any] = []
        wire.connection.send([("LPUSH", "a", 1)], got.append)
        wire.connection.send([("GET", "a")], got.append)
        wire.peer.hold = True
        wire.flush()
        wire.connection.receive_data(wire.peer.release(1))
        self.assertIs(wire.connection.state, State.DRAINING)
        self.assertEqual(wire.drained, [])
        wire.connection.receive_data(wire.peer.release())
        self.assertIsInstance(got[0], NotMaster)
        self.assertEqual(got[1], [b"OK"])
        self.assertEqual(wire.drained, [got[0]])

    def test_logged_out(self):
        """A user who lost the right to be here takes the connection down."""
        wire = Wire(answers={b"GET": b"-NOAUTH Authentication required.\r\n"})
        got: list[Any] = []
        wire.connection.send([("GET", "a")], got.append)
        wire.flush()
        self.assertIsInstance(got[0], AuthenticationFailed)
        self.assertEqual(wire.drained, got)


class MeaningTests(SynchronousTestCase):
    def test_table(self):
        """Each code word has its meaning, and what is unknown is refused for good."""
        meanings = {
            "LOADING Redis is loading": NotNow,
            "BUSY Redis is busy running a script": NotNow,
            "MASTERDOWN Link with MASTER is down": NotNow,
            "TRYAGAIN": NotNow,
            "CLUSTERDOWN": NotNow,
            "READONLY You can't write": NotMaster,
            "ERR Error running script (call to f_1): @user_script:2: -READONLY You can't write": NotMaster,
            "ERR Error running script (call to f_1): @user_script:2: oops": CommandRefused,
            "UNBLOCKED force unblock": NotMaster,
            "OOM command not allowed": OutOfRoom,
            "MISCONF Redis is configured": OutOfRoom,
            "NOREPLICAS Not enough": OutOfRoom,
            "WRONGTYPE Operation": CommandRefused,
            "NOPERM this user": CommandRefused,
            "ERR unknown command": CommandRefused,
            "": CommandRefused,
            "NOAUTH Authentication required.": AuthenticationFailed,
            "WRONGPASS": AuthenticationFailed,
            "DENIED": AuthenticationFailed,
            "ERR max number of clients reached": ServerUnreachable,
        }
        for text, meaning in meanings.items():
            self.assertIs(type(server_error(text)), meaning, text)

    def test_retried_or_not(self):
        """What was not done for a passing reason counts as not sent; what is final, as refused."""
        self.assertIsInstance(server_error("LOADING"), NotSent)
        self.assertIsInstance(server_error("READONLY"), NotSent)
        self.assertIsInstance(server_error("OOM"), Refused)
        self.assertIsInstance(server_error("WRONGTYPE"), Refused)


#: Values, as a server may send them, with what they are read as.
replies = st.recursive(
    st.one_of(
        st.integers(-(2**63), 2**63 - 1).map(lambda n: (b":%d\r\n" % n, n)),
        st.binary(max_size=300).map(lambda value: (bulk(value), value)),
        st.just((b"$-1\r\n", None)),
        st.just((b"*-1\r\n", None)),
        st.from_regex(rb"[A-Za-z ]{0,20}", fullmatch=True).map(lambda text: (b"+" + text + b"\r\n", text)),
    ),
    lambda items: st.lists(items, max_size=4).map(
        lambda parts: (array(*(part[0] for part in parts)), [part[1] for part in parts])
    ),
    max_leaves=8,
)


#: Pieces of RESP, of any version, at random. An array that claims to be huge costs no memory, but hiredis makes
#: and frees a list of that length: seconds, so none of the largest.
nearly_resp = (
    st.lists(st.sampled_from([*list("*$-+:%~>#(,=_|13at\x00"), "-1", "\r\n"]), max_size=30)
    .map(lambda parts: "".join(parts).encode())
    .filter(lambda data: not re.search(rb"[0-9]{7}", data))
)


class HostileTests(SynchronousTestCase):
    @given(st.lists(replies, min_size=1, max_size=5), st.data())
    @settings(max_examples=150, deadline=None)
    def test_chunks_do_not_matter(self, sequence, data):
        """Replies fed byte by byte, or cut anywhere, are the same replies."""
        wire = Wire()
        got: list[Any] = []
        for _ in sequence:
            wire.connection.send([("GET", "a")], got.append)
        stream = b"".join(encoded for encoded, _ in sequence)
        step = data.draw(st.integers(1, 7))
        for start in range(0, len(stream), step):
            wire.connection.receive_data(stream[start : start + step])
        self.assertEqual(got, [[value] for _, value in sequence])
        self.assertFalse(wire.connection.waiting)

    @given(st.binary(max_size=200), st.booleans())
    @settings(max_examples=300, deadline=None)
    def test_noise(self, noise, greet):
        """Whatever a server sends, the outcome is a `ConnectionFailed` or nothing, never another error."""
        wire = Wire(greet=greet)
        if not greet:
            wire.connection.start()
        got: list[Any] = []
        wire.connection.send([("GET", "a"), ("GET", "b")], got.append)
        with contextlib.suppress(ConnectionFailed):
            wire.connection.receive_data(noise)
        wire.connection.connection_lost(ConnectionLost("cut"))
        self.assertEqual((len(got), wire.bugs), (1, []))

    @given(nearly_resp)
    @settings(max_examples=300, deadline=None)
    def test_nearly_resp(self, data):
        """The same for what looks like RESP, of any version."""
        wire = Wire()
        got: list[Any] = []
        wire.connection.send([("GET", "a")], got.append)
        with contextlib.suppress(ConnectionFailed):
            wire.connection.receive_data(data)
        wire.connection.connection_lost(ConnectionLost("cut"))
        self.assertEqual((len(got), wire.bugs), (1, []))

    def test_what_is_not_resp(self):
        """Bytes that are no RESP, unhashable keys and absurd lengths are protocol errors."""
        for garbage in (
            b"HTTP/1.1 400 Bad Request\r\n",
            b"$-5\r\n",
            b"%1\r\n*0\r\n:1\r\n",
            b":x\r\n",
        ):
            wire = Wire()
            wire.connection.send([("GET", "a")], lambda _: None)
            error = self.assertRaises(RemoteProtocolError, wire.connection.receive_data, garbage)
            self.assertEqual(error.url, URL)
            self.assertIsNotNone(error.__cause__)

    def test_no_memory(self):
        """An array that the machine has no memory for is a protocol error."""
        wire = Wire()
        wire.connection._reader = mock.Mock(**{"gets.side_effect": MemoryError})
        error = self.assertRaises(RemoteProtocolError, wire.connection.receive_data, b"*1000000\r\n")
        self.assertIn("too large", str(error))

    def test_array_too_long(self):
        """An array of more than ``max_array_length`` items is a protocol error before it is parsed, wherever its header is cut."""
        for header in (b"*536870912\r\n", b"*1048577\r\n", b">99999999\r\n", b"*" + b"9" * 100):
            for cut in range(len(header)):
                wire = Wire()
                got: list[Any] = []
                for _ in range(2):
                    wire.connection.send([("MGET", "a")], got.append)
                reader = mock.Mock(wraps=wire.connection._reader)
                wire.connection._reader = wire.connection._arrays._reader = reader
                data = bulk(b"*536870912\r\n") + b"*2\r\n:1\r\n" + header
                split = len(data) - len(header) + cut
                with self.assertRaises(RemoteProtocolError) as caught:
                    wire.connection.receive_data(data[:split])
                    wire.connection.receive_data(data[split:])
                self.assertIn("1048576", str(caught.exception))
                self.assertEqual(caught.exception.url, URL)
                self.assertEqual(got, [[b"*536870912\r\n"]])
                fed = b"".join(call.args[0] for call in reader.feed.call_args_list)
                self.assertEqual(fed, data[: -len(header)])

    def test_longest_array(self):
        """One of exactly the limit, and what only looks like the header of a longer one, is taken."""
        wire = Wire(ConnectionConfig(url=URL, max_array_length=12))
        got: list[Any] = []
        wire.connection.send([("MGET", "a")], got.append)
        items = [b"*13", b"x\n*99\r\n", b"+*99\r\n", *([b"%22"] * 9)]
        data = array(*map(bulk, items))
        for byte in data:
            wire.connection.receive_data(bytes((byte,)))
        self.assertEqual(got, [[items]])
        for line in (b"+*999999999\r\n", b"+*99 a\r\n"):
            wire.connection.send([("PING",)], got.append)
            wire.connection.receive_data(line)
        self.assertEqual(got[1:], [[b"*999999999"], [b"*99 a"]])

    def test_bogus_ends(self):
        """A value whose end is not the one that it should have hides nothing behind it: hiredis does not look at that."""
        for ends in (b"XX", b"X+", b"X*", b"\n*"):
            wire = Wire()
            wire.connection.send([("MGET", "a")], lambda _: None)
            data = b"*2\r\n$1\r\na" + ends + b"*536870912\r\n"
            error = self.assertRaises(RemoteProtocolError, wire.connection.receive_data, data)
            self.assertIn("536870912 items", str(error))

    @given(st.data())
    def test_arrays_are_told_from_what_looks_like_them(self, data):
        """Whatever the replies, and however they are cut: the first array that is too long is refused, and no other bytes are."""
        limit = data.draw(st.integers(1, 12))
        texts = st.lists(
            st.sampled_from(
                [b"*13\r\n", b"*9", b"%5", b"\r\n", b"\n", b"\r", b"+", b"$9\r\n", b"*", b"1", b"x"]
            )
        ).map(b"".join)
        lines = texts.map(lambda text: b"+%s\r\n" % text.replace(b"\r", b"").replace(b"\n", b""))
        leaf = st.one_of(
            texts.map(bulk), lines, st.integers().map(lambda n: b":%d\r\n" % (n % 2**62)), st.just(b"$-1\r\n")
        )
        replies = data.draw(st.lists(st.recursive(leaf, _arrays, max_leaves=30), max_size=8))
        stream = b"".join(replies)
        allowed, longest = [], None
        for reply in replies:
            too_long = [length for length in _lengths(reply) if length > limit]
            if too_long:
                longest = too_long[0]
                break
            allowed.append(_parsed(reply))
        cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=10)))
        wire = Wire(ConnectionConfig(url=URL, max_array_length=limit))
        got: list[Any] = []
        for _ in replies:
            wire.connection.send([("GET", "a")], got.append)
        with self.assertRaises(RemoteProtocolError) if longest else contextlib.nullcontext() as caught:
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                wire.connection.receive_data(stream[start:end])
        if caught is not None:
            self.assertIn(f"array of {longest} items", str(caught.exception))
        self.assertEqual(got, [[reply] for reply in allowed])

    def test_reply_too_large(self):
        """A reply past the limit is refused while it comes, not kept."""
        wire = Wire(ConnectionConfig(url=URL, max_reply_size=100_000))
        wire.connection.send([("GET", "a")], lambda _: None)
        wire.connection.receive_data(b"$99999999999\r\n" + b"x" * 50_000)
        wire.connection.receive_data(b"x" * 100_000)
        error = self.assertRaises(RemoteProtocolError, wire.connection.receive_data, b"x" * 50_000)
        self.assertIn("100000 bytes", str(error))

    def test_items_count_too(self):
        """The items of an incomplete array count, although hiredis has already taken them."""
        wire = Wire(ConnectionConfig(url=URL, max_reply_size=100_000))
        wire.connection.send([("MGET", "a")], lambda _: None)
        wire.connection.receive_data(b"*1000000\r\n")
        with self.assertRaises(RemoteProtocolError):
            for _ in range(1_000):
                wire.connection.receive_data(bulk(b"x" * 500))

    def test_many_replies_are_no_large_reply(self):
        """The limit is one for a reply, not for a connection."""
        wire = Wire(ConnectionConfig(url=URL, max_reply_size=100_000))
        got: list[Any] = []
        for _ in range(100):
            wire.connection.send([("GET", "a")], got.append)
        for _ in range(99):
            wire.connection.receive_data(bulk(b"x" * 90_000))
        wire.connection.receive_data(bulk(b"x" * 90_000)[:-1])
        wire.connection.receive_data(b"\n")
        self.assertEqual(len(got), 100)

    def test_largest_value_fits(self):
        """A reply of exactly the limit is taken."""
        wire = Wire(ConnectionConfig(url=URL, max_reply_size=100_000))
        got: list[Any] = []
        wire.connection.send([("GET", "a")], got.append)
        data = bulk(b"x" * 100_000)
        wire.connection.receive_data(data[:70_000])
        wire.connection.receive_data(data[70_000:])
        self.assertEqual(len(got[0][0]), 100_000)

    def test_encoding_is_redis(self):
        """Commands are arrays of bulk strings."""
        wire = Wire()
        wire.connection.send([("SET", "é", b"\r\n", 1.5)], lambda _: None)
        reader = hiredis.Reader()
        reader.feed(b"".join(wire.written))
        self.assertEqual(reader.gets(), [b"SET", "é".encode(), b"\r\n", b"1.5"])


def _arrays(items):
    """Give a strategy for arrays of these."""
    return st.lists(items, max_size=14).map(lambda chosen: array(*chosen))


def _parsed(reply):
    reader = hiredis.Reader()
    reader.feed(reply)
    return reader.gets()


def _lengths(reply):
    """Yield the length of each array of a reply, in the order of their headers."""
    parsed = _parsed(reply)

    def lengths(item):
        if isinstance(item, list):
            yield len(item)
            for each in item:
                yield from lengths(each)

    return lengths(parsed)
