"""Results in Redis, as Celery's own backend writes them: pushed by pub/sub, fetched where a push cannot have come.

A worker stores each state of a task under a key and publishes it to the channel of the same name, both in one transaction. All
waits share one connection that subscribes; another one fetches, and carries out what a client writes.

No result is missed: once the server has acknowledged a subscription, the key is read, so a state is either stored before
that and found, or published after it and pushed. It is the same after a reconnect. A push that the
server will not send (too large for its ``client-output-buffer-limit pubsub``, whereupon it closes the connection) is so
found under its key; a user who may not subscribe is served by reading alone. A slow poll
guards against what nobody thinks of.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from celery.backends import base
from celery.states import READY_STATES
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.logger import Logger

from .._inflate import InOrder
from .._keeper import Keeper
from .._limits import Limits
from .._undecodable import LeftOut, is_passing
from ..errors import ResultNotKept, Stopped
from .asking import Asker
from .fetching import Fetcher
from .outcomes import passing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from .._keeper import Attempt
    from .._operations import Write
    from ..errors import ConnectionFailed
    from ..interfaces import Done, Meta, ResultListener
    from .protocol import CommandProtocol, SubscriberProtocol

__all__ = ["PATIENCE", "POLL_INTERVAL", "RedisResults"]

#: Seconds for which a question is asked of a server that is away: those of Celery's own retry policy.
PATIENCE = 19.0

#: Seconds after which a result that was not pushed is looked for.
POLL_INTERVAL = 30.0

#: The same where the server does not push, or cannot be logged in to.
_POLL_QUICKLY = 1.0

#: Seconds until a server is asked again for a subscription that it cannot give now.
_REST = 0.1

#: What a compressed state begins with, followed by the content type of its compression and a NUL (``result_compression``); empty with
#: versions of Celery that compress none.
_COMPRESSED: bytes = getattr(base, "COMPRESSED_PAYLOAD_MAGIC", b"")

#: Bytes of that content type at most.
_NAME = 128

#: Bytes of a push that has not come to its end; if the connection ends then, this is most likely why.
_LARGE = 1_000_000


class RedisResults:
    """See `twistedcelery.interfaces.ResultSource`.

    ``commands`` and ``subscriber`` are the attempts for the two connections. ``backend`` is the app's own, for its keys and its
    decoder; none of its I/O is used. ``patience`` is the seconds for which a question is asked, ``inflate_limit`` the
    bytes that a compressed state may have once it is decompressed.
    """

    rereadable = True

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        commands: Iterator[Attempt[CommandProtocol]],
        subscriber: Iterator[Attempt[SubscriberProtocol]],
        round_size: int,
        connect_timeout: float | None,
        retry_policy: Callable[[int], float],
        siblings: list[Keeper[Any]] | None = None,
        *,
        backend: Any,
        patience: float = PATIENCE,
        inflate_limit: int = Limits.inflate,
        poll_interval: float = POLL_INTERVAL,
    ) -> None:
        self._clock = clock
        self._commands: Keeper[CommandProtocol] = Keeper(
            clock=clock,
            attempts=commands,
            round_size=round_size,
            connect_timeout=connect_timeout,
            retry_policy=retry_policy,
            on_connected=self._connected,
            on_disconnected=self._disconnected,
            on_round_failed=self._round_failed,
            name="result reading",
            siblings=siblings,
        )
        self._subscriber: Keeper[SubscriberProtocol] = Keeper(
            clock=clock,
            attempts=subscriber,
            round_size=round_size,
            connect_timeout=connect_timeout,
            retry_policy=retry_policy,
            on_connected=self._subscriber_connected,
            on_disconnected=self._subscriber_disconnected,
            on_round_failed=self._round_failed,
            name="result receiving",
            siblings=siblings,
        )
        self._backend = backend
        self._decode: Callable[[bytes], Any] = backend.decode_result
        self._prefix: bytes = backend.task_keyprefix
        self._poll_interval = poll_interval
        self._connection: CommandProtocol | None = None
        self._subscription: SubscriberProtocol | None = None
        #: Who is waited for, in the order of waiting, with the number of the poll before which that began.
        self._watched: dict[str, int] = {}
        #: Tasks with a state that is not final: those that were pushed over the present connection, and a hash of the newest.
        self._pushed: set[str] = set()
        self._seen: dict[str, int] = {}
        self._fetcher = Fetcher(
            clock,
            key_of=self._key_of,
            wanted=self._watched,
            found=self._fetched,
            refused=self._fetch_refused,
        )
        self._asker = Asker(clock, self._commands, patience=patience)
        self._polls = 0
        self._poll: IDelayedCall | None = None
        self._poll_due = 0.0
        #: Why the server does not push over the present connection, if so.
        self._forbidden: Exception | None = None
        #: Channels that a busy server could not be asked for, and the call that asks again.
        self._unsubscribed: list[bytes] = []
        self._resubscribing: IDelayedCall | None = None
        self._warned: set[str] = set()
        self._left_out = LeftOut(self._log)
        self._inflate_limit = inflate_limit
        self._inflating = InOrder(clock, inflate_limit)
        self._inflating.on_idle = self._catch_up
        #: Tasks with states that there was no room for behind those that are being decompressed: they stand in Redis, to be read.
        self._late: set[str] = set()
        self._stopped = False

    @property
    def url(self) -> str:
        """The server in use or tried last."""
        return self._commands.url or ""

    def listen(self, listener: ResultListener) -> None:
        """Say whom to tell."""
        self._listener = listener

    def prepare(self, done: Done) -> bool:
        """Let every message leave: a result that comes before the subscription is found."""
        return True

    def _key_of(self, task_id: str) -> bytes:
        return self._prefix + task_id.encode()

    def _warn_once(self, what: str, **details: Any) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._log.warn(what, **details)

    # Watching

    def watch(self, task_id: str) -> None:
        """Subscribe, then read."""
        try:
            key = self._key_of(task_id)
        except UnicodeEncodeError as error:
            # A lone surrogate: no key of Redis has such a name.
            refusal = ResultNotKept(f"{error}", url=self.url)
            self._clock.callLater(0, self._listener.result_failed, task_id, refusal)
            return
        self._watched[task_id] = self._polls
        subscription = self._subscription
        if subscription is None or self._connection is None:
            self._start()
        if self._forbidden is not None:
            self._fetcher.fetch((task_id,))
        elif subscription is not None:
            subscription.subscribe((key,))
        if self._poll is None:
            self._poll_after(self._pace)

    def unwatch(self, task_id: str) -> None:
        """Unsubscribe."""
        if self._watched.pop(task_id, None) is None:
            return
        if self._seen:
            self._seen.pop(task_id, None)
            self._pushed.discard(task_id)
        if self._forbidden is None and self._subscription is not None and not self._stopped:
            self._subscription.unsubscribe((self._prefix + task_id.encode(),))

    def _start(self) -> None:
        if not self._stopped:
            self._commands.start()
            self._subscriber.start()

    # The connections

    def _connected(self, connection: CommandProtocol) -> None:
        self._connection = connection
        connection.on_writable = lambda: self._fetcher.fetch(())
        self._asker.connected(connection)
        self._fetcher.connected(connection)
        if self._subscription is not None:
            # It may be another server than before, where results stand that were not pushed over that connection.
            self._fetcher.fetch_at_leisure(iter(list(self._watched)))

    def _disconnected(self, reason: Exception) -> None:
        self._connection = None
        self._asker.disconnected()
        self._fetcher.disconnected()

    def _subscriber_connected(self, subscription: SubscriberProtocol) -> None:
        self._subscription = subscription
        self._forbidden = None
        connection = subscription.connection
        connection.on_message = self._message
        connection.on_subscribed = self._subscribed
        connection.on_refused = self._subscription_refused
        subscription.resubscribe(self._channels(list(self._watched)))

    def _channels(self, task_ids: list[str]) -> Iterator[bytes]:
        """Give the channels of those who are still waited for when it is their turn."""
        return (self._key_of(task_id) for task_id in task_ids if task_id in self._watched)

    def _subscriber_disconnected(self, reason: Exception) -> None:
        assert self._subscription is not None
        if self._subscription.connection.partial > _LARGE:
            self._warn_once(
                "a large result was cut short on its way from {url}: {reason}. It will be fetched; what Redis pushes at "
                "once is bounded by its client-output-buffer-limit for pubsub",
                url=self.url,
                reason=reason,
            )
        self._subscription = self._forbidden = None
        self._stop_resubscribing()
        self._pushed.clear()

    def _round_failed(self, reason: ConnectionFailed) -> None:
        self._asker.failed(reason)
        if reason.permanent and self._watched:
            # Nothing will come of it by itself. Whoever waits on is told each time that another call has it tried again.
            self._listener.results_lost(reason)
            self._poll_after(_POLL_QUICKLY)

    # Pushes

    def _subscribed(self, channel: bytes) -> None:
        """Read what was stored before the subscription."""
        task_id = channel[len(self._prefix) :].decode()
        if task_id in self._watched:
            self._fetcher.fetch((task_id,))

    def _message(self, channel: bytes, payload: bytes) -> None:
        task_id = channel[len(self._prefix) :].decode()
        if task_id in self._watched:
            self._take(task_id, payload, self._subscription)

    def _subscription_refused(self, channels: list[bytes], error: Exception) -> None:
        """Serve without pushes, as a user without the right to them is served; or ask again, if the server is busy."""
        if passing(error):
            self._unsubscribed += channels
            if self._resubscribing is None:
                self._resubscribing = self._clock.callLater(_REST, self._subscribe_again)
            return
        self._forbidden = error
        self._warn_once(
            "{url} does not let this user subscribe to results, so they are fetched every {seconds:g} s: {error}",
            url=self.url,
            seconds=_POLL_QUICKLY,
            error=error,
        )
        self._fetcher.fetch([channel[len(self._prefix) :].decode() for channel in channels])
        self._poll_after(_POLL_QUICKLY)

    def _subscribe_again(self) -> None:
        if self._subscription is not None and not self._subscription.writable:
            # It has not read what it was asked before.
            self._resubscribing = self._clock.callLater(_REST, self._subscribe_again)
            return
        self._resubscribing = None
        channels, self._unsubscribed = self._unsubscribed, []
        start = len(self._prefix)
        if self._subscription is not None:
            self._subscription.subscribe(
                [channel for channel in channels if channel[start:].decode() in self._watched]
            )

    def _stop_resubscribing(self) -> None:
        self._unsubscribed = []
        if self._resubscribing is not None:
            self._resubscribing.cancel()
            self._resubscribing = None

    # States

    def _fetched(self, task_id: str, payload: bytes) -> None:
        self._take(task_id, payload, None)

    def _take(self, task_id: str, payload: bytes, pushed_by: SubscriberProtocol | None) -> None:
        """Take a state, which comes after all that are being decompressed."""
        compression, body = _compression(payload)
        inflating = self._inflating
        if compression is None and inflating.idle:
            self._received(task_id, body, pushed=pushed_by is not None)
        elif inflating.bytes > self._inflate_limit:
            self._late.add(task_id)
        else:
            inflating.put(body, compression, partial(self._inflated, task_id, pushed_by))

    def _inflated(self, task_id: str, pushed_by: SubscriberProtocol | None, body: Any) -> None:
        """Go on with a state that had to wait; ``body`` is decompressed, or why it could not be."""
        if task_id not in self._watched or isinstance(body, Stopped):
            return
        if isinstance(body, Exception):
            self._listener.result_failed(task_id, self._no_result(task_id, body))
        else:
            # A push counts as one for its own connection only.
            pushed = pushed_by is not None and pushed_by is self._subscription
            self._received(task_id, body, pushed=pushed)

    def _catch_up(self) -> None:
        late, self._late = self._late, set()
        self._fetcher.fetch([task_id for task_id in late if task_id in self._watched])

    async def _whole(self, payload: bytes) -> bytes:
        """Decompress an answer, when it is its turn; raises what that ends with."""
        compression, body = _compression(payload)
        if compression is None:
            return body
        waiting: Deferred[Any] = Deferred()
        self._inflating.put(body, compression, waiting.callback)
        whole: Any = await waiting
        if isinstance(whole, Exception):
            raise whole
        return _once(whole)

    def _no_result(self, task_id: str, error: Exception) -> ResultNotKept:
        failure = ResultNotKept(
            f"what stands in Redis for the task is not a result: {error!r}", task_id=task_id, url=self.url
        )
        failure.__cause__ = error
        return failure

    def _read(self, task_id: str, payload: bytes) -> Meta:
        """Decode a state; raises `ResultNotKept` where it is none."""
        try:
            meta: Meta = self._decode(_once(payload))
            if not isinstance(meta.get("status"), str) or "result" not in meta:
                raise TypeError("it has no status or no result")
            # The key says whose state it is.
            meta["task_id"] = task_id
            return meta
        except Exception as error:
            raise self._no_result(task_id, error) from error

    def _received(self, task_id: str, payload: bytes, *, pushed: bool) -> None:
        try:
            meta = self._read(task_id, payload)
        except ResultNotKept as error:
            if is_passing(payload, self._backend.content_type):
                # The final one decides.
                self._left_out.tell(task_id, error.__cause__)
            else:
                self._listener.result_failed(task_id, error)
            return
        if meta["status"] not in READY_STATES:
            mark = hash(payload)
            same = self._seen.get(task_id) == mark
            if not pushed:
                # Read before, and overtaken by, a push; or known from the connection before.
                if same or task_id in self._pushed:
                    return
            elif task_id in self._pushed:
                same = False  # a worker may say the same twice
            self._seen[task_id] = mark
            if pushed:
                self._pushed.add(task_id)
                if same:
                    return  # it was read before it was pushed
        self._listener.meta_received(meta)

    def _fetch_refused(self, task_ids: list[str], error: Exception) -> None:
        for task_id in task_ids:
            self._listener.result_failed(task_id, error)

    # The poll

    def _poll_after(self, seconds: float) -> None:
        if self._stopped:
            return
        due = self._clock.seconds() + min(seconds, self._poll_interval)
        if self._poll is not None:
            if self._poll_due <= due:
                return
            self._poll.cancel()
        self._poll_due = due
        self._poll = self._clock.callLater(min(seconds, self._poll_interval), self._look)

    def _look(self) -> None:
        """Fetch what should have been pushed by now, where the last look has been answered."""
        self._poll = None
        if not self._watched:
            return
        self._start()
        if self._fetcher.idle:
            self._polls += 1
            self._fetcher.fetch_at_leisure(self._overdue(list(self._watched)))
        self._poll_after(self._pace)

    @property
    def _pace(self) -> float:
        return _POLL_QUICKLY if self._forbidden is not None else self._poll_interval

    def _overdue(self, task_ids: list[str]) -> Iterator[str]:
        """Give those who were waited for before the last look, or all where nothing is pushed."""
        watched, last = self._watched, self._polls - 1
        for task_id in task_ids:
            since = watched.get(task_id)
            if self._forbidden is not None or (since is not None and since < last):
                yield task_id
            elif since is not None:
                return

    # Asking

    def fetch(self, task_id: str) -> Deferred[Meta | None]:
        """Read a task's state."""
        return Deferred.fromCoroutine(self._fetch(task_id))

    async def _fetch(self, task_id: str) -> Meta | None:
        payload = await self._asker.ask("GET", self._backend.get_key_for_task(task_id))
        if not payload:
            return None
        try:
            whole = await self._whole(payload)
        except (CancelledError, Stopped):
            raise
        except Exception as error:  # whatever decompressing raises
            raise self._no_result(task_id, error) from error
        return self._read(task_id, whole)

    def fetch_group(self, group_id: str) -> Deferred[Any]:
        """Read a saved group."""
        return Deferred.fromCoroutine(self._fetch_group(group_id))

    async def _fetch_group(self, group_id: str) -> Any:
        payload = await self._asker.ask("GET", self._backend.get_key_for_group(group_id))
        if not payload:
            return None
        try:
            return self._backend.decode(await self._whole(payload))["result"]
        except (CancelledError, Stopped):
            raise
        except Exception as error:
            raise ResultNotKept(
                f"what stands in Redis for group {group_id} is not a group: {error!r}", url=self.url
            ) from error

    def forget(self, task_id: str) -> Deferred[None]:
        """Delete a task's state."""
        return Deferred.fromCoroutine(self._forget(task_id))

    async def _forget(self, task_id: str) -> None:
        await self._asker.ask("DEL", self._backend.get_key_for_task(task_id))

    def write(self, write: Write, done: Done) -> None:
        """Carry out a captured write."""
        self._asker.write(write, done)

    # Stopping

    def hand_over(self, timeout: float) -> Deferred[None]:
        """Wait for what is being decompressed."""
        return self._inflating.flush(timeout)

    def stop(self, timeout: float) -> Deferred[None]:
        """Close both connections."""
        self._stopped = True
        self._stop_resubscribing()
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        self._fetcher.stop()
        self._inflating.stop()
        self._asker.stop()
        closing = [self._commands.stop(timeout), self._subscriber.stop(timeout)]
        return gatherResults(closing).addCallback(_nothing)


def _is_compressed(payload: bytes) -> bool:
    return bool(_COMPRESSED) and payload.startswith(_COMPRESSED)


def _compression(payload: bytes) -> tuple[str | None, bytes]:
    """Give what a state is compressed with, if it is, and the rest of it."""
    if not _is_compressed(payload):
        return None, payload
    start = len(_COMPRESSED)
    end = payload.find(b"\0", start, start + _NAME)
    name = payload[start : end if end >= 0 else start + _NAME]
    return name.decode("utf-8", "backslashreplace"), payload[end + 1 :] if end >= 0 else b""


def _once(payload: bytes) -> bytes:
    """Refuse what Celery's decoder would have to decompress again, which knows no bound."""
    if _is_compressed(payload):
        raise ValueError("it is compressed twice")
    return payload


def _nothing(_: object) -> None:
    """Turn a list of Nones into one."""
