"""What can be known of a task's state that cannot be decoded."""

from __future__ import annotations

import json
import pickletools
from typing import TYPE_CHECKING, Any

from celery.states import READY_STATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.logger import Logger

__all__ = ["LeftOut", "is_passing"]


class LeftOut:
    """Tells in a log that a source leaves states out: of the first one only, as there may be many."""

    __slots__ = ("_log", "_told")

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._told = False

    def tell(self, task_id: str, error: BaseException | None) -> None:
        """A state of this task was left out, because of this error."""
        if not self._told:
            self._told = True
            self._log.warn(
                "a state of task {task_id} that is not its final one cannot be decoded and is left out; so will be others like it, "
                "which are not logged: {error!r}",
                task_id=task_id,
                error=error,
            )


def is_passing(body: Any, content_type: str | None) -> bool:
    """Whether an undecodable state is known not to be the final one, so that whoever waits for the task can do without it.

    The status is read without decoding anything else, and without running anything that the sender names. Where it cannot be
    read, the state may be the final one.
    """
    read = _READERS.get(content_type or "")
    try:
        status = read(body) if read is not None else None
    except Exception:  # noqa: BLE001  # whatever a peer sends
        return False
    return isinstance(status, str) and status not in READY_STATES


def _in_json(body: Any) -> Any:
    return json.loads(body)["status"]


def _in_pickle(body: Any) -> Any:
    """Find the string that follows the first "status", as Celery's own keys are written before the task's."""
    named = followed = False
    status: Any = None
    for opcode, argument, _ in pickletools.genops(body):
        is_text = opcode.name in _TEXTS
        if opcode.name in _BETWEEN:
            continue
        if status is None:
            if named and is_text:
                status = argument
            named = is_text and argument == "status"
        elif opcode.name == "STACK_GLOBAL":
            return None  # it was the module of a class
        elif followed or not is_text:
            return status
        else:
            followed = True
    return status


#: Opcodes of pickle: strings, and what may stand between a key and its value.
_TEXTS = frozenset(
    {"BINSTRING", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "SHORT_BINUNICODE", "STRING", "UNICODE"}
)
_BETWEEN = frozenset({"BINPUT", "FRAME", "LONG_BINPUT", "MEMOIZE", "PUT"})

#: By content type. What Celery's other serializers can write, they can read.
_READERS: dict[str, Callable[[Any], Any]] = {
    "application/json": _in_json,
    "application/x-python-serialize": _in_pickle,
}
