"""Checks of the Host and Origin of requests: names under which the page is served, and sites that can send to it.

A browser sends two headers that a site cannot change: the name by which it found this machine (Host), and the site
whose script sends (Origin). A foreign name means that somebody else's DNS points here (rebinding), which would let that
site read all responses of the page; a foreign origin means that a site uses its visitors' browsers to get in.
Starlette's TrustedHostMiddleware checks names only, neither addresses nor origins, so it is not used.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

    Headers = Iterable[tuple[bytes, bytes]]

AUTHORITY = re.compile(r"(?:(\[[0-9a-f]*:[0-9a-f:.]*\])|([a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?)(?::([0-9]{0,5}))?")
PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)*/?")
PORTS = {"http": 80, "https": 443}
SAFE = ("GET", "HEAD")


class Address(NamedTuple):
    """A name or IP address in normal form (lower case, no brackets, no trailing dot), and the port if given."""

    name: str
    port: int | None = None


def parse_host(text: str) -> Address | None:
    """Parse a Host header; None if it is not a host, as with `user@`, a path, or several hosts."""
    found = AUTHORITY.fullmatch(text.lower())
    if found is None:
        return None
    bracketed, plain, digits = found.groups()
    name = _ip(bracketed[1:-1]) if bracketed else _ip(plain) or plain
    port = int(digits) if digits else None
    return None if name is None or (port or 0) > 65535 else Address(name, port)


def parse_origin(text: str) -> tuple[str, Address] | None:
    """Parse an Origin header into its scheme and address, with the scheme's port if none is given.

    Returns None for anything but http and https: `null`, which sandboxed frames and local files send, and extensions.
    """
    scheme, colon, rest = text.lower().partition("://")
    address = parse_host(rest) if colon and scheme in PORTS else None
    return None if address is None else (scheme, Address(address.name, address.port or PORTS[scheme]))


def is_loopback(name: str) -> bool:
    """Check for a name of the browser's own machine; resolvers never ask the network for these."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _ip(name) is not None and ipaddress.ip_address(name).is_loopback


def network(address: str) -> str:
    """Part of an IP address by which a visitor is told from others; a household has 2**64 addresses of version 6."""
    ip = _ip(address)
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip and ":" in ip else ip or address


def _ip(text: str) -> str | None:
    """Normal form of an IP address; an IPv4 address within IPv6 becomes the IPv4 address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)


class Hosts:
    """Names and path under which a page is served.

    A request must be sent to localhost, to an IP address (which DNS cannot redirect) or to one of `names`. If a proxy
    forwards the name that its visitor used (X-Forwarded-Host, the first if there are several), that name must be ours
    as well; it never excuses a foreign Host.

    Args:
        allow: additional names under which visitors reach the page.
        root_path: path, such as `/demo`, or whole address at which a proxy serves the page; the address adds its name.
        bind: name or address at which the server listens; adds the name.

    Raises:
        UsageError: an invalid name or path.
    """

    def __init__(self, allow: Iterable[str] = (), root_path: str = "", bind: str = "127.0.0.1") -> None:
        self.names = {_check_name("--allow-host", name) for name in allow}
        self.bind = _check_name("--host", bind)
        if _ip(self.bind) is None:
            self.names.add(self.bind)
        self.root_path = self.prefix = root_path.rstrip("/")
        known = True
        if "://" in root_path:
            scheme, _, rest = self.root_path.partition("://")
            authority, slash, path = rest.partition("/")
            self.prefix = slash + path
            known = self.add_address(f"{scheme}://{authority}")
        if not (known and PREFIX.fullmatch(self.prefix)):
            raise UsageError(
                f"--root-path takes a path such as /demo, or a whole address such as https://demo.example.org/demo, "
                f"but got '{root_path}'"
            )

    def add_address(self, url: str) -> bool:
        """Add the name in an address to ours, such as that of Gradio's share; returns False if there is none."""
        found = parse_origin("/".join(url.split("/", 3)[:3]))
        self.names |= {found[1].name} if found else set()
        return found is not None

    def is_own(self, name: str) -> bool:
        return name in self.names or is_loopback(name) or _ip(name) is not None

    def path(self, path: str) -> str:
        """Part of a path below the root path, which proxies may or may not strip; empty for the root path itself."""
        return path.removeprefix(self.prefix) if f"{path}/".startswith(f"{self.prefix}/") else path

    def refusal(self, method: str, path: str, headers: Headers) -> str | None:
        """Reason to refuse a request, or None if it is sent to one of our names, and not by another site.

        Args:
            path: path below the root path. A link on any site can open the page, at `/`, and nothing else.
        """
        found = _values(headers, b"host", b"x-forwarded-host", b"origin", b"sec-fetch-site")
        known: list[Address] = []
        forwarded = [value.split(",")[0].strip() for value in found[b"x-forwarded-host"][:1] if value]
        for text in found[b"host"] + forwarded:
            address = parse_host(text)
            if address is None:
                return f"'{text[:100]}' is not the name of a host; use one such as localhost:7860"
            if not self.is_own(address.name):
                return (
                    f"this page is not served under the name '{address.name[:100]}'; "
                    "if that is its name, start it with --allow-host and that name"
                )
            known.append(address)
        if len(found[b"host"]) != 1:
            return "a request must name one host (Host), such as localhost:7860"
        origins = found[b"origin"]
        if len(origins) > 1 or not all(self._is_own_origin(origin, known) for origin in origins):
            return (
                f"requests from pages of other sites are refused (Origin: {origins[0][:100]}); "
                "if that site is this page behind a proxy, start it with --allow-host and the name of the proxy"
            )
        if "cross-site" in found[b"sec-fetch-site"] and (method not in SAFE or path != "/"):
            return "requests from pages of other sites are refused; open this page itself"
        return None

    def _is_own_origin(self, text: str, known: list[Address]) -> bool:
        """Check for an origin that is the requested address, or one of our names at any port, as a proxy may have.

        For this machine, another port is accepted too: this is how a proxy appears that forwards its own Host.
        """
        parsed = parse_origin(text)
        if parsed is None:
            return False
        name, port = parsed[1]
        if name in self.names or (is_loopback(name) and is_loopback(known[-1].name)):
            return True
        return any(name == own.name and port in ((own.port,) if own.port else PORTS.values()) for own in known)

    def rewritten(self, scope: MutableMapping[str, Any], path: str) -> MutableMapping[str, Any]:
        """Rewrite the scope of a request for Gradio: below the root path, at the address that the browser shows.

        Gradio prepends that address to the files of its responses. It reads it from these headers, of which the browser
        itself sets the origin; X-Gradio-Server is for a server of Gradio's that we do not use.
        """
        headers = [(key, value) for key, value in scope["headers"] if key != b"x-gradio-server"]
        if origin := next((parse_origin(value.decode("latin-1")) for key, value in headers if key == b"origin"), None):
            scheme, address = origin
            name = f"[{address.name}]" if ":" in address.name else address.name
            shown = name if address.port == PORTS[scheme] else f"{name}:{address.port}"
            headers = [pair for pair in headers if pair[0] not in (b"x-forwarded-host", b"x-forwarded-proto")]
            headers += [(b"x-forwarded-host", shown.encode()), (b"x-forwarded-proto", scheme.encode())]
        return {**scope, "headers": headers, "root_path": self.prefix, "path": self.prefix + path}


def _check_name(option: str, text: str) -> str:
    """Check a name without scheme, port or path; returns its normal form, in other alphabets as DNS encodes it."""
    try:
        address = Address(_ip(text) or "") if _ip(text) else parse_host(text.encode("idna").decode())
    except UnicodeError:
        address = None
    if address is None or address.port is not None:
        raise UsageError(
            f"{option} takes a name such as demo.example.org, or an IP address, without scheme, port or path, "
            f"but got '{text}'"
        )
    return address.name


def _values(headers: Headers, *names: bytes) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = {name: [] for name in names}
    for key, value in headers:
        if key in found:
            found[key].append(value.decode("latin-1").strip())
    return found
