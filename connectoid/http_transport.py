"""HTTP by aiohttp: the one module that imports it, and only when a runner starts.

What aiohttp brings and http.client does not: a pool of connections, Happy Eyeballs (RFC 8305)
over broken IPv6, and proxies. What a relay sends is believed in nothing: no redirect is followed,
no cookie kept, nothing decompressed, and a reply has a size and a time. What a contact names leads
to no service of this machine or its networks: each address is looked at before it is connected to.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import socket
import ssl
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, cast

try:
    import aiohttp
    import aiohttp.abc
    import yarl
except ImportError:
    raise ImportError("Relays need the package aiohttp: pip install 'connectoid[webrtc]'") from None

from connectoid.errors import UsageError
from connectoid.lookups import Lookups, few_of
from connectoid.networks import NAME_IT, is_private_host, is_public
from connectoid.relay_client import MAX_REPLY_BYTES, ON_BEHALF_OF, TransportError
from connectoid.thrifty_tls import make_context
from connectoid.urls import origin_of
from connectoid.way_out import source_for

INTERIM = range(100, 200)
REDIRECTS = range(300, 400)
# A relay closes an idle connection after 75 s. Ours ends before, so that few requests meet the end.
KEEP_ALIVE_S = 70.0
# Of a line in the head of a reply. The proxies of some networks add long ones.
MAX_LINE_BYTES = 65_536
# Replies "100 Continue" and "103 Early Hints" before the reply itself. We ask for none of them, and
# whoever sends them without end would keep the loop from everybody else.
MAX_INTERIM_REPLIES = 8
# Of a reply before its body begins. The loop reads up to 256 KiB at a time, some of it the body.
MAX_HEAD_BYTES = 512 * 1024
# Octets of a body with its chunks and their extensions, for each of its own: twice as many as it
# takes in chunks of an octet each. Extensions without end would keep the loop busy.
CHUNKED_BYTES = 12
PROXY_REFUSES = 407
# What aiohttp can speak to a proxy.
PROXY_SCHEMES = ("http", "https")
# The number of an error, in what asyncio says of several.
_ERRNO = re.compile(r"\[Errno -?[0-9]+\] ")
JSON = "application/json"
HEADERS = {
    "Content-Type": JSON,
    "Accept": JSON,
    "Accept-Encoding": "identity",
    # Otherwise aiohttp tells every relay the versions of Python and of itself.
    "User-Agent": "connectoid",
}
# Verdicts of OpenSSL on a certificate (X509_V_ERR_...): nobody that this device trusts has signed
# it, or its time has not come, or is over.
SIGNED_BY_NOBODY = (18, 19, 20, 21)
NOT_YET_VALID = 9
EXPIRED = 10
# What TLS makes of octets that are none of it.
NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
PRIVATE = (
    f"it is on this machine or in a private network, and is no relay of yours; {NAME_IT}")


class Exchange:
    """A request, what its reply may cost, and whether it went out on a connection that was kept."""

    def __init__(
        self, method: str, url: str, body: bytes, timeout: aiohttp.ClientTimeout, max_bytes: int,
    ) -> None:
        self.method = method
        self.url = url
        self.body = body
        self.timeout = timeout
        self.max_bytes = max_bytes
        self.was_kept = False


class DaemonResolver(aiohttp.abc.AbstractResolver):
    """Look names up in daemon threads, with few places for each on whose behalf it is."""

    def __init__(
        self, *, public_only: bool, getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo,
    ) -> None:
        self._public_only = public_only
        self._lookups = Lookups(getaddrinfo)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC,
    ) -> list[aiohttp.abc.ResolveResult]:
        """Return the addresses of a host that may be connected to; raise OSError."""
        asker = ON_BEHALF_OF.get(host)
        infos = await self._lookups.look_up(asker, host, port, family, socket.SOCK_STREAM)
        allowed = infos
        if self._public_only:
            allowed = [info for info in infos if is_of_others(info[4][0])]
        if infos and not allowed:
            raise OSError(PRIVATE)
        return [result_of(host, info) for info in few_of(allowed)]

    async def close(self) -> None:
        """Do nothing: a lookup ends by itself."""


def result_of(host: str, info: tuple[Any, ...]) -> aiohttp.abc.ResolveResult:
    """Return what aiohttp wants to know of one result of getaddrinfo."""
    family, _, proto, _, address = info
    numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return aiohttp.abc.ResolveResult(
        hostname=host, host=address[0], port=address[1], family=family, proto=proto, flags=numeric)


Read: TypeAlias = Callable[[], Awaitable[Any]]


class ReplyError(aiohttp.ClientError):
    """A reply that is not read on; the text says why."""


class BoundedRead:
    """Read replies from a connection, and not more than a few that only announce another one."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._left = MAX_INTERIM_REPLIES

    async def __call__(self) -> Any:
        """Return the next reply with its body; raise ReplyError."""
        message, payload = await self._read()
        if message.code in INTERIM:
            if self._left == 0:
                raise ReplyError("it sends interim replies without end")
            self._left -= 1
        return message, payload


class BoundedReceive:
    """Take octets for a protocol of aiohttp, and end its connection if they are too many.

    After the reply none may come: aiohttp would read them as replies, and keep them all.
    """

    def __init__(self, protocol: Any) -> None:
        self.left = MAX_HEAD_BYTES
        self._is_over = False
        self._protocol = protocol
        # That of the class: the protocol itself has the one of the former reply.
        self._take = type(protocol).data_received

    def __call__(self, octets: bytes) -> None:
        """Take octets, as `data_received` of a protocol."""
        self.left -= len(octets)
        if self.left >= 0:
            self._take(self._protocol, octets)
        has_more = self._is_over and self._protocol.should_close
        # Whoever reads hears of the lost connection.
        if (self.left < 0 or has_more) and self._protocol.transport is not None:
            self._protocol.transport.abort()

    def allow(self, octets: int) -> None:
        """Take so many more, unless the reply is there already."""
        if not self._is_over:
            self.left += octets

    def end(self) -> None:
        """Take no more: the reply is there, and the connection is idle."""
        self._is_over = True
        self.left = 0


class BoundedResponse(aiohttp.ClientResponse):
    """A response that bounds what aiohttp does not: interim replies, and octets around the body."""

    receive: BoundedReceive

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """Read the head of the reply; raise ReplyError."""
        protocol = connection.protocol
        self.receive = BoundedReceive(protocol)
        protocol.data_received = self.receive
        if protocol.transport is not None:
            # uvloop notes the method when it is told the protocol, and not for each read.
            protocol.transport.set_protocol(protocol)
        protocol.read = BoundedRead(protocol.read)
        try:
            await super().start(connection)
        finally:
            # What is left is the method of the class.
            del protocol.read
        self.content.on_eof(self.receive.end)
        if type_of(self.headers.get("Content-Type", "")) != JSON:
            self._let_go(protocol)
        return self

    def _let_go(self, protocol: Any) -> None:
        """Let no other request go where this reply came from.

        Where users have to log in, a connection leads to the page for that as long as it is kept.
        """
        protocol.force_close()
        if self.connection is None:
            # The whole reply is there, and the connection in the pool.
            protocol.close()


class TunnelResponse(BoundedResponse):
    """What a proxy says to CONNECT. The connection goes on, whatever its type."""

    def _let_go(self, _protocol: Any) -> None:
        """Keep it: TLS begins there."""


class BoundedConnector(aiohttp.TCPConnector):
    """Bound what is before and after the exchanges on a connection."""

    def _release(self, key: Any, protocol: Any, *, should_close: bool = False) -> None:
        """Keep a connection for the next request, or end it at once.

        Over TLS aiohttp would wait for a goodbye of the relay, which says none while it holds a
        reply back. Such a connection outlasted its transport, and the loop.
        """
        transport = protocol.transport
        is_over = self._force_close or should_close or protocol.should_close
        if is_over and transport is not None and not transport.is_closing():
            transport.abort()
        super()._release(key, protocol, should_close=should_close)

    def _update_proxy_auth_header_and_build_proxy_req(self, req: Any) -> Any:
        """Have what a proxy says to CONNECT bounded as well: aiohttp reads it by its own class."""
        to_proxy = super()._update_proxy_auth_header_and_build_proxy_req(req)
        to_proxy.response_class = TunnelResponse
        return to_proxy


def type_of(header: str) -> str:
    """Return what is before the parameters of a Content-Type.

    The `content_type` of aiohttp reads them too: 64 KiB of semicolons hold the loop for a minute.
    """
    return header.partition(";")[0].strip().lower()


def is_of_others(address: str) -> bool:
    """Return whether everybody can reach an address, and it is not of this machine."""
    # A link-local one has a zone.
    address = address.partition("%")[0]
    return is_public(ipaddress.ip_address(address)) and not is_of_this_machine(address)


def is_of_this_machine(address: str) -> bool:
    """Return whether an address is of this machine, which may have public ones."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return source_for(family, address) == address


def is_refused(host: str) -> bool:
    """Return whether a host of an Origin is private, or an address of this machine."""
    if is_private_host(host):
        return True
    address = host.strip("[]")
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return is_of_this_machine(address)


class HttpTransport:
    """Exchange requests for replies on one event loop, over a pool of connections.

    The certificates in `ca_file` (PEM) are trusted beside those of the system, which
    SSL_CERT_FILE replaces as everywhere in Python. `may_be_private` says of which URLs the hosts
    may be on this machine or in a private network; without it all may.
    """

    def __init__(
        self, ca_file: str | None = None, may_be_private: Callable[[str], bool] | None = None,
    ) -> None:
        self._tls = _ssl_of(ca_file)
        self._may_be_private = may_be_private or _always
        self._make_sessions()
        # The `trust_env` of aiohttp would look at each request, and would also send passwords of
        # ~/.netrc to whatever host a contact names.
        self._proxies = urllib.request.getproxies()

    async def exchange(
        self, method: str, url: str, body: bytes, *, timeout_s: float, wait_s: float = 0.0,
        max_bytes: int = MAX_REPLY_BYTES,
    ) -> tuple[int, bytes]:
        """Return status and body of a reply; raise TransportError, also for a larger body.

        A connection has `timeout_s` to begin, and the whole exchange `wait_s` more. A connection
        that was kept may be closed at the very moment: then the request goes out once more.
        """
        timeout = aiohttp.ClientTimeout(
            total=timeout_s + wait_s, connect=timeout_s, sock_connect=timeout_s, ceil_threshold=60)
        exchange = Exchange(method, url, body, timeout, max_bytes)
        try:
            try:
                return await self._exchange_once(exchange)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not exchange.was_kept:
                    raise
            return await self._exchange_once(exchange)
        except TransportError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            hint = _hint(url, error, self._proxy_for(url))
            raise TransportError(words_of(error) + hint) from None

    async def _exchange_once(self, exchange: Exchange) -> tuple[int, bytes]:
        # As it is written: otherwise yarl would replace what it takes for the same.
        target = yarl.URL(exchange.url, encoded=True)
        proxy = self._proxy_for(exchange.url)
        async with self._session_for(exchange.url).request(
            exchange.method, target, data=exchange.body or None, headers=HEADERS,
            timeout=exchange.timeout, allow_redirects=False, proxy=proxy,
            trace_request_ctx=exchange,
        ) as response:
            if response.status in REDIRECTS:
                raise TransportError(
                    f"it sends elsewhere ({response.status}), as networks do where users have to"
                    " log in: open a web page there")
            if proxy is not None and response.status == PROXY_REFUSES:
                raise TransportError(f"the proxy refuses ({response.status})")
            bounded = cast(BoundedResponse, response)
            bounded.receive.allow(CHUNKED_BYTES * exchange.max_bytes)
            return response.status, await _read(response.content, exchange.max_bytes)

    def _make_sessions(self) -> None:
        # Two pools: a connection to a relay of one's own serves nobody else, and neither do its
        # lookups wait for those of hosts that contacts name.
        self._open = make_session(self._tls, public_only=False)
        self._guarded = make_session(self._tls, public_only=True)

    async def renew(self) -> None:
        """Close all connections, and make new ones from now on: the network may be another one."""
        former = (self._open, self._guarded)
        self._make_sessions()
        for session in former:
            await session.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._open.close()
        await self._guarded.close()

    def _session_for(self, url: str) -> aiohttp.ClientSession:
        """Return the pool for a URL; raise TransportError for a private one of somebody else."""
        if self._may_be_private(url):
            return self._open
        if is_refused(origin_of(url).host):
            raise TransportError(PRIVATE)
        if self._proxy_for(url) is not None:
            # The proxy looks names up, and may itself be in a private network.
            return self._open
        return self._guarded

    def _proxy_for(self, url: str) -> yarl.URL | None:
        """Return the proxy that the environment names for a URL; raise TransportError."""
        parts = urllib.parse.urlsplit(url)
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all")
        if not proxy or urllib.request.proxy_bypass(parts.netloc):
            return None
        return _proxy_url(proxy)


def _proxy_url(proxy: str) -> yarl.URL:
    """Return the URL of a proxy; raise TransportError, which shows no password."""
    if "://" not in proxy:
        # As curl and others read it.
        proxy = f"http://{proxy}"
    try:
        url = yarl.URL(proxy)
    except ValueError:
        raise TransportError("the environment names a proxy with a damaged URL") from None
    if url.scheme not in PROXY_SCHEMES:
        kinds = " or ".join(PROXY_SCHEMES)
        raise TransportError(f"the environment names a proxy of the kind {url.scheme}, not {kinds}")
    if not url.host:
        raise TransportError("the environment names a proxy without a host")
    return url


def _always(_url: str) -> bool:
    return True


def make_session(
    tls: ssl.SSLContext, *, public_only: bool,
) -> aiohttp.ClientSession:
    """Return a pool of connections. One for relays that others have named leads nowhere private."""
    reuse = aiohttp.TraceConfig()
    reuse.on_connection_reuseconn.append(_note_reuse)
    keeping: dict[str, Any] = {"keepalive_timeout": KEEP_ALIVE_S}
    if public_only:
        # Others have named the relay, which may send anything on a connection that is idle.
        keeping = {"force_close": True}
    return aiohttp.ClientSession(
        # The tasks of lines and senders are bounded, and so are the connections. Addresses are not
        # remembered: a contact may name ever new hosts, and few connections begin.
        connector=BoundedConnector(
            limit=0, ssl=tls, resolver=DaemonResolver(public_only=public_only),
            use_dns_cache=False, **keeping),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        max_line_size=MAX_LINE_BYTES,
        max_field_size=MAX_LINE_BYTES,
        response_class=BoundedResponse,
        trace_configs=[reuse],
    )


def _ssl_of(ca_file: str | None) -> ssl.SSLContext:
    """Return what relays' certificates are checked with; raise UsageError."""
    context = make_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is None:
        return context
    try:
        context.load_verify_locations(ca_file)
    except OSError as error:
        why = _reason_of(error)
        raise UsageError(f"The certificates in {ca_file} cannot be read: {why}.") from None
    return context


async def _note_reuse(_session: object, context: Any, _params: object) -> None:
    context.trace_request_ctx.was_kept = True


def words_of(error: Exception) -> str:
    """Return why an exchange failed. What aiohttp says itself may have a proxy's password in it."""
    for kind, words in _WORDS:
        if isinstance(error, kind):
            return words(error)
    return type(error).__name__


def _hint(url: str, error: Exception, proxy: yarl.URL | None) -> str:
    """Return what may be behind a failure that does not tell: a proxy, or a port of TLS."""
    if isinstance(error, aiohttp.ClientHttpProxyError | aiohttp.ClientProxyConnectionError):
        return ""
    has_ended = isinstance(
        error, aiohttp.ServerDisconnectedError | aiohttp.ClientResponseError | ConnectionResetError)
    if proxy is not None and (has_ended or isinstance(error, TimeoutError)):
        return f"; the environment names a proxy for it, {proxy.host}:{proxy.port}"
    if url.startswith("http:") and has_ended:
        return "; if it speaks TLS, its address begins with https://"
    return ""


def _reason_of(error: OSError) -> str:
    """Return why there was no connection, in the words of the system or of TLS."""
    match error:
        case ssl.SSLCertVerificationError():
            return _said_of_certificate(error)
        case ssl.SSLError(reason=str(reason)) if reason in NO_TLS:
            return "it does not speak TLS on this port; its address may begin with http://"
        case ssl.SSLError(reason=str(reason)) if reason:
            # Its number is one of TLS, not of the system.
            return f"TLS: {reason.replace('_', ' ').lower()}"
        case ssl.SSLError():
            return f"TLS: {error.strerror or type(error).__name__}"
        case OSError(errno=int(number)) if number > 0:
            return os.strerror(number)
    return _ERRNO.sub("", error.strerror or str(error)) or type(error).__name__


def _said_of_certificate(error: Exception) -> str:
    why = getattr(error, "verify_message", "") or type(error).__name__
    said = f"its certificate is not accepted: {why.rstrip('.')}"
    code = getattr(error, "verify_code", 0)
    if code in SIGNED_BY_NOBODY:
        return f"{said}; if it is yours, name it with --ca FILE (ca_file) or SSL_CERT_FILE"
    if code in (NOT_YET_VALID, EXPIRED):
        now = datetime.datetime.now(datetime.UTC)
        return f"{said}; or this device's clock is wrong: it shows {now:%Y-%m-%d %H:%M} UTC"
    return said


def _said_of_proxy(error: aiohttp.ClientHttpProxyError) -> str:
    return f"the proxy refuses ({error.status})"


def _said_of_way_to_proxy(error: aiohttp.ClientProxyConnectionError) -> str:
    return f"the proxy cannot be reached: {_reason_of(error.os_error)}"


def _said_of_way(error: aiohttp.ClientConnectorError) -> str:
    return _reason_of(error.os_error)


def _said_of_reply(error: aiohttp.ClientResponseError) -> str:
    return f"it does not speak HTTP: {error.message}"


def _said_of_end(_error: aiohttp.ServerDisconnectedError) -> str:
    return "it closed the connection"


def _said_of_time(_error: TimeoutError) -> str:
    return "timed out"


def _said_of_body(_error: aiohttp.ClientPayloadError) -> str:
    return "its reply was cut off"


def _said_of_connection(error: OSError) -> str:
    # TLS may fail once the connection is there.
    if isinstance(error.__cause__, OSError):
        error = error.__cause__
    return _reason_of(error)


# The first that fits counts.
_WORDS: tuple[tuple[type[Exception], Callable[[Any], str]], ...] = (
    (ReplyError, str),
    (TimeoutError, _said_of_time),
    (aiohttp.ClientHttpProxyError, _said_of_proxy),
    (aiohttp.ClientProxyConnectionError, _said_of_way_to_proxy),
    (aiohttp.ClientConnectorError, _said_of_way),
    (aiohttp.ClientResponseError, _said_of_reply),
    (aiohttp.ServerDisconnectedError, _said_of_end),
    (aiohttp.ClientPayloadError, _said_of_body),
    (OSError, _said_of_connection),
)


async def _read(stream: aiohttp.StreamReader, max_bytes: int) -> bytes:
    octets = bytearray()
    async for chunk in stream.iter_any():
        octets += chunk
        if len(octets) > max_bytes:
            raise TransportError(f"a reply over {max_bytes // 1024:,} KiB")
    return bytes(octets)
