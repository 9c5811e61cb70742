"""TLS as the app's settings ask for it: from py-amqp's and redis-py's dictionaries to Twisted's TLS.

pyOpenSSL and service_identity are optional (``twistedcelery[tls]``), so they are imported where they are used.

``broker_use_ssl`` for AMQP holds the arguments of py-amqp's ``SSLTransport`` (amqp/transport.py), for Redis and
in ``redis_backend_use_ssl`` those of redis-py's ``SSLConnection`` (redis/connection.py), which are the same words
behind ``ssl_``. Both are read here by one table.

The certificate and the host name are verified unless the settings say otherwise: ``cert_reqs=CERT_NONE`` turns
both off, ``check_hostname=False`` only the name. py-amqp by itself checks no name unless
``server_hostname`` is set; here the name of the URL is checked, and ``server_hostname`` says another one.
"""

from __future__ import annotations

import ssl
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

from celery.exceptions import ImproperlyConfigured
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.python.failure import Failure
from zope.interface import implementer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from OpenSSL import SSL
    from OpenSSL.crypto import X509
    from twisted.protocols.tls import TLSMemoryBIOProtocol

__all__ = ["client_tls"]

#: Each setting without its "ssl_" prefix.
_KNOWN = frozenset({
    "ca_certs", "ca_data", "ca_path", "cert_reqs", "certfile", "check_hostname", "ciphers", "context",
    "keyfile", "min_version", "password", "server_hostname", "tls_maximum_version", "tls_minimum_version", "version",
})  # fmt: skip

#: How blocking sockets are handled, or checks that OpenSSL here does not make anyway: nothing to do.
_WITHOUT_EFFECT = frozenset({"do_handshake_on_connect", "suppress_ragged_eofs", "exclude_verify_flags"})

#: Known to py-amqp or redis-py, and not offered here: refused when set, never silently left out.
_REFUSED = frozenset({
    "include_verify_flags", "ocsp_context", "ocsp_expected_cert", "server_side", "validate_ocsp",
    "validate_ocsp_stapled",
})  # fmt: skip

#: The arguments of ``ssl.create_default_context`` in py-amqp's ``context`` dictionary.
_CONTEXT = {
    "cafile": "ca_certs",
    "capath": "ca_path",
    "cadata": "ca_data",
    "check_hostname": "check_hostname",
}

_CERT_REQS = {
    "required": ssl.CERT_REQUIRED,
    "optional": ssl.CERT_OPTIONAL,
    "none": ssl.CERT_NONE,
    "cert_required": ssl.CERT_REQUIRED,
    "cert_optional": ssl.CERT_OPTIONAL,
    "cert_none": ssl.CERT_NONE,
}

#: ``ssl.PROTOCOL_*`` that mean one version only; the others negotiate.
_ONE_VERSION = {
    "PROTOCOL_TLSv1": "TLSv1",
    "PROTOCOL_TLSv1_1": "TLSv1_1",
    "PROTOCOL_TLSv1_2": "TLSv1_2",
}


def client_tls(hostname: str, settings: bool | Mapping[str, Any]) -> IOpenSSLClientConnectionCreator:
    """Make Twisted's TLS connection creator for a client of ``hostname``. Reads the files that the settings name.

    :param settings: True for the system's certificate authorities, or the dictionary.
    :raises ImproperlyConfigured: an unknown or unusable setting, named, or a file that cannot be read; or
        the TLS libraries are not installed.
    """
    try:
        from OpenSSL import SSL  # noqa: F401  # optional
        from service_identity.hazmat import DNS_ID, IPAddress_ID  # optional
    except ImportError as error:
        raise ImproperlyConfigured(
            f"TLS needs pyOpenSSL and service-identity: pip install twistedcelery[tls] ({error})"
        ) from error
    wanted = _read({} if isinstance(settings, bool) else settings)
    hostname = wanted.get("server_hostname") or hostname
    context = _context(wanted)
    checked = wanted["cert_reqs"] != ssl.CERT_NONE and wanted.get("check_hostname", True)
    if isIPAddress(hostname) or isIPv6Address(hostname):
        return _Creator(context, None, IPAddress_ID(hostname) if checked else None)
    try:
        ascii_name = hostname.encode("idna").decode("ascii")
        return _Creator(context, ascii_name.encode(), DNS_ID(ascii_name) if checked else None)
    except ValueError as error:
        raise ImproperlyConfigured(
            f"{hostname!r} is no host name that a certificate can carry ({error}); say which name it carries in "
            "the TLS setting server_hostname"
        ) from error


def _read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Bring both dialects into one; refuse what is not known."""
    wanted: dict[str, Any] = {}
    given = dict(settings)
    context = given.pop("context", None) or {}
    for key, value in context.items():
        if key in _CONTEXT:
            given.setdefault(_CONTEXT[key], value)
        elif key != "purpose":
            raise ImproperlyConfigured(
                f"unknown TLS setting context[{key!r}]; known are {', '.join(sorted((*_CONTEXT, 'purpose')))}"
            )
    for key, value in given.items():
        plain = key.removeprefix("ssl_")
        if plain in _KNOWN:
            wanted[plain] = _cert_reqs(key, value) if plain == "cert_reqs" else value
        elif plain in _REFUSED:
            if value:
                raise ImproperlyConfigured(f"TLS setting {key} is not supported")
        elif plain not in _WITHOUT_EFFECT:
            raise ImproperlyConfigured(
                f"unknown TLS setting {key!r}; known are {', '.join(sorted(_KNOWN))}, each also with ssl_ before it"
            )
    wanted.setdefault("cert_reqs", ssl.CERT_REQUIRED)
    return wanted


def _cert_reqs(key: str, value: Any) -> ssl.VerifyMode:
    if value is None:  # redis-py: no verification; py-amqp: the context's default, which is to verify
        return ssl.CERT_NONE if key.startswith("ssl_") else ssl.CERT_REQUIRED
    try:
        return _CERT_REQS[value.lower()] if isinstance(value, str) else ssl.VerifyMode(value)
    except (KeyError, ValueError) as error:
        raise ImproperlyConfigured(
            f"TLS setting {key}={value!r}: must be 'required', 'optional', 'none' or one of ssl.CERT_*"
        ) from error


def _versions(wanted: Mapping[str, Any]) -> tuple[ssl.TLSVersion, ssl.TLSVersion | None]:
    """Find the lowest TLS version (1.2 where none is given, as in Twisted) and the highest (None: the newest)."""
    if (name := _ONE_VERSION.get(getattr(wanted.get("version"), "name", ""))) is not None:
        return ssl.TLSVersion[name], ssl.TLSVersion[name]
    maximum = _version("maximum", wanted.get("tls_maximum_version"))
    minimum = _version("minimum", wanted.get("tls_minimum_version", wanted.get("min_version")))
    if minimum is None:
        minimum = ssl.TLSVersion.TLSv1_2 if maximum is None else min(ssl.TLSVersion.TLSv1_2, maximum)
    if maximum is not None and minimum > maximum:
        raise ImproperlyConfigured(
            f"TLS minimum version {minimum.name} is above the maximum version {maximum.name}"
        )
    return minimum, maximum


def _version(which: str, value: Any) -> ssl.TLSVersion | None:
    if value is None:
        return None
    try:
        version = ssl.TLSVersion(value)
    except ValueError as error:
        raise ImproperlyConfigured(f"TLS {which} version {value!r}: must be one of ssl.TLSVersion") from error
    if version in (ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.MAXIMUM_SUPPORTED):
        return None
    return version


def _context(wanted: Mapping[str, Any]) -> SSL.Context:
    """Make the context: all that is the same for each connection to a server."""
    from OpenSSL import SSL  # optional

    context = SSL.Context(SSL.TLS_METHOD)
    context.set_options(SSL.OP_NO_COMPRESSION)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    minimum, maximum = _versions(wanted)
    context.set_min_proto_version(minimum.value)
    if maximum is not None:
        context.set_max_proto_version(maximum.value)
    if wanted.get("certfile"):
        _load_client(context, wanted)
    elif wanted.get("keyfile"):
        raise ImproperlyConfigured("TLS setting keyfile needs certfile beside it")
    if wanted["cert_reqs"] != ssl.CERT_NONE:
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        _load_authorities(context, wanted)
    if ciphers := wanted.get("ciphers"):
        with _naming("ciphers", f"no cipher is called {ciphers}"):
            context.set_cipher_list(ciphers.encode())
    return context


def _load_authorities(context: SSL.Context, wanted: Mapping[str, Any]) -> None:
    """Trust the certificate authorities of the settings, or else the system's."""
    file, folder, data = (wanted.get(key) for key in ("ca_certs", "ca_path", "ca_data"))
    if file is None and folder is None and data is None:
        context.set_default_verify_paths()
    if file is not None:
        _read_file("ca_certs", file)
        with _naming("ca_certs", f"no certificate in {file}"):
            context.load_verify_locations(str(file))
    if folder is not None:
        if not Path(folder).is_dir():
            raise ImproperlyConfigured(f"TLS setting ca_path: {folder} is no directory")
        context.load_verify_locations(None, str(folder))
    if data is not None:
        with _naming("ca_data", "no certificate in the given text"):
            _add_authorities(context, data)


def _add_authorities(context: SSL.Context, data: str | bytes) -> None:
    """Trust the certificates of a PEM text, or the one of DER bytes (redis-py's ``ssl_ca_data``)."""
    from cryptography import x509  # optional
    from OpenSSL.crypto import X509  # optional

    if isinstance(data, str):
        found = x509.load_pem_x509_certificates(data.encode())
    else:
        found = [x509.load_der_x509_certificate(bytes(data))]
    store = context.get_cert_store()
    assert store is not None
    for certificate in found:
        _give(store.add_cert, certificate, X509.from_cryptography)


def _load_client(context: SSL.Context, wanted: Mapping[str, Any]) -> None:
    """Load the client's certificate, its chain, and its key, from the same file where no other is named."""
    from cryptography.exceptions import UnsupportedAlgorithm  # optional
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # optional
    from OpenSSL.crypto import PKey  # optional

    file = wanted["certfile"]
    _read_file("certfile", file)
    with _naming("certfile", f"no certificate in {file}"):
        context.use_certificate_chain_file(str(file))
    key = "keyfile" if wanted.get("keyfile") else "certfile"
    data = _read_file(key, wanted[key])
    password = wanted.get("password")
    password = password.encode() if isinstance(password, str) else password
    with _naming(key, f"no private key of {file} in {wanted[key]}", UnsupportedAlgorithm, TypeError):
        # A password for a key that has none is an error to cryptography, and none to the ssl module.
        private = load_pem_private_key(data, password if b"ENCRYPTED" in data else None)
        _give(context.use_privatekey, private, PKey.from_cryptography_key)
        context.check_privatekey()


def _give(take: Callable[[Any], object], value: Any, wrap: Callable[[Any], Any]) -> None:
    """Give a certificate or key of cryptography's to pyOpenSSL, as it is or, before 24.3, in its own wrapping."""
    try:
        take(value)
    except TypeError:
        take(wrap(value))


def _read_file(key: str, file: Any) -> bytes:
    """Read a file by ourselves: OpenSSL does not say which file it could not read, or why."""
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ImproperlyConfigured(f"TLS setting {key}: cannot read {file}: {error.strerror}") from error


@contextmanager
def _naming(key: str, problem: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what the libraries raise into an error that names the setting."""
    from OpenSSL import SSL  # optional

    expected: tuple[type[Exception], ...] = (SSL.Error, ValueError, *more)
    try:
        yield
    except expected as error:
        detail = "" if isinstance(error, SSL.Error) else f" ({error})"
        raise ImproperlyConfigured(f"TLS setting {key}: {problem}{detail}") from error


@implementer(IOpenSSLClientConnectionCreator)
class _Creator:
    """TLS for one server, with its name checked by service_identity, or not at all.

    Not Twisted's ``optionsForClientTLS``: with Twisted 26.10 and service_identity 24 that one accepts a certificate
    without any subjectAltName, for whatever host (the error is logged, and the handshake goes on). It
    cannot leave the name alone either, and it takes certificates as objects that pyOpenSSL has deprecated.
    """

    def __init__(self, context: SSL.Context, server_name: bytes | None, identity: Any) -> None:
        self._context = context
        #: What is sent as SNI, by which a server may choose its certificate; an address is not sent (RFC 6066).
        self._server_name = server_name
        #: What the certificate has to be valid for; None: whatever it says.
        self._identity = identity

    def clientConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """Make the connection."""
        from OpenSSL import SSL  # optional

        connection = SSL.Connection(self._context, None)
        if self._server_name is not None:
            connection.set_tlsext_host_name(self._server_name)
        if self._identity is not None:
            connection.set_verify(
                SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT,
                partial(_verify, ref(tlsProtocol), self._identity),
            )
        return connection


def _verify(
    protocol: ref[TLSMemoryBIOProtocol],
    identity: Any,
    connection: SSL.Connection,
    certificate: X509,
    error: int,
    depth: int,
    good: int,
) -> bool:
    """Add the name to what OpenSSL has verified of one certificate of the chain; depth 0 is the server's own."""
    from service_identity.cryptography import extract_patterns  # optional
    from service_identity.hazmat import verify_service_identity  # optional

    if depth != 0 or not good:
        return bool(good)
    try:
        verify_service_identity(extract_patterns(certificate.to_cryptography()), [identity], [])
    except Exception:  # noqa: BLE001  # whatever stands in the way of verifying: not verified
        if (waiting := protocol()) is not None:
            waiting.failVerification(Failure())  # type: ignore[no-untyped-call]
        return False
    return True
