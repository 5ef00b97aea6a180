"""Connected visitors, their uploads, and what is kept for those who have left: all of it bounded."""

from __future__ import annotations

import shutil
import time
from collections import Counter, OrderedDict
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from qformer import compat
from qformer.demo.exchange import STALL, Refused
from qformer.demo.limits import NO_ROOM

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_STORED = 2_000_000_000  # bytes of pictures kept at once
SHARE = 200_000_000  # of these, for one visitor
LEAST = 65_536  # bytes that a file counts at least, which bounds their number
KEEP_FILES = 3600.0  # seconds
KEEP_SESSION = 600.0  # seconds without a connection; a laptop closed briefly keeps its conversation
KEEP_CALL = 60.0  # seconds without one for a client that never stayed connected, and for a response nobody fetches
UNREAD = 32  # sessions whose responses wait for a client that is not connected
MOST_CALLS = 16  # requests of a session that are not answered, or whose responses were not fetched
ONCE = "once-"  # prefix of the session of a request that named none


class Visits:
    """Connected visitors, and uploads and sessions kept for those who have left.

    Attributes:
        answering: number of open requests, except heartbeats. open: number of open streams by session.
        until: time until which a session without a stream is kept.
        refused: sentences about refused uploads, by the path that the client was given instead (`Guard`).
    """

    def __init__(self, page: Any, uploads: Path) -> None:
        self.page = page
        self.queue = compat.page_queue(page)
        self.uploads = uploads
        self.own = set(uploads.rglob("*"))  # examples of the page
        self.has_started = False  # whether the server runs, and Gradio itself sends no more requests
        self.answering = 0
        self.open: Counter[str] = Counter()
        self.until: dict[str, float] = {}
        self.refused: OrderedDict[str, str] = OrderedDict()
        self._visitors: dict[Path, str] = {}  # who sent a file
        self._coming: Counter[str] = Counter()  # bytes that are being sent
        self._lock = Lock()

    def stored(self) -> int:
        """Bytes of all uploads."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time, size and path of each upload, and of each picture that the page drew for a visitor."""
        for file in self.uploads.rglob("*"):
            with suppress(OSError):  # removed meanwhile
                if file not in self.own and file.is_file():
                    about = file.stat()
                    yield about.st_mtime, about.st_size, file

    @contextmanager
    def receiving(self, visitor: str, size: int) -> Iterator[None]:
        """Count an upload while it comes in.

        Raises:
            Refused: this visitor, or all together, are sending too much at once, or more than there is room for.
        """
        if self._coming[visitor] + size > SHARE:
            raise Refused(429, "your other uploads are still coming in; wait for them, then try again")
        if self._coming.total() + size > MAX_STORED:
            raise Refused(503, "too many pictures are coming in; try again in a moment")
        if self._coming.total() + size > shutil.disk_usage(self.uploads).free:
            raise Refused(507, NO_ROOM)
        self._coming[visitor] += size
        try:
            yield
        finally:
            self._coming[visitor] -= size
            self._coming = +self._coming

    def keep(self, files: list[Path], visitor: str) -> None:
        """Note who sent files, and make room: each visitor loses its own oldest files first.

        Beyond `SHARE` those of this visitor go, and beyond `MAX_STORED` those of whoever has most, so that nobody can
        take the room of the others.
        """
        with self._lock:
            for file in files:
                self._visitors.setdefault(file, visitor)
            held: dict[str, list[tuple[float, int, Path]]] = {}
            recent = time.time() - KEEP_CALL  # files of nobody: drawn, or still coming in
            for age, size, file in sorted(self._files()):
                who = self._visitors.get(file, "")
                if (who or age < recent) and file not in files:
                    held.setdefault(who, []).append((age, max(size, LEAST), file))
            sizes = Counter({who: sum(size for _, size, _ in kept) for who, kept in held.items()})
            sizes[visitor] += sum(max(file.stat().st_size, LEAST) for file in files if file.exists())
            while held.get(visitor) and sizes[visitor] > SHARE:
                self._drop(held, sizes, visitor)
            while sizes.total() > MAX_STORED:
                most = [one for one, _ in sizes.most_common() if held.get(one)]
                if not most:
                    break
                self._drop(held, sizes, most[0])

    def _drop(self, held: dict[str, list[tuple[float, int, Path]]], sizes: Counter[str], who: str) -> None:
        _, size, file = held[who].pop(0)
        sizes[who] -= size
        self.remove(file)

    def remove(self, file: Path) -> None:
        file.unlink(missing_ok=True)
        self._visitors.pop(file, None)
        if file.parent != self.uploads:
            with suppress(OSError):  # not empty
                file.parent.rmdir()
        for names in self.page.temp_file_sets:
            names.discard(str(file))

    def refuse(self, path: str, sentence: str) -> None:
        """Remember a sentence about a refused upload, for the request that will name it."""
        self.refused[path] = sentence
        while len(self.refused) > 4 * UNREAD:
            self.refused.popitem(last=False)

    def begin(self, session: str) -> None:
        """Note a request of a session.

        Raises:
            Refused: too many requests of this session are not answered, or their responses not fetched.
        """
        messages = self.queue.pending_messages_per_session
        calls = self.queue.pending_event_ids_session.get(session, set())
        if len(calls) >= MOST_CALLS and (session not in messages or messages[session].empty()):
            calls &= self.queue.event_ids_to_events.keys()  # Gradio keeps those whose visitor left
        if len(calls) >= MOST_CALLS:
            raise Refused(429, f"{MOST_CALLS} requests of this session have responses to fetch; fetch them first")
        self.until[session] = max(self.until.get(session, 0.0), time.time() + KEEP_CALL)
        # Gradio copies the configuration of every component into a session (250 KB), for links that we do not offer.
        self.page.app.state_holder[session].config_values.clear()
        if len(messages) > UNREAD:
            busy = self._busy()
            unread = [one for one, queue in messages.items() if not (self.open[one] or one in busy or queue.empty())]
            for one in unread[:-UNREAD]:
                self.forget(one)

    def end(self, session: str, stays: bool) -> None:
        """Note that a stream of a session has closed.

        Args:
            stays: the stream was that of an open page, whose visitor may come back.
        """
        self.open[session] -= 1
        if session.startswith(ONCE):  # complete
            self.until[session] = 0.0
        elif session in self.page.app.state_holder.session_data:
            keep = time.time() + (KEEP_SESSION if stays else KEEP_CALL)
            self.until[session] = max(self.until.get(session, 0.0), keep)

    def _busy(self) -> set[str]:
        return {event.session_hash for event in list(self.queue.event_ids_to_events.values())}

    def tidy(self) -> None:
        """Remove old uploads, and the state of sessions that have ended."""
        now = time.time()
        for age, _, file in list(self._files()):
            comes_in = file.parent == self.uploads and file.name.startswith("tmp")  # or did, until the disk was full
            if now - age > (2 * STALL if comes_in else KEEP_FILES):
                self.remove(file)
        states, queue, busy = self.page.app.state_holder, self.queue, self._busy()
        known = {*states.session_data, *queue.pending_event_ids_session, *queue.pending_messages_per_session}
        for session in known | set(self.until):
            if not (self.open[session] or session in busy or now < self.until.setdefault(session, now + KEEP_CALL)):
                self.forget(session)
        self.open = +self.open

    def forget(self, session: str) -> None:
        """Remove all that is kept for a session."""
        self.page.app.state_holder.session_data.pop(session, None)
        self.page.app.state_holder.time_last_used.pop(session, None)
        self.queue.pending_messages_per_session.pop(session, None)
        self.queue.pending_event_ids_session.pop(session, None)
        self.until.pop(session, None)
