"""Login of the page: one name and password, limits on wrong tries, and the login form."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import TYPE_CHECKING

from qformer.demo.browser import FILES
from qformer.demo.hosts import network

if TYPE_CHECKING:
    from collections.abc import Callable

EACH = (5, 15.0)  # tries of one client, and seconds until it gets another
ALL = (30, 2.0)  # the same for all clients together
DEVICE = "qformer-device"  # cookie of a browser that has logged in before


class Password:
    """A name and a password; a call checks those that a visitor gave.

    Its duration depends neither on where they differ, nor on whether the name alone is right.
    """

    def __init__(self, user: str, password: str) -> None:
        self._user, self._password = _digest(user.strip()), _digest(password)

    def __call__(self, user: str, password: str) -> bool:
        is_user = hmac.compare_digest(_digest(user.strip()), self._user)
        is_password = hmac.compare_digest(_digest(password), self._password)
        return is_user and is_password


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class Tries:
    """Limits on password guessing, for each client and for all clients together.

    A client is a browser that has logged in before, recognized by a cookie that cannot be forged, or else an address.
    Known browsers do not count toward the common limit, so that guessing from many addresses cannot lock them out; a
    single address uses up its own tries long before the common ones. A correct password gives the tries back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._paid: dict[str, float] = {}  # time at which a client will have all its tries again
        self._key = secrets.token_bytes(32)

    def take(self, client: str) -> float:
        """Take one of a client's tries; returns 0, or the seconds to wait if none is left."""
        now = self._clock()
        self._paid = {name: paid for name, paid in self._paid.items() if paid > now}
        counts = self._counts(client)
        waits = [self._paid.get(name, now) + (1 - size) * period - now for name, (size, period) in counts.items()]
        if max(waits) > 0:
            return max(waits)
        for name, (_, period) in counts.items():
            self._paid[name] = self._paid.get(name, now) + period
        return 0.0

    def give_back(self, client: str) -> None:
        """Give back a client's tries after a correct password."""
        self._paid.pop(client, None)
        if "" in self._counts(client):
            self._paid[""] = self._paid.get("", 0.0) - ALL[1]

    def client(self, address: str, cookie: str | None) -> str:
        """Identify a client by the address of a request and its cookie `DEVICE`."""
        nonce, _, signature = (cookie or "").partition(".")
        if nonce and hmac.compare_digest(signature.encode(), self._sign(nonce).encode()):
            return f"{DEVICE} {nonce}"
        return f"address {network(address)}"

    def cookie(self) -> str:
        """Make a new value of the cookie `DEVICE`."""
        nonce = secrets.token_urlsafe(16)
        return f"{nonce}.{self._sign(nonce)}"

    def _sign(self, nonce: str) -> str:
        return hmac.new(self._key, nonce.encode(), "sha256").hexdigest()

    def _counts(self, client: str) -> dict[str, tuple[int, float]]:
        return {client: EACH} if client.startswith(DEVICE) else {client: EACH, "": ALL}


# Replaces Gradio's own form, which comes with the names of all functions.
FORM = (FILES / "login.html").read_text(encoding="utf-8")
FORM_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'self'; img-src data:; frame-ancestors 'none'",
}
