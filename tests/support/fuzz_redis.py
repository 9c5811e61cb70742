"""Random runs against a Redis that does what it likes; see `fuzz`."""

from __future__ import annotations

import base64
import json
from functools import partial
from typing import Any

from celery import Celery
from kombu.connection import Connection

from tests.support.fuzz import Attempt, Link, World
from tests.support.redis_peer import RedisPeer, array, bulk, push
from tests.support.redis_wires import Store
from twistedcelery._operations import BindQueue, DeclareExchange, DeclareQueue, Entity
from twistedcelery.redis.broker import RedisBroker
from twistedcelery.redis.connection import ConnectionConfig
from twistedcelery.redis.protocol import CommandProtocol, SubscriberProtocol
from twistedcelery.redis.reply_list import ReplyList
from twistedcelery.redis.results import RedisResults
from twistedcelery.redis.routing import Routing
from twistedcelery.redis.settings import broker_layout

__all__ = ["RedisWorld"]

URLS = ("redis://10.0.0.1:6379/0", "redis://10.0.0.2:6379/0")
_ERRORS = (
    b"-READONLY x\r\n", b"-LOADING x\r\n", b"-BUSY x\r\n", b"-NOPERM x\r\n", b"-OOM x\r\n", b"-NOAUTH x\r\n",
    b"-ERR x\r\n", b"-MISCONF x\r\n", b"-UNBLOCKED x\r\n",
)  # fmt: skip
_NONSENSE = (b":5\r\n", b"*1\r\n:5\r\n", b"+OK\r\n", b"$-1\r\n", b"*-1\r\n", b"*0\r\n", b"?!\r\n")
_LAYOUT = broker_layout(Connection("redis://"), 0)
_STORED: Any = Celery("proj", broker="redis://", backend="redis://", set_as_current=False).backend
_REPLIED: Any = Celery("proj", broker="redis://", backend="rpc://", set_as_current=False).backend
_PREFIX = b"celery-task-meta-"


class Server(Store):
    """What the server holds, and how often it has taken a message."""

    def __init__(self, world: RedisWorld) -> None:
        super().__init__()
        self.world = world

    def do_lpush(self, command: list[bytes]) -> bytes:
        self.world.taken[json.loads(command[2])["properties"]["correlation_id"]] += 1
        return super().do_lpush(command)

    def do_publish(self, command: list[bytes]) -> bytes:
        return b":1\r\n"

    def do_role(self, command: list[bytes]) -> bytes:
        return array(bulk(b"master"), b":0\r\n", array())


class Peer(RedisPeer):
    """One server-side connection. Its commands between MULTI and EXEC are carried out at EXEC, as Redis does it."""

    def __init__(self, link: RedisLink, store: Server) -> None:
        super().__init__(store.peer().answers)
        self.link = link
        self.transaction: list[list[bytes]] | None = None
        self.refused = False

    def answer(self, command: list[bytes]) -> bytes:
        name = command[0].upper()
        if (
            name == b"BRPOPLPUSH"
            and self.link.parked is None
            and not self.link.world.store.lists.get(command[1])
        ):
            # It waits; the run ends that.
            self.link.parked = command
            return b""
        if name == b"MULTI":
            self.transaction, self.refused = [], False
            return b"+OK\r\n"
        if name == b"EXEC" and self.transaction is not None:
            commands, self.transaction = self.transaction, None
            if self.refused:
                return b"-EXECABORT x\r\n"
            return array(*[self.carry_out(one) for one in commands])
        wrong = self.link.wrong(name)
        if wrong is not None:
            self.refused = self.transaction is not None
            return wrong
        if self.transaction is not None:
            self.transaction.append(command)
            return b"+QUEUED\r\n"
        return self.carry_out(command)

    def carry_out(self, command: list[bytes]) -> bytes:
        return self._reply(command[0].upper(), command)


class RedisLink(Link):
    world: RedisWorld

    def __init__(self, world: RedisWorld, protocol: Any) -> None:
        #: The blocking command that waits.
        self.parked: list[bytes] | None = None
        self.peer = Peer(self, world.store)
        super().__init__(world, protocol)

    def take(self, data: bytes) -> None:
        answers = self.peer.receive(data)
        rng = self.world.rng
        for answer in answers:
            if self.world.trouble and rng.random() < self.world.wrong / 4:
                # Carried out, and nobody hears of it.
                rng.choice((self.lose, self.fall_silent))()
                return
            self.coming += answer

    def fall_silent(self) -> None:
        self.deaf = self.world.trouble

    def wrong(self, name: bytes) -> bytes | None:
        world = self.world
        if not world.trouble or world.rng.random() >= world.wrong:
            return None
        if name not in world.targets and world.rng.random() < 0.7:
            return None
        return world.rng.choice(_ERRORS if world.rng.random() < 0.85 else _NONSENSE)

    def unpark(self) -> None:
        """Answer the blocking command: something has come, or its time is over."""
        command, self.parked = self.parked, None
        if command is not None and not self.deaf:
            self.coming += self.world.store.do_brpoplpush(command)


class RedisWorld(World):
    """Broker and results over one Redis."""

    writes = True

    def rooms(self) -> tuple[Any, Any]:
        rng = self.rng
        self.store = Server(self)
        #: Whether results are pushed, not only stored.
        self.pushing = rng.random() < 0.7
        #: The commands that go wrong more often than others.
        self.targets = set(
            rng.sample(
                [
                    b"MGET",
                    b"GET",
                    b"LPUSH",
                    b"SMEMBERS",
                    b"SADD",
                    b"LRANGE",
                    b"SUBSCRIBE",
                    b"PING",
                    b"SET",
                    b"DEL",
                ],
                2,
            )
        )
        queue = Entity((DeclareQueue("q"),))
        bound = Entity((DeclareExchange("x"), DeclareQueue("q2"), BindQueue("q2", "x", "k")))
        expiring = Entity(
            (
                DeclareExchange("x"),
                DeclareQueue("e", arguments={"x-expires": 5000}),
                BindQueue("e", "x", "e"),
            ),
            cacheable=False,
        )
        missing = Entity((DeclareQueue("missing", passive=True),))
        self.routes = [((), "", "q"), ((queue,), "", "q"), ((bound,), "x", "k"), ((expiring,), "x", "e"),
                       ((), "x", "nowhere"), ((missing,), "", "missing")]  # fmt: skip
        policy = rng.choice((lambda failures: 0.2, lambda failures: min(10.0, 0.2 * 1.8**failures)))
        servers = rng.choice((1, 1, 2))
        common: dict[str, Any] = {
            "clock": self.clock,
            "round_size": servers,
            "connect_timeout": 4.0,
            "retry_policy": policy,
        }
        broker = RedisBroker(
            attempts=self.attempts(CommandProtocol, servers), routing=lambda db: Routing(_LAYOUT), **common
        )
        if rng.random() < 0.6:
            self.writes = True
            results = RedisResults(
                commands=self.attempts(CommandProtocol, servers),
                subscriber=self.attempts(SubscriberProtocol, servers),
                backend=_STORED,
                **common,
            )
            return broker, results
        self.writes = False
        replies = ReplyList(
            attempts=self.attempts(CommandProtocol, 1),
            server=lambda: broker.url,
            queue="replies",
            key_of=lambda db, name: name,
            accept=_REPLIED.accept,
            meta_from_decoded=_REPLIED.meta_from_decoded,
            **{**common, "round_size": 1},
        )
        return broker, (replies if servers == 1 and rng.random() < 0.9 else None)

    def attempts(self, kind: Any, servers: int) -> Any:
        rng = self.rng

        def make(url: str) -> RedisLink:
            config = ConnectionConfig(
                url=url,
                silence_timeout=5.0,
                ping_interval=rng.choice((0, 3.0)),
                master_only=rng.random() < 0.2,
            )
            return RedisLink(self, kind(config, self.clock))

        made = [Attempt(self, partial(make, url), url) for url in URLS[:servers]]
        while True:
            yield from made

    def pass_time(self, seconds: float) -> None:
        super().pass_time(seconds)
        for link in self.links:
            if isinstance(link, RedisLink):
                link.unpark()

    def finish(self, task_id: str) -> None:
        meta = {"status": "SUCCESS", "result": 3, "traceback": None, "task_id": task_id, "children": []}
        if self.trouble and self.rng.random() < 0.3:
            meta["status"] = self.rng.choice(("STARTED", "FAILURE"))
            if meta["status"] == "FAILURE":
                meta["result"] = {"exc_type": "ValueError", "exc_message": ["no"], "exc_module": "builtins"}
        payload = json.dumps(meta).encode()
        if isinstance(self.source, ReplyList):
            envelope = {
                "body": base64.b64encode(payload).decode(),
                "content-type": "application/json",
                "content-encoding": "utf-8",
                "headers": {},
                "properties": {"correlation_id": task_id, "body_encoding": "base64"},
            }
            self.store.lists.setdefault(b"replies", []).insert(0, json.dumps(envelope).encode())
            return
        key = _PREFIX + task_id.encode()
        self.store.strings[key] = payload
        for link in self.links if self.pushing else ():
            assert isinstance(link, RedisLink)
            if key in link.peer.subscribed and not link.deaf:
                link.coming += push(b"message", key, payload)

    def misbehave(self) -> None:
        """What is stored is lost, or is no result; or somebody says something that nobody has asked for."""
        rng = self.rng
        what = rng.randrange(8)
        if what < 2:
            self.store.strings.clear()
        elif what < 7:
            self.store.strings[_PREFIX + self.any_name().encode()] = rng.choice((b"rubbish", b"{}", b"[]"))
        elif self.links:
            # Whoever is asked before and answered after it has the wrong answer: nobody could know.
            self.has_lied = True
            link = rng.choice(self.links)
            link.coming += rng.choice((b"-ERR bye\r\n", b"+what\r\n", push(b"message", b"c", b"x"), b"*"))
