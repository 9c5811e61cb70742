"""What peers may have this side hold at most."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds that `TwistedCelery` takes, for those who receive."""

    #: Bytes of a compressed reply once it is decompressed (``inflate_limit``).
    inflate: int = 256 * 1024 * 1024
    #: Items of an array in a reply of Redis's (``array_limit``).
    array: int = 1_048_576
