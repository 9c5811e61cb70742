"""The connection's state machine, without any I/O."""

from __future__ import annotations

import contextlib  # its suppress as a name of this module would be taken for trial's
from struct import pack

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.support.amqp_peer import SERVER_PROPERTIES, content, frame, method, split
from twistedcelery.amqp import methods
from twistedcelery.amqp.codec import HEARTBEAT
from twistedcelery.amqp.config import ConnectionConfig
from twistedcelery.amqp.connection import Connection, State
from twistedcelery.amqp.events import (
    Acked,
    Blocked,
    ChannelClosed,
    Closed,
    Content,
    Delivery,
    Got,
    MethodReceived,
    Opened,
    Returned,
    Unblocked,
)
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionLost,
    LocalProtocolError,
    RemoteProtocolError,
    VirtualHostNotFound,
)

START = method(0, "connection.start", 0, 9, SERVER_PROPERTIES, "PLAIN AMQPLAIN", "en_US")
TUNE = method(0, "connection.tune", 2047, 131072, 60)
OPEN_OK = method(0, "connection.open-ok")
DELIVER = method(1, "basic.deliver", "me", 7, True, "ex", "key")


class Side:
    """A connection and what it wrote."""

    def __init__(self, **config):
        self.written = bytearray()
        self.connection = Connection(ConnectionConfig(url="amqp://test", **config), self.written.extend)
        self.connection.start()

    def receive(self, *data):
        return list(self.connection.receive_data(b"".join(data)))

    def read(self):
        data = bytes(self.written)
        self.written.clear()
        return split(data)

    def opened(self, *channels):
        """Go through the handshake and open channels."""
        self.receive(START, TUNE, OPEN_OK)
        for _ in range(max(channels, default=0)):
            self.receive(method(self.connection.open_channel(), "channel.open-ok"))
        self.read()
        return self


class Case(SynchronousTestCase):
    def assert_refused(self, side, data, text, kind=RemoteProtocolError):
        """These bytes end the connection with such an error, and nothing is heard after it."""
        events = side.receive(data, HEARTBEAT)
        closed = events[-1]
        self.assertIsInstance(closed, Closed)
        self.assertIs(type(closed.error), kind)
        self.assertIn(text, str(closed.error))
        self.assertIn("amqp://test", str(closed.error))
        self.assertIs(side.connection.state, State.CLOSED)
        self.assertEqual(side.receive(OPEN_OK), [])
        self.assertFalse(side.connection._rest)
        return closed


class HandshakeTests(Case):
    def test_whole(self):
        """Header, login, tuning and virtual host, in the order of the specification."""
        side = Side(virtual_host="vh", client_properties={"connection_name": "me", "product": "mine"})
        self.assertEqual(side.receive(START), [])
        header, start_ok = side.read()
        self.assertEqual(header.values, [b"AMQP\x00\x00\x09\x01"])
        properties, mechanism, response, locale = start_ok.values
        self.assertEqual((mechanism, response, locale), ("PLAIN", "\0guest\0guest", "en_US"))
        self.assertEqual((properties["product"], properties["connection_name"]), ("mine", "me"))
        self.assertIn("version", properties)
        self.assertIn("platform", properties)
        self.assertEqual(
            sorted(properties["capabilities"]),
            ["authentication_failure_close", "basic.nack", "connection.blocked", "consumer_cancel_notify",
             "exchange_exchange_bindings", "publisher_confirms"],
        )  # fmt: skip
        self.assertEqual(side.receive(TUNE), [])
        tune_ok, opening = side.read()
        self.assertEqual((tune_ok.name, tune_ok.values), ("connection.tune-ok", [2047, 131072, 60]))
        self.assertEqual((opening.name, opening.values), ("connection.open", ["vh", "", False]))
        self.assertEqual(side.receive(OPEN_OK), [Opened()])
        self.assertIs(side.connection.state, State.OPEN)
        self.assertEqual(side.connection.server_properties, SERVER_PROPERTIES)

    def test_capabilities_can_be_switched_off(self):
        """The program's own client properties win, capability by capability."""
        side = Side(client_properties={"capabilities": {"connection.blocked": False}})
        side.receive(START)
        capabilities = side.read()[1].values[0]["capabilities"]
        self.assertIs(capabilities["connection.blocked"], False)
        self.assertIs(capabilities["basic.nack"], True)

    def test_locale(self):
        """The server's first locale is taken where it does not offer en_US."""
        for offered, taken in (("de_DE fr_FR", "de_DE"), ("", "en_US"), ("de_DE en_US", "en_US")):
            side = Side()
            side.receive(method(0, "connection.start", 0, 9, {}, "PLAIN", offered))
            self.assertEqual(side.read()[1].values[3], taken)

    def test_tuning(self):
        """The lower limit holds, 0 being none; a heartbeat that this side switches off stays off."""
        for ours, theirs, agreed in (
            ((2047, 131072, 60), (0, 0, 0), [2047, 131072, 60]),
            ((0, 0, 60), (0, 0, 30), [65535, 131072, 30]),
            ((0, 0, 0), (100, 8192, 60), [100, 8192, 0]),
            ((10, 4096, 5), (100, 8192, 60), [10, 4096, 5]),
            ((10, 131072, 0.2), (5, 4096, 60), [5, 4096, 1]),
            ((10, 131072, 1.5), (5, 4096, 60), [5, 4096, 2]),
        ):
            with self.subTest(ours=ours, theirs=theirs):
                channel_max, frame_max, heartbeat = ours
                side = Side(channel_max=channel_max, frame_max=frame_max, heartbeat=heartbeat)
                side.receive(START, method(0, "connection.tune", *theirs))
                self.assertEqual(side.read()[2].values, agreed)
                connection = side.connection
                self.assertEqual([connection.channel_max, connection.frame_max, connection.heartbeat], agreed)

    def test_impossible_tuning(self):
        """A frame size below AMQP's minimum is refused, theirs as well as ours."""
        side = Side()
        side.receive(START)
        self.assert_refused(side, method(0, "connection.tune", 0, 4095, 0), "4095")
        for wrong in ({"frame_max": 4095}, {"channel_max": 65536}, {"heartbeat": -1}, {"heartbeat": 70000}):
            self.assertRaises(ValueError, ConnectionConfig, **wrong)

    def test_other_protocol_version(self):
        """A server that answers with a protocol header is told apart, and its version named."""
        self.assert_refused(Side(), b"AMQP\x00\x01\x00\x00", "0-1-0-0")
        self.assert_refused(Side(), method(0, "connection.start", 1, 0, {}, "PLAIN", ""), "AMQP 1-0")

    def test_other_protocols(self):
        """What is no AMQP is refused, and a port that expects TLS is recognised."""
        self.assert_refused(Side(), b"HTTP/1.1 400 Bad Request\r\n", "does not speak AMQP: b'HTTP")
        self.assert_refused(Side(), b"ABCDEFGH", "does not speak AMQP: b'ABCD")
        self.assert_refused(Side(), b"\x15\x03\x01\x00\x02\x02\x46", "TLS")

    def test_header_by_pieces(self):
        """A protocol header in pieces is waited for."""
        side = Side()
        self.assertEqual(side.receive(b"AMQ"), [])
        self.assertEqual(side.receive(b"P\x00\x00"), [])
        self.assertIsInstance(side.receive(b"\x09\x00")[0].error, RemoteProtocolError)

    def test_login_refused(self):
        """403 during the login: wrong user or password. It is answered."""
        side = Side()
        side.receive(START)
        side.read()
        (closed,) = side.receive(
            method(0, "connection.close", 403, "ACCESS_REFUSED - Login was refused", 0, 0)
        )
        self.assertEqual((type(closed.error), closed.orderly), (AuthenticationFailed, True))
        self.assertTrue(closed.error.permanent)
        self.assertIn("Login was refused", str(closed.error))
        self.assertEqual([seen.name for seen in side.read()], ["connection.close-ok"])

    def test_virtual_host_refused(self):
        """402, 403 and 530 for the virtual host: there is none, or not for this user."""
        for code in (402, 403, 530):
            side = Side()
            side.receive(START, TUNE)
            (closed,) = side.receive(method(0, "connection.close", code, "vhost x not found", 10, 40))
            self.assertIs(type(closed.error), VirtualHostNotFound)
            self.assertIn(f"{code} vhost x not found", str(closed.error))

    def test_limits_pass(self):
        """A limit on connections has the same code as a missing virtual host, but is worth another attempt."""
        side = Side()
        side.receive(START, TUNE)
        text = "NOT_ALLOWED - access to vhost '/' refused for user 'guest': connection limit (0) is reached"
        (closed,) = side.receive(method(0, "connection.close", 530, text, 10, 40))
        self.assertIs(type(closed.error), ConnectionLost)
        self.assertFalse(closed.error.permanent)

    def test_other_refusals(self):
        """Any other close, at any time, is a lost connection, with the server's code and text."""
        for state, before in (("header", []), ("login", [START]), ("host", [START, TUNE]),
                              ("open", [START, TUNE, OPEN_OK])):  # fmt: skip
            with self.subTest(state=state):
                side = Side()
                side.receive(*before)
                (closed,) = side.receive(method(0, "connection.close", 320, "CONNECTION_FORCED - bye", 0, 0))
                self.assertIs(type(closed.error), ConnectionLost)
                self.assertIn("320 CONNECTION_FORCED - bye", str(closed.error))

    def test_end_of_stream(self):
        """A stream that ends says what it means by when it ends."""
        side = Side()
        self.assertIs(type(side.connection.lost()), ConnectionLost)
        side.receive(START)
        self.assertIs(type(side.connection.lost()), ConnectionLost)
        self.assertIn("login: why", str(side.connection.lost("why")))
        side.receive(TUNE)
        self.assertIn("virtual host", str(side.connection.lost()))
        side.receive(OPEN_OK)
        self.assertIs(type(side.connection.lost()), ConnectionLost)
        properties: object
        for properties in ({}, {"capabilities": 5}, {"capabilities": {}}):
            side = Side()
            side.receive(method(0, "connection.start", 0, 9, properties, "PLAIN", "en_US"))
            self.assertIs(type(side.connection.lost("cut")), AuthenticationFailed)

    def test_out_of_order(self):
        """A method that the state does not allow is an error of the peer's; that is every one not in the table."""
        opens = {State.HEADER_SENT: [], State.STARTING: [START], State.OPENING: [START, TUNE],
                 State.OPEN: [START, TUNE, OPEN_OK]}  # fmt: skip
        samples = {
            "connection.start": START,
            "connection.secure": method(0, "connection.secure", "?"),
            "connection.tune": TUNE,
            "connection.open-ok": OPEN_OK,
            "connection.close-ok": method(0, "connection.close-ok"),
            "connection.blocked": method(0, "connection.blocked", "x"),
            "connection.unblocked": method(0, "connection.unblocked"),
            "connection.open": method(0, "connection.open", "", "", False),
            "basic.ack": method(0, "basic.ack", 1, False),
        }
        allowed = {
            (State.HEADER_SENT, "connection.start"),
            (State.STARTING, "connection.secure"),
            (State.STARTING, "connection.tune"),
            (State.OPENING, "connection.open-ok"),
            (State.OPEN, "connection.blocked"),
            (State.OPEN, "connection.unblocked"),
        }
        for state, before in opens.items():
            for name, data in samples.items():
                if (state, name) in allowed:
                    continue
                with self.subTest(state=state, name=name):
                    side = Side()
                    side.receive(*before)
                    self.assertIs(side.connection.state, state)
                    self.assert_refused(side, data, name)
        side = Side()
        self.assert_refused(side, frame(2, 0, b"\0" * 20), "type 2")
        self.assert_refused(Side(), frame(1, 0, b"\0"), "type 1")
        self.assert_refused(Side(), frame(1, 0, b"\0\x0a\0\x0a\0\x09\xff"), "malformed")


class LoginTests(Case):
    def login(self, offered="PLAIN AMQPLAIN EXTERNAL", **config):
        side = Side(**config)
        events = side.receive(method(0, "connection.start", 0, 9, SERVER_PROPERTIES, offered, "en_US"))
        return events[0].error if events else side.read()[1].values[1:3]

    def test_order(self):
        """Without a method asked for, the first of PLAIN, AMQPLAIN and EXTERNAL that the server offers."""
        self.assertEqual(self.login(username="u", password="p"), ["PLAIN", "\0u\0p"])
        self.assertEqual(self.login("EXTERNAL AMQPLAIN")[0], "AMQPLAIN")
        self.assertEqual(self.login("EXTERNAL"), ["EXTERNAL", ""])

    def test_amqplain(self):
        """AMQPLAIN sends what py-amqp sends."""
        from amqp.sasl import AMQPLAIN

        response = self.login(login_method="AMQPLAIN", username="u\u00fc", password="p" * 300)[1]
        self.assertEqual(response.encode(), AMQPLAIN("u\u00fc", "p" * 300).start(None))

    def test_plain(self):
        """PLAIN sends what py-amqp sends."""
        from amqp.sasl import PLAIN

        response = self.login(login_method="PLAIN", username="u\u00fc", password="p\u00e4")[1]
        self.assertEqual(response.encode(), PLAIN("u\u00fc", "p\u00e4").start(None))

    def test_own_response(self):
        """A response of the program's own is sent for any method that the server offers."""
        answer = self.login("X-OURS PLAIN", login_method="X-OURS", login_response=b"sesame")
        self.assertEqual(answer, ["X-OURS", "sesame"])

    def test_none_in_common(self):
        """Without a common method the error names both sides' methods."""
        error = self.login("GSSAPI RABBIT-CR-DEMO")
        self.assertIs(type(error), AuthenticationFailed)
        self.assertIn("offers GSSAPI, RABBIT-CR-DEMO, this side PLAIN, AMQPLAIN, EXTERNAL", str(error))
        self.assertIn("this side EXTERNAL", str(self.login("PLAIN", login_method="EXTERNAL")))
        self.assertIn("offers none", str(self.login("")))

    def test_unsupported(self):
        """A method that needs more than a user and a password is refused before anything is sent."""
        error = self.login("GSSAPI PLAIN", login_method="GSSAPI")
        self.assertIs(type(error), AuthenticationFailed)
        self.assertIn("GSSAPI", str(error))

    def test_password_callable(self):
        """A password that is a callable is asked for once for each attempt; what it raises fails the attempt."""
        passwords = iter(["one", "two"])
        config = {"username": "u", "password": lambda: next(passwords)}
        self.assertEqual(self.login(**config)[1], "\0u\0one")
        self.assertEqual(self.login(**config)[1], "\0u\0two")
        error = self.login(**config)
        self.assertIs(type(error), AuthenticationFailed)
        self.assertIn("StopIteration", str(error))

    def test_challenge(self):
        """A server that asks for a second response gets none."""
        side = Side()
        side.receive(START)
        self.assert_refused(
            side, method(0, "connection.secure", "?"), "more than one response", AuthenticationFailed
        )

    def test_password_is_not_shown(self):
        """The configuration can be logged."""
        self.assertNotIn("secret", repr(ConnectionConfig(password="secret", login_response=b"secret")))


class ChannelTests(Case):
    def test_numbers(self):
        """Numbers count up, and one is used again only after its close was answered."""
        side = Side(channel_max=2).opened(1)
        self.assertEqual(side.connection.open_channel(), 2)
        self.assertRaises(LocalProtocolError, side.connection.open_channel)
        side.connection.close_channel(1)
        self.assertRaises(LocalProtocolError, side.connection.open_channel)
        self.assertEqual(
            side.receive(method(1, "channel.close-ok")), [MethodReceived(1, methods.CHANNEL_CLOSE_OK, [])]
        )
        self.assertEqual(side.connection.open_channel(), 1)

    def test_only_on_open_connections(self):
        """There are no channels on a connection that is not open."""
        side = Side()
        self.assertRaises(LocalProtocolError, side.connection.open_channel)
        side.opened()
        side.connection.close()
        self.assertRaises(LocalProtocolError, side.connection.open_channel)

    def test_closed_by_server(self):
        """A close of the server's is answered, told, and frees the number, also before the channel was open."""
        for before in ((1,), ()):
            side = Side(channel_max=1).opened(*before)
            if not before:
                side.connection.open_channel()
                side.read()
            events = side.receive(method(1, "channel.close", 404, "NOT_FOUND - no queue 'q'", 50, 10))
            self.assertEqual(events, [ChannelClosed(1, 404, "NOT_FOUND - no queue 'q'")])
            self.assertEqual(side.read(), [(1, "channel.close-ok", [])])
            self.assertEqual(side.connection.open_channel(), 1)

    def test_closing_drops_frames(self):
        """Whatever comes for a channel that we are closing is dropped, half a message included."""
        side = Side().opened(1, 2)
        side.receive(DELIVER)
        side.connection.close_channel(1)
        side.read()
        self.assertEqual(
            side.receive(content(1, b"x" * 10), DELIVER, content(1, b"y"), method(1, "basic.ack", 1, False)),
            [],
        )
        self.assertEqual(
            [
                type(event)
                for event in side.receive(method(2, "basic.deliver", "t", 1, False, "", ""), content(2, b""))
            ],
            [Delivery],
        )

    def test_both_close_at_once(self):
        """A close that crosses ours is answered; ours still has to be."""
        side = Side(channel_max=1).opened(1)
        side.connection.close_channel(1)
        side.read()
        self.assertEqual(side.receive(method(1, "channel.close", 404, "gone", 0, 0)), [])
        self.assertEqual(side.read(), [(1, "channel.close-ok", [])])
        self.assertRaises(LocalProtocolError, side.connection.open_channel)
        side.receive(method(1, "channel.close-ok"))
        self.assertEqual(side.connection.open_channel(), 1)

    def test_flow(self):
        """channel.flow is answered in kind."""
        side = Side().opened(1)
        for active in (False, True):
            self.assertEqual(side.receive(method(1, "channel.flow", active)), [])
            self.assertEqual(side.read(), [(1, "channel.flow-ok", [active])])

    def test_answers(self):
        """Answers go out as they are."""
        side = Side().opened(1)
        (event,) = side.receive(method(1, "queue.declare-ok", "q", 5, 2))
        self.assertEqual(event, MethodReceived(1, methods.QUEUE_DECLARE_OK, ["q", 5, 2]))

    def test_confirms(self):
        """Acks and nacks, one or many."""
        side = Side().opened(1)
        self.assertEqual(
            side.receive(method(1, "basic.ack", 2**40, True), method(1, "basic.nack", 3, False, True)),
            [Acked(1, 2**40, True, True), Acked(1, 3, False, False)],
        )

    def test_impossible_frames(self):
        """Frames that no server may send end the connection."""
        for data, text in (
            (method(9, "basic.ack", 1, False), "channel 9, which does not exist"),
            (frame(1, 1, b"\0\x3c"), "without a method"),
            (method(1, "queue.declare", 0, "q", 0, 0, 0, 0, 0, None), "queue.declare on channel 1"),
            (frame(1, 1, b"\0\x5a\0\x0b"), "90.11 on channel 1"),
            (frame(1, 1, b"\0\x3c\0\x50\0\0"), "malformed basic.ack"),
            (frame(1, 1, b"\0\x3c\0\x3c\0\0"), "malformed basic.deliver"),
            (frame(1, 1, b"\0\x3c\0\x32\0"), "malformed basic.return"),
            (content(1, b"x"), "without its method"),
            (frame(3, 1, b"x"), "without its method"),
            (DELIVER + frame(3, 1, b"x"), "without its header"),
            (DELIVER + DELIVER, "middle of a message"),
            (DELIVER + frame(2, 1, b"\0\x3c\0\0" + bytes(9)), "malformed content header"),
            (DELIVER + frame(2, 1, b"\0\x3b\0\0" + bytes(10)), "class 59"),
            (DELIVER + content(1, b"xy")[:-10] + content(1, b"xy"), "second content header"),
            (DELIVER + content(1, b"")[:-1] + b"\xcd", "end octet"),
            (
                DELIVER + frame(2, 1, pack(">HHQH", 60, 0, 2, 0)) + frame(3, 1, b"xyz"),
                "longer than its header",
            ),
            (frame(4, 0, b""), "does not speak AMQP"),
            (pack(">BHI", 1, 0, 131065), "longer than the 131072"),
        ):
            with self.subTest(text=text):
                side = Side().opened(1)
                self.assert_refused(side, data, text)
        side = Side().opened()
        side.connection.open_channel()
        self.assert_refused(side, method(1, "basic.ack", 1, False), "not open yet")


class ContentTests(Case):
    def test_deliver(self):
        """A delivery carries its method, properties, headers and body."""
        side = Side().opened(1)
        (delivery,) = side.receive(DELIVER, content(1, b"body", {"correlation_id": "c"}, {"h": [1]}))
        self.assertIs(type(delivery), Delivery)
        self.assertEqual(
            (delivery.channel, delivery.consumer_tag, delivery.delivery_tag, delivery.redelivered),
            (1, "me", 7, True),
        )
        self.assertEqual((delivery.exchange, delivery.routing_key), ("ex", "key"))
        self.assertEqual(delivery.properties, {"correlation_id": "c"})
        self.assertEqual((delivery.headers, delivery.body), ({"h": [1]}, b"body"))
        (delivery,) = side.receive(DELIVER, content(1, b"", None, {"h": 2}))
        self.assertEqual((delivery.headers, delivery.properties, delivery.body), ({"h": 2}, {}, b""))

    def test_get_and_return(self):
        """The answer to a get and a returned message carry contents, too."""
        side = Side().opened(1)
        got, returned = side.receive(
            method(1, "basic.get-ok", 4, False, "ex", "key", 10),
            content(1, b"got"),
            method(1, "basic.return", 312, "NO_ROUTE", "ex", "nowhere"),
            content(1, b"back", {"message_id": "m"}),
        )
        self.assertEqual((type(got), got.delivery_tag, got.consumer_tag, got.body), (Got, 4, "", b"got"))
        self.assertEqual((type(returned), returned.code, returned.text), (Returned, 312, "NO_ROUTE"))
        self.assertEqual((returned.routing_key, returned.properties), ("nowhere", {"message_id": "m"}))

    def test_split_bodies(self):
        """Bodies come in frames of any size, empty ones included, and interleave between channels."""
        side = Side().opened(1, 2)
        one = [frame(3, 1, part) for part in (b"a", b"", b"bc", b"d")]
        two = [frame(3, 2, part) for part in (b"A", b"BC", b"", b"D")]
        head = frame(2, 1, pack(">HHQH", 60, 0, 4, 0))
        other = frame(2, 2, pack(">HHQH", 60, 0, 4, 0))
        events = side.receive(DELIVER, method(2, "basic.deliver", "t", 1, False, "", ""), head, other)
        for first, second in zip(one, two, strict=True):
            events += side.receive(first, HEARTBEAT, second)
        self.assertEqual([(event.channel, event.body) for event in events], [(1, b"abcd"), (2, b"ABCD")])

    def test_limit(self):
        """A message as large as the limit is taken; of one that is larger only the body is not, and the next is whole again."""
        side = Side(max_body_size=100).opened(1)
        one, two, three = side.receive(
            DELIVER,
            content(1, b"x" * 100),
            DELIVER,
            content(1, b"x" * 101),
            DELIVER,
            content(1, b"y"),
        )
        self.assertEqual((one.body, one.oversize), (b"x" * 100, 0))
        self.assertEqual((two.body, two.oversize), (b"", 101))
        self.assertEqual((three.body, three.oversize), (b"y", 0))

    def test_endless(self):
        """A message of absurd size costs no memory, however much of it comes."""
        side = Side().opened(1)
        side.receive(DELIVER, frame(2, 1, pack(">HHQH", 60, 0, 2**63, 0)))
        self.assertEqual(side.receive(frame(3, 1, b"x" * 60_000) * 5), [])
        self.assertEqual(side.connection._channels[1].chunks, [])

    def test_nonsense_in_headers(self):
        """Headers are looked at when they are asked for; nonsense there is an error of the peer's."""
        side = Side().opened(1)
        (delivery,) = side.receive(DELIVER, frame(2, 1, pack(">HHQHI", 60, 0, 0, 0x2000, 99)))
        for _ in range(2):
            self.assertRaises(RemoteProtocolError, lambda: delivery.headers)
            self.assertRaises(RemoteProtocolError, lambda: delivery.properties)


class BlockedTests(Case):
    def test_blocked(self):
        """RabbitMQ's alarms are told."""
        side = Side().opened()
        self.assertEqual(
            side.receive(method(0, "connection.blocked", "low on memory"), method(0, "connection.unblocked")),
            [Blocked("low on memory"), Unblocked()],
        )


class CloseTests(Case):
    def test_orderly(self):
        """Close, close-ok, and what comes between them is dropped."""
        side = Side().opened(1)
        side.receive(DELIVER)
        side.connection.close()
        self.assertEqual(side.read(), [(0, "connection.close", [200, "", 0, 0])])
        self.assertEqual(
            side.receive(content(1, b"x"), method(0, "connection.blocked", ""), frame(3, 5, b""), HEARTBEAT),
            [],
        )
        self.assertEqual(
            side.receive(method(0, "connection.close-ok"), DELIVER), [Closed(None, orderly=True)]
        )

    def test_both_close_at_once(self):
        """A close that crosses ours is answered and ends the connection as asked."""
        side = Side().opened()
        side.connection.close()
        side.read()
        self.assertEqual(
            side.receive(method(0, "connection.close", 320, "bye", 0, 0)), [Closed(None, orderly=True)]
        )
        self.assertEqual(side.read(), [(0, "connection.close-ok", [])])

    def test_abandon(self):
        """What a handler gives up is given up at once, also for the rest of the bytes at hand."""
        side = Side().opened(1)
        events = []
        for event in side.connection.receive_data(method(1, "basic.ack", 1, False) * 3):
            events.append(event)
            side.connection.abandon()
        self.assertEqual(len(events), 1)
        self.assertEqual(side.receive(b"anything at all"), [])

    def test_channel_closed_by_a_handler(self):
        """A channel that a handler closes is closed for the rest of the bytes at hand."""
        side = Side().opened(1)
        events = []
        for event in side.connection.receive_data(method(1, "basic.ack", 1, False) * 3):
            events.append(event)
            side.connection.close_channel(1)
        self.assertEqual(len(events), 1)


def visible(event):
    """Everything that an event says."""
    if isinstance(event, Content):
        return (type(event), event.channel, event.exchange, event.routing_key, event.properties, event.headers,
                event.body)  # fmt: skip
    return event


CONVERSATION = [
    START,
    TUNE,
    OPEN_OK,
    method(1, "channel.open-ok"),
    HEARTBEAT,
    method(1, "queue.declare-ok", "q", 5, 2),
    DELIVER + content(1, b"a body", {"priority": 3}, {"k": None}),
    DELIVER + content(1, b"x" * 10000, room=4088),
    method(1, "basic.ack", 1, True),
    method(0, "connection.blocked", "why"),
    method(1, "basic.return", 312, "NO_ROUTE", "", "q") + content(1, b""),
    method(1, "channel.close", 404, "NOT_FOUND", 0, 0),
    method(0, "connection.close", 320, "bye", 0, 0),
]


def converse(side, pieces):
    """Play pieces of the conversation, opening a channel when the connection is open."""
    events = []
    for piece in pieces:
        for event in side.connection.receive_data(piece):
            events.append(visible(event))
            if isinstance(event, Opened):
                side.connection.open_channel()
    return events


class PiecesTests(Case):
    def test_byte_by_byte(self):
        """A conversation that comes byte by byte, or in one piece, amounts to the same."""
        whole = b"".join(CONVERSATION)
        expected = converse(Side(), CONVERSATION)
        self.assertEqual(len(expected), 10)
        self.assertEqual(
            repr(converse(Side(), [whole[at : at + 1] for at in range(len(whole))])), repr(expected)
        )
        self.assertEqual(repr(converse(Side(), [whole])), repr(expected))

    @given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
    @settings(max_examples=30)
    def test_any_pieces(self, sizes):
        """So do pieces of any sizes."""
        whole = b"".join(CONVERSATION)
        pieces, at, turn = [], 0, 0
        while at < len(whole):
            size = sizes[turn % len(sizes)]
            pieces.append(whole[at : at + size])
            at, turn = at + size, turn + 1
        self.assertEqual(repr(converse(Side(), pieces)), repr(converse(Side(), CONVERSATION)))

    def test_trickled_frame_is_not_copied_again_and_again(self):
        """While a frame is incomplete its beginning is only added to."""
        looked = []

        class Rest(bytearray):
            def clear(self):
                looked.append(len(self))
                super().clear()

        side = Side().opened(1)
        side.receive(DELIVER)
        data = content(1, b"x" * 100000)
        side.receive(data[:50])
        kept = side.connection._rest = Rest(side.connection._rest)
        for at in range(50, len(data) - 1, 1000):
            side.receive(data[at : min(at + 1000, len(data) - 1)])
        self.assertEqual(len(side.receive(data[-1:])), 1)
        self.assertEqual((len(looked), len(kept)), (1, 0))


class HostileTests(Case):
    def survive(self, side, data):
        """The bytes amount to events, of which only the last may be an error, and it is a proper one."""
        events = []
        for event in side.connection.receive_data(data):
            events.append(event)
            if isinstance(event, Content):
                with contextlib.suppress(RemoteProtocolError):
                    visible(event)
        for event in events[:-1]:
            self.assertNotIsInstance(event, Closed)
        if events and isinstance(events[-1], Closed) and not events[-1].orderly:
            self.assertIsInstance(events[-1].error, RemoteProtocolError | AuthenticationFailed)
        self.assertLessEqual(len(side.connection._rest), 131072)

    @given(st.binary(max_size=300))
    def test_random_bytes(self, data):
        """Random bytes, in every state, end in a protocol error or in nothing."""
        for before in ([], [START], [START, TUNE], [START, TUNE, OPEN_OK]):
            side = Side()
            side.receive(*before)
            self.survive(side, data)

    @given(st.sampled_from([1, 2, 3, 8]), st.integers(0, 2), st.binary(max_size=100))
    def test_random_frames(self, kind, number, payload):
        """So do well-formed frames of nonsense."""
        side = Side().opened(1)
        self.survive(side, frame(kind, number, payload))
        side = Side().opened(1)
        self.survive(side, DELIVER + frame(kind, number, payload))

    @given(st.sampled_from(sorted(methods.METHODS)), st.integers(0, 1), st.binary(max_size=60))
    def test_random_arguments(self, number, channel, arguments):
        """So do methods with nonsense for arguments."""
        side = Side().opened(1)
        self.survive(side, frame(1, channel, pack(">I", number) + arguments))

    @given(st.integers(0, len(b"".join(CONVERSATION)) - 1), st.integers(0, 255))
    @settings(max_examples=300)
    def test_mutated_conversation(self, at, value):
        """So does a conversation with one byte changed."""
        data = bytearray(b"".join(CONVERSATION))
        data[at] = value
        side = Side()
        for event in side.connection.receive_data(bytes(data)):
            if isinstance(event, Opened):
                side.connection.open_channel()
            if isinstance(event, Closed) and not event.orderly:
                self.assertIsInstance(event.error, RemoteProtocolError | AuthenticationFailed)

    def test_empty_bodies_for_ever(self):
        """Empty body frames without end take no memory."""
        side = Side().opened(1)
        side.receive(DELIVER, frame(2, 1, pack(">HHQH", 60, 0, 5, 0)))
        self.assertEqual(side.receive(frame(3, 1, b"") * 10000), [])
        self.assertEqual(side.connection._channels[1].chunks, [])
