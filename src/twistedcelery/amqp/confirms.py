"""Publisher confirms of one channel (RabbitMQ's extension): which publish has which outcome.

The server numbers what is published on a channel 1, 2, 3 ... and acknowledges by these numbers, one or "all up to
this one" at a time. A message that no queue takes is first returned (``basic.return``, without its number) and
then acknowledged like any other; so a return has to be matched to its publish by what the message says.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import RemoteProtocolError, Unroutable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .events import Returned

__all__ = ["Confirms"]

#: Exchange, routing key, correlation id, message id.
_Key: TypeAlias = "tuple[str, str, Any, Any]"

_MISSING = object()


def _key_of(exchange: str, routing_key: str, properties: Mapping[str, Any]) -> _Key:
    # Anything empty is written as "".
    return (
        exchange,
        routing_key,
        properties.get("correlation_id") or None,
        properties.get("message_id") or None,
    )


class Confirms:
    """The publishes of a channel that have no outcome yet, each known by a token of the caller's.

    The cost of an acknowledgement is that of what it acknowledges, however many others are outstanding.
    """

    __slots__ = ("_by_key", "_keys", "_lowest", "_next", "_outstanding", "_returned")

    def __init__(self) -> None:
        #: The tag of the next publish.
        self._next = 1
        #: No tag below this one is outstanding.
        self._lowest = 1
        #: Tag -> token, in the order of publishing.
        self._outstanding: dict[int, object] = {}
        #: Those of the outstanding that may be returned: tag -> key, and key -> tag (or tags, oldest first).
        self._keys: dict[int, _Key] = {}
        self._by_key: dict[_Key, int | deque[int]] = {}
        #: Those that have been returned: tag -> why.
        self._returned: dict[int, Unroutable] = {}

    def __len__(self) -> int:
        return len(self._outstanding)

    def published(self, token: object) -> None:
        """Note a publish that is never returned."""
        self._outstanding[self._next] = token
        self._next += 1

    def published_mandatory(
        self, token: object, exchange: str, routing_key: str, properties: Mapping[str, Any]
    ) -> None:
        """Note a publish that the server may return."""
        tag = self._next
        self._next = tag + 1
        self._outstanding[tag] = token
        key = _key_of(exchange, routing_key, properties)
        self._keys[tag] = key
        other = self._by_key.setdefault(key, tag)
        if other is not tag:
            if isinstance(other, int):
                self._by_key[key] = deque((other, tag))
            else:
                other.append(tag)

    def returned(self, event: Returned, url: str) -> bool:
        """Attribute a returned message to its publish; False if there is none that it could be.

        Where identifiers do not tell (a server that rewrites them), the oldest publish of that exchange
        and routing key is taken: a queue that is missing is missing for all of them.
        """
        properties = event.properties
        names = (event.exchange, event.routing_key)
        key = _key_of(*names, properties)
        found = self._by_key.get(key)
        if found is None:
            tag = next((tag for tag, other in self._keys.items() if other[:2] == names), None)
            if tag is None:
                return False
        else:
            tag = found if isinstance(found, int) else found[0]
        self._forget_key(tag)
        self._returned[tag] = Unroutable(
            f"{event.text or 'NO_ROUTE'}: no queue takes messages of exchange {event.exchange!r} "
            f"with routing key {event.routing_key!r}",
            code=event.code,
            exchange=event.exchange,
            routing_key=event.routing_key,
            url=url,
        )
        return True

    def settle(self, delivery_tag: int, *, multiple: bool) -> list[tuple[Any, Exception | None]]:
        """Remove what the server has acknowledged; return the tokens in order, each with why it was returned.

        :raises RemoteProtocolError: for a number that is not outstanding.
        """
        if not multiple:
            token = self._outstanding.pop(delivery_tag, _MISSING)
            if token is _MISSING:
                raise RemoteProtocolError(f"a confirm for {delivery_tag}, which is not outstanding")
            if delivery_tag == self._lowest:
                self._lowest += 1
                while self._lowest < self._next and self._lowest not in self._outstanding:
                    self._lowest += 1
            return [(token, self._reason(delivery_tag))]
        last = delivery_tag or self._next - 1
        if last >= self._next:
            raise RemoteProtocolError(f"a confirm for {delivery_tag}, which was not published")
        # By number, not by walking the dict: its removed entries would be walked over again each time.
        settled: list[tuple[Any, Exception | None]] = []
        pop = self._outstanding.pop
        for tag in range(self._lowest, last + 1):
            token = pop(tag, _MISSING)
            if token is not _MISSING:
                settled.append((token, self._reason(tag)))
        self._lowest = max(self._lowest, last + 1)
        return settled

    def _reason(self, tag: int) -> Unroutable | None:
        if tag in self._keys:
            self._forget_key(tag)
        return self._returned.pop(tag, None) if self._returned else None

    def _forget_key(self, tag: int) -> None:
        key = self._keys.pop(tag)
        tags = self._by_key[key]
        if isinstance(tags, int):
            del self._by_key[key]
            return
        tags.remove(tag)  # nearly always the first
        if not tags:
            del self._by_key[key]

    def clear(self) -> list[object]:
        """Forget everything; return the tokens that have no outcome, in order."""
        tokens = list(self._outstanding.values())
        self._outstanding.clear()
        self._keys.clear()
        self._by_key.clear()
        self._returned.clear()
        return tokens
