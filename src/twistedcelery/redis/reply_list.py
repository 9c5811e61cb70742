"""Celery's ``rpc`` results over a Redis broker: workers push replies to a list, which one connection waits for.

The list is our own, with a fresh name, as the reply queue is over AMQP. Nothing that was taken is lost with a connection: the reply that
is waited for (BRPOPLPUSH, as Redis 5 has it) moves to a second list, from which it goes when it has been handed over;
those behind it are read where they are, and removed after that. So a reply may come twice, and the second is not waited for any more.

While nobody waits for a result, nothing is asked. What arrives after the stop stays in Redis, as it does with stock Celery: the
workers that push it give it no expiry.
"""

from __future__ import annotations

from base64 import b64decode
from functools import partial
from typing import TYPE_CHECKING, Any

from kombu.serialization import loads
from kombu.utils.json import loads as loads_json
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.logger import Logger

from .._inflate import InOrder
from .._keeper import Keeper
from .._limits import Limits
from .._undecodable import LeftOut, is_passing
from ..errors import ConnectionLost, NotSent, ResultNotKept, Stopped
from .outcomes import outcome_of, passing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from .._keeper import Attempt
    from .._operations import Write
    from ..errors import ConnectionFailed
    from ..interfaces import Done, Meta, ResultListener
    from .protocol import CommandProtocol

__all__ = ["BLOCK", "ReplyList"]

#: Seconds that Redis keeps a connection waiting for a reply, so the longest that an orderly stop has to wait.
BLOCK = 1
#: Replies that are read, and decoded, at once: at first, and at most. What comes back is bounded by ``max_reply_size``.
_SMALL, _BATCH = 8, 64
#: Bytes of an answer beyond which fewer are read the next time.
_LARGE = 262_144
#: Seconds until a server is asked again that cannot answer now, and until one that has refused to.
_REST, _RETRY = 0.1, 10.0


class ReplyList:
    """See `twistedcelery.interfaces.ResultSource`.

    ``queue`` is the queue that workers reply to, ``key_of`` gives the list that it is for a database number. ``server`` tells
    the URL of the server that publishes: replies arrive where the calls go. ``accept`` and ``meta_from_decoded`` are
    those of the app's own backend. ``inflate_limit`` is the bytes that a compressed reply may have once it is decompressed.
    """

    #: A reply is delivered once; what is not kept here is nowhere.
    rereadable = False

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        attempts: Iterator[Attempt[CommandProtocol]],
        round_size: int,
        connect_timeout: float | None,
        retry_policy: Callable[[int], float],
        siblings: list[Keeper[Any]] | None = None,
        *,
        server: Callable[[], str],
        queue: str,
        key_of: Callable[[int, str], str],
        accept: Any,
        meta_from_decoded: Callable[[Meta], Meta],
        inflate_limit: int = Limits.inflate,
    ) -> None:
        self._clock = clock
        self._keeper: Keeper[CommandProtocol] = Keeper(
            clock=clock,
            attempts=attempts,
            round_size=round_size,
            connect_timeout=connect_timeout,
            retry_policy=retry_policy,
            on_connected=self._connected,
            on_disconnected=self._disconnected,
            on_round_failed=self._round_failed,
            name="consuming",
            siblings=siblings,
        )
        self._server = server
        self.queue = queue
        self._key_of = key_of
        self._accept = accept
        self._meta_from_decoded = meta_from_decoded
        self._connection: CommandProtocol | None = None
        self._key = self._taken = ""
        #: How many replies are read the next time.
        self._count = _SMALL
        #: How many tasks are waited for.
        self._watched = 0
        #: Whether an answer is due, or being handed over: whoever waits from then on needs not ask. There must not be
        #: two who read and remove.
        self._busy = False
        #: Whether an answer is due, or a question that waits for room; or some of an answer's replies are still being decompressed.
        self._due = False
        #: Whether what a connection before this one has left has been read.
        self._begun = False
        #: Whether a reply has moved to the second list.
        self._moved = False
        self._rest: IDelayedCall | None = None
        #: Asks again a server that has refused to be asked.
        self._again: IDelayedCall | None = None
        self._left_out = LeftOut(self._log)
        self._inflating = InOrder(clock, inflate_limit)
        self._stopped = False
        self._idle: Deferred[None] | None = None

    @property
    def url(self) -> str:
        """The server in use or tried last."""
        return self._keeper.url or ""

    def listen(self, listener: ResultListener) -> None:
        """Say whom to tell."""
        self._listener = listener

    def prepare(self, done: Done) -> bool:
        """Let every message leave: a list is there as soon as somebody pushes to it."""
        if self._connection is not None and self.url != self._server():
            self._keeper.drop(
                ConnectionLost("the publishing connection has gone to another server", url=self.url)
            )
        return True

    def watch(self, task_id: str) -> None:
        """Wait for replies."""
        self._watched += 1
        self._go_on()

    def unwatch(self, task_id: str) -> None:
        """Wait for one less."""
        self._watched -= 1

    # The connection

    def _connected(self, connection: CommandProtocol) -> None:
        self._connection = connection
        self._key = self._key_of(connection.config.db, self.queue)
        self._taken = f"{self._key}.taken"
        self._go_on()

    def _disconnected(self, reason: Exception) -> None:
        self._connection = None
        # It may have ended because the answer was too large for it.
        self._count = 1
        self._free()
        # What had not been asked yet, for want of room, has no answer that would tell.
        self._tell_idle()

    def _round_failed(self, reason: ConnectionFailed) -> None:
        if reason.permanent and self._watched:
            self._try_again()
            self._listener.results_lost(reason)

    def _go_on(self) -> None:
        """See that what is waited for is read."""
        if self._connection is None:
            if not self._stopped:
                self._keeper.start()
        elif not self._busy and self._rest is None:
            if self._begun:
                self._read()
            else:
                self._begin()

    def _rested(self) -> None:
        self._rest = None
        self._go_on()

    def _try_again(self) -> None:
        """See in a while whether the server has changed its mind: whose call has not left is not told, and waits on."""
        if self._again is None and not self._stopped:
            self._again = self._clock.callLater(_RETRY, self._again_now)

    def _again_now(self) -> None:
        self._again = None
        if self._watched:
            self._go_on()

    def _send(self, commands: list[tuple[Any, ...]], done: Callable[[list[Any]], None]) -> None:
        connection = self._connection
        if connection is None:
            return
        self._busy = self._due = True

        def answered(outcome: list[Any] | Exception) -> None:
            self._due = False
            if not isinstance(outcome, Exception) and not _fits(commands[-1], outcome[-1]):
                outcome = connection.misfit("to LRANGE or BRPOPLPUSH, something else than replies")
            if isinstance(outcome, Exception):
                self._busy = False
                self._failed(outcome)
            else:
                try:
                    done(outcome)
                finally:
                    self._busy = self._due
            self._tell_idle()

        if connection.writable:
            connection.send(commands, answered)
        else:
            # There is room again, or the connection ends: a server that answers without reading is asked no more.
            connection.on_writable = lambda: self._send_later(connection, commands, answered)

    def _send_later(self, connection: CommandProtocol, commands: list[tuple[Any, ...]], done: Any) -> None:
        connection.on_writable = None
        connection.send(commands, done)

    def _tell_idle(self) -> None:
        if not self._busy and self._idle is not None:
            idle, self._idle = self._idle, None
            idle.callback(None)

    def _failed(self, error: Exception) -> None:
        if passing(error):
            if not self._stopped and self._rest is None:
                self._rest = self._clock.callLater(_REST, self._rested)
        elif not isinstance(outcome_of(error), NotSent | ConnectionLost):
            self._log.warn("replies cannot be received from {url}: {error}", url=self.url, error=error)
            self._try_again()
            self._listener.results_lost(error)

    def _free(self) -> None:
        self._busy = self._due = self._begun = False
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    # Replies

    def _begin(self) -> None:
        """Read what a connection before this one has left."""
        self._moved = True
        self._send([("LRANGE", self._taken, 0, -1)], self._taken_before)

    def _taken_before(self, replies: list[Any]) -> None:
        self._begun = True
        self._hand_over(replies[-1], self._read)

    def _read(self, count: int = 0) -> None:
        """Remove those that were handed over, and read the oldest of the others."""
        commands: list[tuple[Any, ...]] = [("LRANGE", self._key, -self._count, -1)]
        if count:
            commands.insert(0, ("LTRIM", self._key, 0, -count - 1))
        if self._moved:
            commands.insert(0, ("DEL", self._taken))
            self._moved = False
        self._send(commands, self._were_there)

    def _were_there(self, replies: list[Any]) -> None:
        found = replies[-1]
        if found:
            large = sum(map(len, found)) > _LARGE
            self._count = max(1, self._count // 8) if large else min(_BATCH, self._count * 2)
            self._hand_over(found, partial(self._read, len(found)))
        elif self._watched and not self._stopped:
            self._send([("BRPOPLPUSH", self._key, self._taken, BLOCK)], self._came)

    def _came(self, replies: list[Any]) -> None:
        if replies[0] is not None:
            self._moved = True
            self._hand_over(replies, self._read)
        else:
            self._read()

    def _hand_over(self, replies: list[bytes], then: Callable[[], None]) -> None:
        """Hand them over, the oldest first; then go on, where the connection that they came over is still there."""
        for reply in reversed(replies):
            self._received(reply)
        if self._inflating.idle:
            then()
            return
        connection = self._connection
        self._due = True

        def handed_over(stopped: object) -> None:
            if connection is not self._connection or connection is None:
                return  # the next one begins anew
            self._due = False
            if not isinstance(stopped, Stopped):
                then()
            self._busy = self._due
            self._tell_idle()

        self._inflating.put(b"", None, handed_over)

    def _received(self, reply: bytes) -> None:
        task_id: Any = None
        envelope: Any = {}
        compression: Any = None
        body: Any
        try:
            envelope = loads_json(reply)  # type: ignore[no-untyped-call]
            properties = envelope["properties"]
            task_id = properties.get("correlation_id")
            body = envelope["body"]
            if properties.get("body_encoding") == "base64":
                body = b64decode(body)
            if not isinstance(body, bytes | str):
                raise TypeError(f"its body is {body!r:.40}")
            compression = (envelope.get("headers") or {}).get("compression") or None
        except Exception as error:  # noqa: BLE001  # whatever a peer sends
            body = error
        if compression is None and self._inflating.idle:
            self._decode(task_id, envelope, body)
        elif isinstance(body, Exception):
            self._inflating.put(b"", None, lambda _: self._decode(task_id, envelope, body))
        else:
            self._inflating.put(body, compression, partial(self._decode, task_id, envelope))

    def _decode(self, task_id: Any, envelope: Any, body: Any) -> None:
        """Decode a reply; ``body`` is decompressed, or why it could not be."""
        if isinstance(body, Stopped):
            return
        try:
            if isinstance(body, Exception):
                raise body
            meta = self._meta_from_decoded(
                loads(  # type: ignore[no-untyped-call]
                    body,
                    envelope.get("content-type"),
                    envelope.get("content-encoding"),
                    accept=self._accept,
                )
            )
            task_id = meta["task_id"]
            if not (isinstance(task_id, str) and isinstance(meta["status"], str) and "result" in meta):
                raise TypeError("it has no task id, no status or no result")
        except Exception as error:  # noqa: BLE001  # whatever a peer sends: refused content, not a result, an unknown class
            if isinstance(task_id, str) and is_passing(body, envelope.get("content-type")):
                self._left_out.tell(task_id, error)
            else:
                self._undecodable(task_id, error)
            return
        self._listener.meta_received(meta, len(body))

    def _undecodable(self, task_id: object, error: Exception) -> None:
        if not isinstance(task_id, str):
            self._log.warn("a reply without a correlation id was dropped: {error!r}", error=error)
            return
        failure = ResultNotKept(f"the reply is not a result: {error!r}", task_id=task_id, url=self.url)
        failure.__cause__ = error
        self._listener.result_failed(task_id, failure)

    # As a ResultSource: what a list of replies cannot do

    def fetch(self, task_id: str) -> Deferred[Meta | None]:
        """Know nothing beyond what has been delivered."""
        return succeed(None)

    def fetch_group(self, group_id: str) -> Deferred[Any]:
        """Refuse, as stock Celery does."""
        return fail(ResultNotKept("the rpc result backend does not keep groups", url=self.url))

    def forget(self, task_id: str) -> Deferred[None]:
        """Nothing is kept on the server."""
        return succeed(None)

    def write(self, write: Write, done: Done) -> None:
        """Refuse: there is nothing to write to."""
        done(ResultNotKept("the rpc result backend stores nothing", url=self.url))

    # Stopping

    def hand_over(self, timeout: float) -> Deferred[None]:
        """Wait for what is being decompressed."""
        return self._inflating.flush(timeout)

    def stop(self, timeout: float) -> Deferred[None]:
        """Delete the list, and close."""
        return Deferred.fromCoroutine(self._stop(timeout))

    async def _stop(self, timeout: float) -> None:
        end = self._clock.seconds() + timeout
        self._stopped = True
        self._inflating.stop()
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if self._again is not None:
            self._again.cancel()
            self._again = None
        try:
            if self._busy:
                self._idle = Deferred()
                await self._idle.addTimeout(timeout, self._clock)
            if self._connection is not None:
                deleting = self._connection.command("DEL", self._key, self._taken)
                await deleting.addTimeout(max(0.0, end - self._clock.seconds()), self._clock)
        except (ConnectionLost, NotSent, DeferredTimeout) as error:
            self._log.info("the replies in {queue} were not deleted: {error}", queue=self.queue, error=error)
        self._idle = None
        await self._keeper.stop(max(0.0, end - self._clock.seconds()))


def _fits(command: tuple[Any, ...], reply: Any) -> bool:
    """Whether this can be the answer to LRANGE, all that a list holds, or to BRPOPLPUSH, one item of it or none."""
    if command[0] == "BRPOPLPUSH":
        return reply is None or isinstance(reply, bytes)
    return isinstance(reply, list) and all(isinstance(one, bytes) for one in reply)
