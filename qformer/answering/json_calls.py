"""Requests for JSON to a server that nobody vouches for: bounded in time and size, tried again, never redirected."""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.request
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LARGEST = 4 << 20  # bytes of a reply; a longer one is no answer to a question
BLOCK = 1 << 16
LONGEST_WAIT = 30.0  # seconds, whatever a server asks for
AGAIN = {408, 409, 425, 429, *range(500, 600)}  # states that may pass
SHOWN = 200  # characters of a server's own words in a message


class Fault(Exception):
    """A request without a usable reply, after all tries: one line that says why.

    Attributes:
        status: the state that the server gave, such as 404; 0 where it gave none, or a reply that cannot be used.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Reply(NamedTuple):
    """A state and the body that came with it, as text; and how many seconds the server asks to wait."""

    status: int
    text: str
    wait: float


class _Stay(urllib.request.HTTPRedirectHandler):
    """Refusal of redirects: they would carry the key and the pictures to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_Stay())


def request_json(
    url: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    tries: int = 3,
    wait: float = 1.0,
    read: Callable[[Any], Any] = lambda values: values,
) -> Any:
    """Get `url`, or post `body` to it as JSON, and return what `read` makes of the reply's JSON.

    Args:
        timeout: seconds for a whole reply, from the connection to its last byte.
        tries: a state of 429 or 500 and more, a lost connection and a reply that cannot be used are tried again.
        wait: seconds before the second try, doubled before each further one; a server may ask for more (`Retry-After`).
        read: raises ValueError, TypeError, KeyError or IndexError where the JSON has another shape.

    Raises:
        Fault: no usable reply.
    """
    data = None if body is None else json.dumps(body).encode()
    for left in range(tries - 1, -1, -1):
        asked = 0.0
        try:
            reply = _in_time(url, data, {"Content-Type": "application/json", **(headers or {})}, timeout)
            asked = reply.wait
            if reply.status == 200:
                return read(json.loads(reply.text))
            fault = Fault(f"state {reply.status}{_quoted(reply.text)}", reply.status)
        except json.JSONDecodeError:
            fault = Fault(f"no JSON{_quoted(reply.text)}")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            fault = Fault(f"JSON of another shape{_quoted(reply.text)}")
        except Fault as own:
            fault = own
        if not left or (fault.status and fault.status not in AGAIN):
            raise fault
        time.sleep(min(max(wait, asked), LONGEST_WAIT))
        wait *= 2
    raise ValueError(f"tries is {tries}; give 1 or more")


def _quoted(text: str) -> str:
    """The server's own words behind a colon: one line without control characters."""
    words = shorten("".join(c if c.isprintable() else " " for c in text[: 10 * SHOWN]), SHOWN, placeholder=" ...")
    return f": {words}" if words else ""


def _in_time(url: str, data: bytes | None, headers: Mapping[str, str], timeout: float) -> Reply:
    """One reply within so many seconds.

    The limits of sockets are for one read each, so a server that sends a byte now and then would hold them for ever;
    hence a thread, which is left alone when its time is over.

    Raises:
        Fault: none came.
    """
    found: queue.Queue[Reply | Fault] = queue.Queue()
    over = threading.Event()

    def work() -> None:
        try:
            found.put(_fetch(url, data, headers, timeout, over))
        except Fault as fault:
            found.put(fault)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            found.put(Fault(f"nothing for {timeout:g} s" if late else f"no reply{_quoted(str(reason))}"))

    threading.Thread(target=work, daemon=True).start()
    try:
        reply = found.get(timeout=timeout)
    except queue.Empty:
        raise Fault(f"no whole reply in {timeout:g} s") from None
    finally:
        over.set()
    if isinstance(reply, Fault):
        raise reply
    return reply


def _fetch(url: str, data: bytes | None, headers: Mapping[str, str], timeout: float, over: threading.Event) -> Reply:
    request = urllib.request.Request(url, data, dict(headers))
    try:
        opened = OPENER.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        opened = error  # it has a body as well
    with opened:
        parts, size = [], 0
        while not over.is_set() and (block := opened.read1(BLOCK)):
            parts.append(block)
            size += len(block)
            if size > LARGEST:
                raise Fault(f"a reply of more than {LARGEST >> 20} MiB")
        asked = opened.headers.get("Retry-After", "")
        wait = float(asked) if asked.isascii() and asked.isdecimal() else 0.0
        return Reply(opened.status, b"".join(parts).decode("utf-8", "replace"), wait)
