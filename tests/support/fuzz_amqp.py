"""Random runs against an AMQP server that does what it likes; see `fuzz`."""

from __future__ import annotations

import json
from collections import deque
from functools import partial
from typing import Any

from celery import Celery

from tests.support.amqp_peer import SERVER_PROPERTIES, Seen, content, frame, method, split
from tests.support.fuzz import Attempt, Call, Link, World
from twistedcelery._operations import BindQueue, DeclareExchange, DeclareQueue, Entity, Publish
from twistedcelery.amqp.broker import AMQPBroker
from twistedcelery.amqp.codec import HEARTBEAT
from twistedcelery.amqp.protocol import AMQPProtocol, ConnectionConfig
from twistedcelery.amqp.results import ReplyQueue

__all__ = ["AMQPWorld"]

URLS = ("amqp://10.0.0.1", "amqp://10.0.0.2")
_REPLIED: Any = Celery("proj", broker="amqp://", backend="rpc://", set_as_current=False).backend
#: What a server may say of a message or a declaration when it closes the channel, and the connection.
_CHANNEL_ERRORS = (
    (404, "NOT_FOUND - no exchange 'x' in vhost '/'"),
    (406, "PRECONDITION_FAILED"),
    (403, "ACCESS_REFUSED"),
)
_CONNECTION_ERRORS = ((320, "CONNECTION_FORCED", 0, 0), (503, "COMMAND_INVALID", 50, 10))
#: The same because of a message, and the method that it says it was: none, or basic.publish.
_FOR_A_MESSAGE = ((541, "INTERNAL_ERROR"), (501, "FRAME_ERROR"))
_NAMED = ((0, 0), (60, 40))
#: What is answered by a method of the same name with "-ok", and with what.
_OK: dict[str, Any] = {
    "exchange.declare": lambda values: (),
    "exchange.bind": lambda values: (),
    "queue.declare": lambda values: (values[1], 0, 0),
    "queue.bind": lambda values: (),
    "queue.delete": lambda values: (0,),
    "basic.qos": lambda values: (),
    "confirm.select": lambda values: (),
    "channel.open": lambda values: (),
}


class ServerChannel:
    """What the server knows of a channel."""

    def __init__(self) -> None:
        self.confirms = False
        self.published = 0
        #: Confirms that have not been sent.
        self.unconfirmed: list[int] = []
        #: The message that is coming in.
        self.message: list[Any] = []
        self.consumes = False
        self.tag = 0
        self.unacknowledged: dict[int, str] = {}
        #: Closed by the server, and not answered yet.
        self.closed = False


class AMQPLink(Link):
    world: AMQPWorld

    def __init__(self, world: AMQPWorld, protocol: AMQPProtocol) -> None:
        self.channels: dict[int, ServerChannel] = {}
        #: Whether nothing but a close is looked at any more.
        self.closing = False
        super().__init__(world, protocol)

    def say(self, channel: int, name: str, *values: object) -> None:
        self.coming += method(channel, name, *values)

    def take(self, data: bytes) -> None:
        for seen in split(data):
            if self.lost or self.deaf:
                return
            self.handle(seen)

    def handle(self, seen: Seen) -> None:
        name = seen.name
        if seen.channel == 0:
            self.handle_connection(name)
            return
        if self.closing:
            return
        if name == "channel.open":
            self.channels[seen.channel] = ServerChannel()
        channel = self.channels.get(seen.channel)
        if channel is None:
            return
        if name in ("channel.close", "channel.close-ok"):
            self.give_back(self.channels.pop(seen.channel))
            if name == "channel.close":
                self.say(seen.channel, "channel.close-ok")
            return
        if channel.closed:
            return
        if name in ("basic.publish", "content", "body"):
            channel.message.append(seen)
            if name == "body":
                self.handle_message(seen.channel, channel)
        elif name == "basic.ack":
            tag, multiple = seen.values
            for one in [one for one in channel.unacknowledged if one == tag or (multiple and one < tag)]:
                del channel.unacknowledged[one]
        elif not self.goes_wrong(seen.channel, channel):
            self.answer(seen, channel)

    def handle_connection(self, name: str) -> None:
        if name == "header":
            self.say(0, "connection.start", 0, 9, SERVER_PROPERTIES, "PLAIN", "en_US")
        elif name == "connection.start-ok":
            self.say(0, "connection.tune", 2047, 131072, 10)
        elif name == "connection.open":
            if self.world.goes_wrong():
                self.say(0, "connection.close", 530, "NOT_ALLOWED - vhost", 10, 40)
            else:
                self.say(0, "connection.open-ok")
        elif name == "connection.close":
            self.say(0, "connection.close-ok")
            self.closing = True
        elif name == "connection.close-ok":
            self.closing = True

    def answer(self, seen: Seen, channel: ServerChannel) -> None:
        world = self.world
        if seen.name == "confirm.select":
            channel.confirms = True
        if seen.name == "queue.declare" and seen.values[1] == "replies":
            passive = seen.values[2]
            if passive and not world.has_queue:
                self.close_channel(seen.channel, channel, 404, "NOT_FOUND - no queue 'replies' in vhost '/'")
                return
            world.has_queue = True
        if seen.name == "queue.declare":
            world.deleted.discard(("", seen.values[1]))
        elif seen.name == "queue.bind":
            world.deleted.discard(tuple(seen.values[2:4]))
        if seen.name == "channel.flow-ok":
            return
        if seen.name == "queue.declare" and seen.values[1] == "missing":
            self.close_channel(seen.channel, channel, 404, "NOT_FOUND - no queue 'missing' in vhost '/'")
        elif seen.name == "basic.consume" and not world.has_queue:
            self.close_channel(seen.channel, channel, 404, "NOT_FOUND - no queue 'replies' in vhost '/'")
        elif seen.name == "basic.consume":
            channel.consumes = True
            self.say(seen.channel, "basic.consume-ok", "me")
            world.deliver()
        elif seen.name == "basic.cancel":
            channel.consumes = False
            self.say(seen.channel, "basic.cancel-ok", "me")
        else:
            self.say(seen.channel, f"{seen.name}-ok", *_OK[seen.name](seen.values))

    def goes_wrong(self, number: int, channel: ServerChannel) -> bool:
        """Whether something else than an answer comes."""
        world = self.world
        if not world.goes_wrong():
            return False
        kind = world.rng.randrange(5)
        if kind < 2:
            self.close_channel(number, channel, *world.rng.choice(_CHANNEL_ERRORS))
        elif kind == 2:
            self.close(*self.world.rng.choice(_CONNECTION_ERRORS))
        elif kind == 3:
            self.lose()
        # Else never answered, though all else goes on.
        return True

    def close_channel(self, number: int, channel: ServerChannel, code: int, text: str) -> None:
        channel.closed = True
        self.say(number, "channel.close", code, text, 60, 40)

    def close(self, code: int, text: str, class_id: int, method_id: int) -> None:
        self.closing = True
        self.say(0, "connection.close", code, text, class_id, method_id)

    def handle_message(self, number: int, channel: ServerChannel) -> None:
        world = self.world
        publish, header, _ = channel.message
        channel.message = []
        properties = header.values[1]
        task_id = properties["correlation_id"]
        if task_id in world.guilty:
            self.close(*world.rng.choice(_FOR_A_MESSAGE), *world.rng.choice(_NAMED))
            return
        channel.published += 1
        if world.goes_wrong():
            kind = world.rng.randrange(5)
            if kind == 0:
                self.close_channel(number, channel, *world.rng.choice(_CHANNEL_ERRORS))
                return
            if kind == 1:
                # No word of the message.
                self.close(*_CONNECTION_ERRORS[0])
                return
            if kind == 2:
                self.say(number, "basic.nack", channel.published, False, False)
                return
            world.taken[task_id] += 1
            if kind == 3:
                self.lose()
            else:
                # Later.
                channel.unconfirmed.append(channel.published)
            return
        exchange, routing_key, mandatory = publish.values[1:4]
        if routing_key == "nowhere" or (exchange, routing_key) in world.deleted:
            if mandatory:
                self.say(number, "basic.return", 312, "NO_ROUTE", exchange, routing_key)
                self.coming += content(number, b"x", properties)
        else:
            world.taken[task_id] += 1
        channel.unconfirmed.append(channel.published)
        if not world.trouble or world.rng.random() < 0.7:
            self.confirm()

    def confirm(self) -> None:
        """Confirm what can be confirmed."""
        for number, channel in self.channels.items():
            if channel.closed or self.closing or not channel.unconfirmed:
                continue
            for tag in channel.unconfirmed:
                self.say(number, "basic.ack", tag, False)
            channel.unconfirmed = []

    def give_back(self, channel: ServerChannel) -> None:
        """What was not acknowledged comes again."""
        self.world.replies.extendleft(reversed(channel.unacknowledged.values()))
        channel.unacknowledged.clear()

    def lose(self, why: Exception | None = None) -> None:
        if not self.lost:
            for channel in self.channels.values():
                self.give_back(channel)
        super().lose(why)


class AMQPWorld(World):
    """Broker and results over one RabbitMQ."""

    def rooms(self) -> tuple[Any, Any]:
        rng = self.rng
        #: Whether the reply queue exists, and what is in it.
        self.has_queue = False
        self.replies: deque[str] = deque()
        #: Messages that the server closes the connection for, whenever it reads them; and how likely one is such a message.
        self.guilty: set[str] = set()
        self.guilt = rng.choice((0, 0, 0.03, 0.1))
        #: Exchanges and routing keys that have lost their queue.
        self.deleted: set[tuple[str, str]] = set()
        queue = Entity((DeclareQueue("q"),))
        bound = Entity((DeclareExchange("x"), DeclareQueue("q2"), BindQueue("q2", "x", "k")))
        vanishing = Entity((DeclareQueue("v", auto_delete=True),), cacheable=False)
        missing = Entity((DeclareQueue("missing", passive=True),))
        self.routes = [((), "", "q"), ((queue,), "", "q"), ((bound,), "x", "k"), ((vanishing,), "", "v"), ((), "x", "k"),
                       ((), "", "nowhere"), ((missing,), "", "missing")]  # fmt: skip
        servers = rng.choice((1, 1, 2))
        policy = rng.choice((lambda failures: 0.2, lambda failures: min(10.0, 0.2 * 1.8**failures)))
        common: dict[str, Any] = {
            "clock": self.clock,
            "round_size": servers,
            "connect_timeout": 4.0,
            "retry_policy": policy,
        }
        broker = AMQPBroker(attempts=self.attempts(servers), **common)
        if servers == 2 or rng.random() < 0.2:
            return broker, None
        replies = ReplyQueue(
            attempts=self.attempts(servers),
            server=lambda: broker.url,
            publisher=lambda: broker.connection,
            queue="replies",
            expires=3600.0,
            accept=_REPLIED.accept,
            meta_from_decoded=_REPLIED.meta_from_decoded,
            **common,
        )
        return broker, replies

    def message(self, call: Call, number: int) -> Publish:
        message = super().message(call, number)
        if self.rng.random() < 0.1:
            # One that leaves on a channel of its own.
            message.properties["user_id"] = "u"
        if self.rng.random() < self.guilt:
            self.guilty.add(call.name)
        return message

    def check(self) -> None:
        """Nobody is refused for what another has done."""
        super().check()
        for call in self.calls.values():
            if "each time" in str(call.told[0]):
                assert call.name in self.guilty, (call.name, call.told)

    def goes_wrong(self) -> bool:
        """Whether what is done now is not done right."""
        return self.trouble and self.rng.random() < self.wrong

    def attempts(self, servers: int) -> Any:
        def make(url: str) -> AMQPLink:
            return AMQPLink(self, AMQPProtocol(ConnectionConfig(url=url, heartbeat=10), self.clock))

        made = [Attempt(self, partial(make, url), url) for url in URLS[:servers]]
        while True:
            yield from made

    def pass_time(self, seconds: float) -> None:
        while seconds > 0:
            super().pass_time(min(seconds, 2.5))
            seconds -= 2.5
            for link in self.links:
                assert isinstance(link, AMQPLink)
                if not link.lost and not link.deaf:
                    link.coming += HEARTBEAT
                    link.confirm()
                    link.move()

    def wait_for_many(self) -> None:
        """Replies come to the caller alone: call many tasks."""
        for _ in range(self.rng.randint(1, 60)):
            self.call()

    def finish(self, task_id: str) -> None:
        if self.has_queue:
            self.replies.append(task_id)
            self.deliver()

    def deliver(self) -> None:
        """Deliver the replies, where somebody consumes."""
        for link in self.links:
            assert isinstance(link, AMQPLink)
            for number, channel in link.channels.items():
                if channel.consumes and not (channel.closed or link.closing or link.deaf or link.lost):
                    while self.replies:
                        task_id = self.replies.popleft()
                        channel.tag += 1
                        channel.unacknowledged[channel.tag] = task_id
                        link.coming += method(
                            number, "basic.deliver", "me", channel.tag, False, "", "replies"
                        )
                        link.coming += content(number, self.reply(task_id), {"correlation_id": task_id, "content_type": "application/json", "content_encoding": "utf-8"})  # fmt: skip

    def reply(self, task_id: str) -> bytes:
        kind = self.rng.random() if self.trouble else 1.0
        if kind < 0.05:
            return b"rubbish"
        status = "STARTED" if kind < 0.2 else "SUCCESS"
        meta = {"status": status, "result": 3, "traceback": None, "task_id": task_id, "children": []}
        return json.dumps(meta).encode()

    def misbehave(self) -> None:
        """Queues are deleted; the connection is blocked, or not any more; channels are told to pause, and closed; nonsense comes."""
        rng = self.rng
        kind = rng.randrange(8)
        if not self.links:
            return
        link = rng.choice(self.links)
        assert isinstance(link, AMQPLink)
        if kind == 0:
            self.has_queue = False
            self.replies.clear()
            for each in self.links:
                assert isinstance(each, AMQPLink)
                for number, channel in each.channels.items():
                    if channel.consumes and not (channel.closed or each.closing):
                        channel.consumes = False
                        channel.unacknowledged.clear()
                        each.say(number, "basic.cancel", "me", True)
        elif kind == 1 and link.channels and not link.closing:
            link.say(0, "connection.blocked", "low on memory")
        elif kind == 2 and link.channels and not link.closing:
            link.say(0, "connection.unblocked")
        elif kind == 4:
            self.deleted.update(rng.sample([("", "q"), ("", "v"), ("x", "k")], 2))
        elif kind == 5 and not link.closing:
            for number, channel in link.channels.items():
                if not channel.closed:
                    link.say(number, "channel.flow", rng.random() < 0.5)
        elif kind == 6 and not link.closing:
            for number, channel in link.channels.items():
                if not channel.closed and rng.random() < 0.7:
                    link.close_channel(number, channel, *rng.choice(_CHANNEL_ERRORS))
        elif kind == 3 and rng.random() < 0.3:
            link.coming += rng.choice(
                (b"rubbish!", frame(1, 99, b"\0\0\0\0"), method(1, "basic.ack", 99, False))
            )

    def calm(self) -> None:
        super().calm()
        self.move_all()
        for link in self.links:
            if link.protocol.blocked is not None:
                assert isinstance(link, AMQPLink)
                link.say(0, "connection.unblocked")
