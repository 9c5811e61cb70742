"""From a kombu connection description to the list of servers that it names.

kombu parses URLs; this module only reads what it has parsed, and walks down the alternates as
``kombu.Connection.switch`` does. Nothing connects, no transport is instantiated, nothing is imported for one.

Walking in order matters: ``switch`` lets a server without a port or a virtual host of its own inherit those
of the server before it (``amqp://a:5673;amqp://b`` means port 5673 on both), and so do workers.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from itertools import cycle, repeat
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from celery.exceptions import ImproperlyConfigured
from kombu.utils.functional import shufflecycle
from kombu.utils.url import parse_url, sanitize_url, url_to_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    #: ``broker_failover_strategy``: a name, or a callable that turns the list of URLs into an iterator.
    Strategy: TypeAlias = str | Callable[[list[str]], Iterator[str]]

__all__ = ["Server", "UnreadableURL", "check_urls", "failover", "servers"]

#: Default ports of the transports that speak to one server over TCP.
_PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379, "sentinel": 26379}

#: Names of the same transport (kombu.connection.resolve_aliases).
_ALIASES = {"pyamqp": "amqp", "librabbitmq": "amqp"}

#: Transports whose scheme alone asks for TLS.
_TLS = {"amqps", "rediss"}

#: Schemes, and parts of one (``redis+socket``), whose URLs are looked at before anybody parses them.
_CHECKED = frozenset({*_PORTS, *_ALIASES})

#: What `quote` makes of the characters that cannot stand for themselves.
_ESCAPES = ", ".join(f"{character} as {quote(character, safe='')}" for character in "/?#;@[]")

#: What ``broker_transport_options`` may override of a py-amqp connection (kombu/transport/pyamqp.py).
_AMQP_OVERRIDES = (
    "userid",
    "password",
    "login_method",
    "virtual_host",
    "ssl",
    "connect_timeout",
    "heartbeat",
)


class UnreadableURL(ImproperlyConfigured):  # type: ignore[misc]  # untyped base
    """A URL that cannot be taken apart. What it holds is not told: nobody can say where in it the password stands.

    :param setting: what holds it: ``broker_url``, ``result_backend`` ...
    """

    def __init__(self, setting: str, source: str) -> None:
        super().__init__(
            f"{setting}: {_hidden(source)} cannot be read; in a user name, a password and a virtual host, write {_ESCAPES} "
            "(urllib.parse.quote(text, safe='')); a port is a number up to 65535"
        )


def check_urls(setting: str, given: object) -> None:
    """Refuse what kombu, Celery and urllib would misread, before they do: their errors quote it, password and all.

    :param given: a URL, several between semicolons, a list of them, or whatever else such a setting may hold.
    :raises UnreadableURL: has neither cause nor context, as those have the password, too.
    """
    for text in given if isinstance(given, list | tuple) else (given,):
        if not isinstance(text, str):
            continue
        # The password of a result backend may hold a semicolon, unless it is a list of Sentinels.
        listed = setting == "broker_url" or text.startswith("sentinel")
        for source in text.split(";") if listed else (text,):
            if not _is_readable(source):
                raise UnreadableURL(setting, source)


def _is_readable(source: str) -> bool:
    """Whether one URL is understood as it is meant, as far as it shows."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return "@" not in source
    if _CHECKED.isdisjoint(scheme.strip().split("+")):
        return True
    try:
        parts = urlsplit(f"//{rest}")
        _ = parts.port  # it is parsed when it is asked for
    except ValueError:
        return False
    if "@" in parts.netloc:
        return True
    # "u:12/34@h" or "u/v:12@h": user name and password end at the @, so what stands before it is no server.
    behind = (parts.path, parts.fragment, *(pair.partition("=")[0] for pair in parts.query.split("&")))
    return not any("@" in part for part in behind) or ":" not in rest.rpartition("@")[0]


def _hidden(source: str) -> str:
    """Give the scheme of a URL, of which nothing else can be told."""
    scheme, separator, _ = source.strip().partition("://")
    return f"{scheme}://..." if separator and re.fullmatch(r"[\w+.-]+", scheme) else "..."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Server:
    """One server, and how to log in there."""

    #: kombu's name of the transport: "amqp", "amqps", "redis", "rediss", "sentinel", "memory" ...
    transport: str
    #: Where to connect to; "" for a UNIX socket.
    host: str = ""
    #: TCP port, 0 for a transport without one.
    port: int = 0
    #: Path of a UNIX socket (Redis), or None.
    path: str | None = None
    #: The name that the server's certificate has to carry, unless the TLS settings give another; None: ``host``.
    name: str | None = None
    userid: str | None = None
    #: Text, or a callable that is asked anew for every attempt (kombu 5.7).
    password: str | Callable[[], str] | None = field(default=None, repr=False)
    virtual_host: str = "/"
    #: False, True (the system's certificate authorities), or a dictionary as ``broker_use_ssl`` has it.
    ssl: bool | Mapping[str, Any] = field(default=False, repr=False)
    login_method: str | None = None
    #: Seconds, or None where nothing is configured.
    heartbeat: float | None = None
    #: Seconds for TCP, TLS and log-in together (``broker_connection_timeout``); None: no bound.
    connect_timeout: float | None = None
    transport_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    #: More settings of a UNIX socket's URL, which kombu hands on as they are.
    query: Mapping[str, Any] = field(default_factory=dict, repr=False)
    credential_provider: Any = field(default=None, repr=False)
    #: The URL as it is configured, password and all: what a failover strategy is given.
    source: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        """The server for messages and logs: no password in it, nor a query, which may hold one."""
        user = f"{quote(self.userid, safe='')}@" if self.userid else ""
        if self.path is not None:
            return f"{self.transport}+socket://{user}{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port else ""
        return f"{self.transport}://{user}{host}{port}/{quote(self.virtual_host, safe='/')}"


def servers(connection: Any) -> list[Server]:
    """List the servers of a ``kombu.Connection`` that was never connected, in the order of its URLs.

    A ``rediss://`` URL without TLS settings is verified, where kombu falls back to an unverified connection:
    no setting of the app's says so.

    :raises ImproperlyConfigured: a URL has a parameter that kombu does not know, or a malformed value.
    """
    first: dict[str, Any] = dict(connection._initial_params)
    # A list whose first item holds several URLs is listed by kombu in parts and as a whole.
    sources = [str(url).strip() for url in connection.alt if ";" not in str(url)]
    found = []
    inherited: dict[str, Any] = {"port": None, "virtual_host": "/"}
    for index, source in enumerate(sources or [""]):
        values = first if index == 0 else {**first, **_parse(source, known=frozenset(first))}
        if values["transport"] != "sentinel":  # kombu's Sentinel transport parses its list by itself
            inherited = {key: values[key] or before for key, before in inherited.items()}
            values = {**values, **inherited}
        found.append(_server(dict(values), connection.transport_options or {}, source))
    return found


def failover(servers: Sequence[Server], strategy: Strategy | None = None) -> Iterator[Server]:
    """Iterate over the servers without end, the first one first, as ``broker_failover_strategy`` says.

    ``round-robin`` (the default) and ``shuffle`` visit every server once in each round, which kombu's own
    shuffle does not promise. A callable gets the list of URLs and gives an iterator of URLs, whose first item
    is left out, as kombu leaves it out; an iterator that ends is asked for anew.

    :raises ImproperlyConfigured: there is no such strategy; while iterating: it gives an unknown URL, or none.
    """
    if len(servers) == 1:
        return repeat(servers[0])
    if strategy in (None, "round-robin", cycle):
        return cycle(servers)
    if strategy in ("shuffle", shufflecycle):
        return _shuffled(servers)
    if callable(strategy):
        return _custom(servers, strategy)
    raise ImproperlyConfigured(
        f"broker_failover_strategy={strategy!r}: must be 'round-robin', 'shuffle' or a callable"
    )


def _shuffled(servers: Sequence[Server]) -> Iterator[Server]:
    yield servers[0]
    rest = list(servers[1:])
    random.shuffle(rest)
    yield from rest
    everyone = list(servers)
    while True:
        random.shuffle(everyone)
        yield from everyone


def _custom(servers: Sequence[Server], strategy: Callable[[list[str]], Iterator[str]]) -> Iterator[Server]:
    by_url = {server.source: server for server in servers}
    yield servers[0]
    given = iter(strategy(list(by_url)))
    next(given, None)
    while True:
        url = next(given, None)
        if url is None:
            given = iter(strategy(list(by_url)))
            url = next(given, None)
        if url is None:
            raise ImproperlyConfigured("broker_failover_strategy gives no URL")
        if url not in by_url:
            raise ImproperlyConfigured(
                f"broker_failover_strategy gave {_sanitized(url)}, which is not in broker_url"
            )
        yield by_url[url]


def _parse(source: str, *, known: frozenset[str]) -> dict[str, Any]:
    """Parse one URL as kombu does, the ``transport+url`` form included."""
    scheme, separator, _ = source.partition("://")
    check_urls("broker_url", source)
    if not separator:
        return {"hostname": source}
    if "+" in scheme:
        transport, _, hostname = source.partition("+")
        return {"transport": transport, "hostname": hostname}
    try:
        values: dict[str, Any] = parse_url(source)
    except (ValueError, KeyError, TypeError) as error:
        raise ImproperlyConfigured(f"broker URL {_sanitized(source)}: {error}") from error
    if unknown := sorted(set(values) - known):
        raise ImproperlyConfigured(
            f"broker URL {_sanitized(source)}: unknown parameter {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
    return values


def _server(values: dict[str, Any], options: Mapping[str, Any], source: str) -> Server:
    transport = values["transport"] or "amqp"
    if not isinstance(transport, str):
        transport = getattr(transport, "driver_type", transport.__name__)
    transport = _ALIASES.get(transport, transport)
    host, port, path = values["hostname"] or "", values["port"], None
    query: dict[str, Any] = {}
    amqp = transport in ("amqp", "amqps")
    if amqp:
        values.update((key, options[key]) for key in _AMQP_OVERRIDES if key in options)
        host = str(options.get("host", host))
    userid, password, virtual_host = values["userid"], values["password"], values["virtual_host"]
    provider = values.get("credential_provider")
    if host.startswith("socket://"):
        parts = url_to_parts(host)
        host, path = "", f"/{parts.path or ''}"
        userid, password = parts.username, parts.password
        query = dict(parts.query)
        virtual_host = query.pop("virtual_host", virtual_host)
        provider = query.pop("credential_provider", provider)
    elif host.count(":") == 1:
        host, _, given = host.partition(":")
        port = given or port
    name = host or None
    if amqp:
        userid, password = userid or "guest", password or "guest"
        # py-amqp's own: "localhost" may mean ::1, where many a broker does not listen.
        host = "127.0.0.1" if host in ("", "localhost") else host
        name = name or "localhost"
    elif transport in _PORTS and path is None:
        host = host or "127.0.0.1"
    ssl = _flag(values["ssl"]) or transport in _TLS
    if ssl and f"{transport}s" in _TLS:
        transport = f"{transport}s"
    try:
        return Server(
            transport=transport,
            host=host,
            port=0 if path is not None else int(port or _PORTS.get(transport, 0)),
            path=path,
            name=name,
            userid=userid,
            password=password,
            virtual_host=virtual_host or "/",
            ssl=ssl,
            login_method=values["login_method"],
            heartbeat=_seconds(values["heartbeat"]),
            connect_timeout=_seconds(values["connect_timeout"]),
            transport_options=options,
            query=query,
            credential_provider=provider,
            source=source,
        )
    except ValueError as error:
        raise ImproperlyConfigured(f"broker URL {_sanitized(source or host)}: {error}") from error


def _flag(value: Any) -> Any:
    """Read ``?ssl=false`` of a URL, where any text would count as true."""
    if isinstance(value, str):
        return value.lower() not in ("", "0", "false", "no", "off")
    return value


def _seconds(value: Any) -> float | None:
    return None if value is None else float(value)


def _sanitized(source: object) -> str:
    text = str(source)
    if not _is_readable(text):
        return _hidden(text)
    text = text.partition("?")[0]
    return str(sanitize_url(text)) if "://" in text else text
