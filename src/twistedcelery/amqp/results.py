"""Results over AMQP: Celery's ``rpc`` backend, one reply queue for all that this process waits for.

The queue is our own: a fresh name, durable, classic, neither exclusive nor auto-delete, so that it outlives a lost connection
(and a restart of RabbitMQ); it expires when nobody has consumed from it for a while, and is deleted at an orderly stop. Replies are
acknowledged in batches, after they were handed over: what was on its way when a connection broke comes again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from kombu.serialization import loads
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.logger import Logger

from .._inflate import InOrder
from .._keeper import Keeper
from .._limits import Limits
from .._undecodable import LeftOut, is_passing
from ..errors import ConnectionLost, Refused, RemoteProtocolError, ResultLost, ResultNotKept, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure

    from .._keeper import Attempt
    from .._operations import Write
    from ..errors import ConnectionFailed
    from ..interfaces import Done, Meta, ResultListener
    from .events import Delivery
    from .protocol import AMQPProtocol, Channel

__all__ = ["ReplyQueue"]

#: Seconds before the reply queue is asked for again where the server has refused it, or has refused us.
_RETRY = 10.0

#: Milliseconds that RabbitMQ takes for ``x-expires`` at most.
_LONGEST = 2**32 - 1

#: Replies that RabbitMQ may send before it has an acknowledgement.
_PREFETCH = 2000


class ReplyQueue:
    """See `twistedcelery.interfaces.ResultSource`.

    ``queue`` is the name of the reply queue, ``expires`` the seconds after which RabbitMQ deletes it when nobody
    consumes from it. ``server`` tells the URL of the server that is published to, and ``publisher`` the connection to it, or
    None: replies arrive where the calls go, and after an outage nothing leaves before the queue was looked for. ``accept`` and ``meta_from_decoded`` are those of the app's own backend.
    ``inflate_limit`` is the bytes that a compressed reply may have once it is decompressed.
    """

    #: A reply is delivered once; what is not kept here is nowhere.
    rereadable = False

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        attempts: Iterator[Attempt[AMQPProtocol]],
        round_size: int,
        connect_timeout: float | None,
        retry_policy: Callable[[int], float],
        siblings: list[Keeper[Any]] | None = None,
        *,
        server: Callable[[], str],
        publisher: Callable[[], object],
        queue: str,
        expires: float,
        accept: Any,
        meta_from_decoded: Callable[[Meta], Meta],
        inflate_limit: int = Limits.inflate,
    ) -> None:
        self._clock = clock
        self._keeper: Keeper[AMQPProtocol] = Keeper(
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
        self._round_size = round_size
        #: Connections in a row that ended before they could be used.
        self._useless = 0
        self._server = server
        self._publisher = publisher
        self.queue = queue
        self._milliseconds = min(max(1, int(expires * 1000)), _LONGEST)
        self._accept = accept
        self._meta_from_decoded = meta_from_decoded
        self._connection: AMQPProtocol | None = None
        #: The channel that consumes, once it does.
        self._channel: Channel | None = None
        #: The opening of the channel, while it goes on.
        self._opening: Deferred[None] | None = None
        self._again: IDelayedCall | None = None
        #: The server where the queue was declared last.
        self._declared_at: str | None = None
        #: The publishing connection that was there when the queue was. Over this one messages may leave, also while ours is down.
        self._known_to: object = None
        self._waiting: list[Done] = []
        self._last_tag = 0
        self._acknowledging: IDelayedCall | None = None
        self._left_out = LeftOut(self._log)
        self._inflating = InOrder(clock, inflate_limit)
        self._stopped = False

    @property
    def url(self) -> str:
        """The server in use or tried last."""
        return self._keeper.url or ""

    def listen(self, listener: ResultListener) -> None:
        """Say whom to tell."""
        self._listener = listener

    def prepare(self, done: Done) -> bool:
        """Whether the reply queue exists where the message goes."""
        server, connection, publisher = self._server(), self._connection, self._publisher()
        there = self._declared_at == server
        if there and self._channel is not None:
            self._known_to = publisher
            return True
        there = there and publisher is self._known_to
        if not there:
            self._waiting.append(done)
        if connection is None:
            # It rests where it was refused for good.
            self._keeper.start()
        elif there:
            return True
        elif self.url != server:
            self._keeper.drop(
                ConnectionLost("the publishing connection has gone to another server", url=self.url)
            )
        elif self._opening is None and self._channel is None:
            self._open(connection)
        return there

    def _tell(self, error: Exception | None) -> None:
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            done(error)

    # The connection

    def _connected(self, connection: AMQPProtocol) -> None:
        self._connection = connection
        self._open(connection)

    def _disconnected(self, reason: Exception) -> None:
        self._connection = self._channel = None
        self._drop_acknowledgement()
        self._useless += 1
        if self._useless > self._round_size:
            self._useless = 0
            self._tell(ConnectionLost(f"results cannot be received: {reason}", url=self.url))

    def _round_failed(self, reason: ConnectionFailed) -> None:
        self._useless = 0
        if reason.permanent and self._declared_at is not None:
            # It has worked before, and results may be pending: go on, slowly.
            self._try_again()
        self._tell(ConnectionLost(f"results cannot be received: {reason}", url=self.url))

    def _try_again(self) -> None:
        if self._again is None and not self._stopped:
            self._again = self._clock.callLater(_RETRY, self._again_now)

    def _again_now(self) -> None:
        self._again = None
        if self._connection is None:
            self._keeper.start()
        elif self._opening is None and self._channel is None:
            self._open(self._connection)

    def _open(self, connection: AMQPProtocol) -> None:
        opening = self._opening = Deferred.fromCoroutine(self._consume(connection))

        def opened(result: object) -> object:
            if self._opening is opening:
                self._opening = None
            return result

        opening.addBoth(opened).addCallbacks(
            lambda _: self._tell(None), self._not_consuming, errbackArgs=(connection,)
        )

    async def _consume(self, connection: AMQPProtocol) -> None:
        """Declare the queue and consume from it."""
        if self._declared_at is not None:
            # After a reconnect: whether the queue is the old one decides about what is pending.
            channel = await connection.open_channel()
            try:
                await channel.declare_queue(self.queue, passive=True)
            except Refused as error:
                if error.code != 404 or "down or inaccessible" in error.message:
                    # In a cluster the queue may be on a node that comes back.
                    raise
                # Nothing leaves meanwhile: what leaves later has its reply in the new queue.
                await self._vanished(f"the reply queue {self.queue} is gone: {error.message}")
            else:
                await channel.close()
        channel = await connection.open_channel()
        await channel.declare_queue(
            self.queue,
            durable=True,
            exclusive=False,
            auto_delete=False,
            arguments={"x-queue-type": "classic", "x-expires": self._milliseconds},
        )
        await channel.qos(_PREFETCH)
        self._last_tag = 0
        await channel.consume(
            self.queue,
            partial(self._received, channel),
            no_ack=False,
            on_cancel=lambda: self._consumer_cancelled(connection),
        )
        if connection is self._connection:
            channel.on_closed = self._channel_closed
            self._channel = channel
            # Not counted when it ends.
            self._useless = -1
            self._declared_at = self.url
            self._known_to = self._publisher()

    def _not_consuming(self, failure: Failure, connection: AMQPProtocol) -> None:
        error = failure.value
        assert isinstance(error, Exception)
        if connection is not self._connection or isinstance(error, ConnectionLost) or self._stopped:
            # The connection is lost; the next one begins again.
            return
        self._try_again()
        self._log.warn("results cannot be received over {url}: {error}", url=self.url, error=error)
        self._tell(error)

    def _vanished(self, why: str) -> Deferred[None]:
        self._declared_at = None
        return self._listener.results_lost(
            ResultLost(f"{why}; a result that was sent to it cannot be received", url=self.url)
        )

    def _consumer_cancelled(self, connection: AMQPProtocol) -> None:
        """RabbitMQ has deleted the queue, or moved it to another node."""
        channel, self._channel = self._channel, None
        self._drop_acknowledgement()
        if channel is not None:
            channel.on_closed = None
            channel.close().addErrback(lambda _: None)
        if connection is self._connection and not self._stopped:
            self._open(connection)

    def _channel_closed(self, reason: Exception) -> None:
        self._channel = None
        self._drop_acknowledgement()
        if self._connection is not None and isinstance(reason, Refused) and not self._stopped:
            self._log.warn("the channel of the reply queue was closed: {reason}", reason=reason)
            self._open(self._connection)

    # Replies

    def _received(self, channel: Channel, delivery: Delivery) -> None:
        try:
            compression = delivery.headers.get("compression") or None
        except RemoteProtocolError:
            compression = None  # what is wrong with them is found again
        if compression is None and self._inflating.idle:
            self._hand_over(channel, delivery, delivery.body)
        else:
            self._inflating.put(delivery.body, compression, partial(self._hand_over, channel, delivery))

    def _hand_over(self, channel: Channel, delivery: Delivery, body: Any) -> None:
        """Decode a reply; ``body`` is decompressed, or why it could not be."""
        if isinstance(body, Stopped):
            return
        if channel.is_open:
            # Else it comes again over the next one; there is nothing there to acknowledge it to.
            self._last_tag = delivery.delivery_tag
            if self._acknowledging is None:
                self._acknowledging = self._clock.callLater(0, self._acknowledge)
        task_id: Any = None
        properties: dict[str, Any] = {}
        try:
            properties = delivery.properties
            task_id = properties.get("correlation_id")
            if delivery.oversize:
                raise ValueError(f"it has {delivery.oversize} bytes, more than max_body_size allows")
            if isinstance(body, Exception):
                raise body
            meta = loads(  # type: ignore[no-untyped-call]
                body,
                properties.get("content_type"),
                properties.get("content_encoding"),
                accept=self._accept,
            )
            meta = self._meta_from_decoded(meta)
            if not (
                isinstance(meta["task_id"], str) and isinstance(meta["status"], str) and "result" in meta
            ):
                raise TypeError("it has no task id, no status or no result")
        except Exception as error:  # noqa: BLE001  # whatever a peer sends: refused content, not a result, an unknown class
            if task_id is not None and is_passing(body, properties.get("content_type")):
                self._left_out.tell(task_id, error)
            else:
                self._undecodable(task_id, error)
            return
        self._listener.meta_received(meta, len(body))

    def _undecodable(self, task_id: str | None, error: Exception) -> None:
        if task_id is None:
            self._log.warn("a reply without a correlation id was dropped: {error!r}", error=error)
            return
        failure = ResultNotKept(f"the reply is not a result: {error!r}", task_id=task_id, url=self.url)
        failure.__cause__ = error
        self._listener.result_failed(task_id, failure)

    def _acknowledge(self) -> None:
        self._acknowledging = None
        if self._channel is not None and self._channel.is_open:
            self._channel.ack(self._last_tag, multiple=True)

    def _drop_acknowledgement(self) -> None:
        if self._acknowledging is not None:
            self._acknowledging.cancel()
            self._acknowledging = None

    # As a ResultSource: what a queue of replies cannot do

    def watch(self, task_id: str) -> None:
        """Nothing to do: one queue brings the replies of all tasks."""

    def unwatch(self, task_id: str) -> None:
        """Nothing to do."""

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
        """Delete the queue, and close."""
        return Deferred.fromCoroutine(self._stop(timeout))

    async def _stop(self, timeout: float) -> None:
        end = self._clock.seconds() + timeout
        self._stopped = True
        self._inflating.stop()
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._opening is not None:
            # The queue is about to exist: it can be deleted only then.
            opened: Deferred[None] = Deferred()

            def tell(_: object) -> None:
                if not opened.called:
                    opened.callback(None)

            self._opening.addBoth(tell)
            try:
                await opened.addTimeout(timeout, self._clock)
            except DeferredTimeout:
                self._log.info("the reply queue {queue} was not opened in time", queue=self.queue)
        channel = self._channel
        if channel is not None and channel.is_open:
            channel.on_closed = None
            if self._acknowledging is not None:
                self._drop_acknowledgement()
                channel.ack(self._last_tag, multiple=True)
            try:
                await channel.delete_queue(self.queue).addTimeout(
                    max(0.0, end - self._clock.seconds()), self._clock
                )
            except (ConnectionLost, Refused, DeferredTimeout) as error:
                self._log.info(
                    "the reply queue {queue} was not deleted, it expires by itself: {error}",
                    queue=self.queue,
                    error=error,
                )
        self._tell(ConnectionLost("stopped", url=self.url))
        await self._keeper.stop(max(0.0, end - self._clock.seconds()))
        self._drop_acknowledgement()
