"""The server of the page: one call of the model at a time, a bounded queue, and an orderly shutdown.

Gradio keeps the queue and shows each visitor the position in it. `Gate` is in front of the model: it stops a call whose
visitor left or cancelled or which takes too long, and refuses new ones during shutdown. `qformer.demo.guard` is in
front of Gradio.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it on import

from gradio.context import LocalContext
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from torch import nn

from qformer.demo import limits
from qformer.demo.guard import CLOSED, REFUSAL, Guard
from qformer.demo.hosts import Hosts
from qformer.demo.password import Password
from qformer.demo.visits import Visits
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

UPLOADS = "uploads"
PLACE = "qformer-demo-"  # prefix of the names of temporary folders
LOCK = "lock"  # a file in each of them, locked while its page runs
TIDY_EVERY = 30.0  # seconds
PORT_FAULTS = {errno.EADDRINUSE: "is taken", errno.EACCES: "is for administrators alone"}
OFF: dict[str, Any] = dict.fromkeys(
    ("run_history", "enable_monitoring", "ssr_mode", "mcp_server", "pwa", "inline"), False
)
OFF["footer_links"] = ["api"]  # not Gradio's settings, which show texts for developers
DELIVERY = 5.0  # seconds for the last responses to reach their visitors


class Stopped(UsageError):
    """Error for a call of the model that was stopped from outside."""


class Call:
    """One visitor's call of the model."""

    def __init__(self, session: str | None, timeout: float) -> None:
        self.session = session
        self.timeout = timeout
        self.deadline = float("inf")  # set when the model is free
        self.cancelled = False

    def check(self) -> None:
        """Raise `Stopped` if the call was cancelled or takes too long; for loops that do not run the model."""
        if self.cancelled:
            raise Stopped("the request was cancelled")
        if time.monotonic() > self.deadline:
            raise Stopped(
                f"the answer took longer than {self.timeout:g} seconds and was stopped; "
                "ask for fewer words or beams, or give a smaller picture"
            )


class Gate:
    """One model for many visitors: one call at a time, which can be stopped between two layers of the model.

    Args:
        timeout: longest duration of a call in seconds, not counting its wait.
    """

    def __init__(self, timeout: float = 120) -> None:
        self.timeout = timeout
        self.name = ""
        self.stopping = False
        self.visits: Visits | None = None  # of the page, once it is served
        self._model = threading.Lock()  # held during a call; another thread releases that of a streaming one
        self._calls: list[Call] = []
        self._current: Call | None = None
        self._changed = threading.Condition()

    def watch(self, model: nn.Module, name: str) -> None:
        """Make calls of `model` stoppable; `/health` reports its `name`."""
        self.name = name
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for layer in (layer for stack in stacks for layer in stack):
            layer.register_forward_pre_hook(self._check)

    def _check(self, _layer: nn.Module, _inputs: Any) -> None:
        if (call := self._current) is not None:
            call.check()

    @property
    def count(self) -> int:
        """Number of calls that run or wait for the model."""
        return len(self._calls)

    @contextmanager
    def running(self, request: Any = None) -> Iterator[Call]:
        """Reserve the model until the end of the block, which can be left in another thread.

        Args:
            request: Gradio's request; when its visitor leaves, the call of that session is stopped. Not needed inside
                a function of a page.

        Raises:
            Stopped: the page is shutting down. In the block, the model raises it if the call is cancelled or takes too
                long.
        """
        request = LocalContext.request.get(None) if request is None else request
        call = Call(getattr(request, "session_hash", None), self.timeout)
        with self._changed:
            self._calls.append(call)
        try:
            while not self._model.acquire(timeout=0.05):
                call.check()
            try:
                if self.stopping:
                    raise Stopped(CLOSED)
                call.deadline = time.monotonic() + self.timeout
                self._current = call
                call.check()
                yield call
            finally:
                self._current = None
                self._model.release()
        finally:
            with self._changed:
                self._calls.remove(call)
                self._changed.notify_all()

    def run(self, function: Callable[..., Any], *args: Any, request: Any = None, **options: Any) -> Any:
        """Call `function(*args, **options)` with the model reserved; raises the errors of `running`."""
        with self.running(request):
            return function(*args, **options)

    def cancel(self, session: str | None = None) -> None:
        """Stop the calls of a session, or all of them."""
        with self._changed:
            for call in self._calls:
                call.cancelled |= session is None or call.session == session

    def stop(self, wait: float) -> bool:
        """Accept no new calls, and let running ones finish; returns whether they did within `wait` seconds."""
        self.stopping = True
        with self._changed:
            return self._changed.wait_for(lambda: not self._calls, wait)


@contextmanager
def workplace() -> Iterator[Path]:
    """Create a temporary folder, the only one where Gradio keeps files; it is deleted in the end.

    Build and serve a page inside: Gradio's components read the folder when they are created. Folders left by killed
    pages are removed first.

    Raises:
        UsageError: the disk is full, now or while the page is built.
    """
    try:
        with _workplace() as folder:
            yield folder
    except OSError as error:
        if not limits.is_full(error):
            raise
        raise UsageError(
            f"there is no room for the page's files in '{tempfile.gettempdir()}' ({error.strerror}); "
            "free some, or set TMPDIR to a folder on another disk"
        ) from error


@contextmanager
def _workplace() -> Iterator[Path]:
    names = ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE")
    before = {name: os.environ.get(name) for name in names}
    # Also where a full disk keeps Python, and so this page, from having its temporary folder now.
    for place in {"/tmp", "/var/tmp", os.environ.get("TMPDIR") or "/tmp", tempfile.gettempdir()}:
        _remove_left_over(Path(place))
    with (
        tempfile.TemporaryDirectory(prefix=PLACE, ignore_cleanup_errors=True) as made,
        (Path(made) / "new").open("w") as lock,
    ):
        _lock(lock)
        Path(lock.name).rename(Path(made) / LOCK)  # locked before it gets the name
        folder = Path(made).resolve()
        (folder / UPLOADS).mkdir()
        os.environ.update(dict.fromkeys(names, str(folder / UPLOADS)))
        try:
            yield folder
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _remove_left_over(temporary: Path) -> None:
    """Remove folders of our own pages that were killed; never those of running pages or of anybody else."""
    for folder in temporary.glob(f"{PLACE}*"):
        with suppress(OSError):  # already gone, another user's, or still locked
            if folder.lstat().st_uid == os.getuid():
                with (folder / LOCK).open("r+") as lock:
                    _lock(lock)
                    shutil.rmtree(folder, ignore_errors=True)


def _lock(file: IO[str]) -> None:
    """Lock a file until this process ends in any way; raises `OSError` if another one holds the lock."""
    import fcntl  # Unix only, like the signals here

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_bind(hosts: Hosts, port: int | None = None) -> None:
    """Try to listen at the address and port of the page, before anything is loaded.

    Raises:
        UsageError: this machine has no such address, or the port is taken or not allowed.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(hosts.bind, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the page before may just have ended
            tried.bind(place)
    except OSError as error:
        if port and error.errno in PORT_FAULTS:
            why = PORT_FAULTS[error.errno]
            raise UsageError(
                f"port {port} of {hosts.bind} {why}; give another --port, or none for a free one"
            ) from error
        raise UsageError(
            f"--host '{hosts.bind}' is not an address of this machine ({error.strerror}); "
            "give 127.0.0.1 for this machine alone, 0.0.0.0 for all its addresses, or one of them"
        ) from error


def launch(
    page: Any,
    *,
    folder: Path,
    gate: Gate,
    port: int | None = None,
    queue: int = 64,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    hosts: Hosts | None = None,
    block: bool = True,
    **looks: Any,
) -> Any:
    """Serve a page on this machine; only files in `folder` are read or served.

    Args:
        page: Gradio's Blocks, built inside the `workplace` in `folder`.
        gate: the gate through which the page's functions reach the model.
        port: port to listen at; None for the first free one from 7860 on.
        queue: largest number of waiting requests; further ones are refused with a message.
        share: also serve at a public address, through servers of Gradio.
        auth: name and password; without them, only the login form can be reached.
        hosts: address to listen at, names and root path; by default 127.0.0.1, at `/`.
        block: run until SIGTERM or SIGINT; then running calls finish, and waiting ones are refused; again: stop all.
        looks: `theme`, `css`, `head` and the like of Gradio's own `launch`.

    Returns:
        Gradio's (app, address, public address); shut it down with `close`.

    Raises:
        UsageError: the port is taken, or none is free.
    """
    uploads = folder / UPLOADS
    if os.environ.get("GRADIO_TEMP_DIR") != str(uploads):
        raise ValueError(f"'{folder}' is not the `workplace` in which the page was built; serve it from there")
    _use_one_queue(page, queue)
    hosts = hosts or Hosts()
    page.visits = gate.visits = Visits(page, uploads)
    check_bind(hosts, port)
    options = OFF | {"root_path": hosts.root_path, "share": share, "server_port": port} | looks
    options["app_kwargs"] = _middleware(page, gate, hosts, auth is not None, queue)
    options["auth"] = None if auth is None else Password(*auth)
    started = _start(page, f"[{hosts.bind}]" if ":" in hosts.bind else hosts.bind, options)
    page.visits.has_started = True
    if share and started[2]:
        hosts.add_address(started[2])
    if block:
        print(f"The page is at {started[1]}" + (f" and {started[2]}" if share else "") + "; Ctrl-C ends it", flush=True)
        _wait_for_signal(gate)
        close(page, gate)
    return started


def _start(page: Any, name: str, options: dict[str, Any]) -> Any:
    try:
        return page.launch(
            server_name=name,
            max_file_size=limits.MAX_BYTES,
            state_session_capacity=2000,
            prevent_thread_lock=True,
            quiet=True,
            **options,
        )
    except OSError as error:
        if error.errno:  # Gradio's own, about ports, has none
            raise
        raise UsageError("no port from 7860 to 7959 is free here; give a free one with --port") from error


def _middleware(page: Any, gate: Gate, hosts: Hosts, has_password: bool, queue: int) -> dict[str, Any]:
    """Options for Starlette beside Gradio's own: the guard in front, `/health`, and the removal of old files."""
    known = {"page": page, "gate": gate, "visits": page.visits, "hosts": hosts}
    guard = Middleware(Guard, **known, has_password=has_password, queue=queue)
    health = Route("/health", _health(page, gate))
    return {"routes": [health], "middleware": [guard], "lifespan": _make_lifespan(page.visits)}


def close(page: Any, gate: Gate, wait: float | None = None) -> bool:
    """Shut a page down: refuse new and waiting requests, let running ones finish, then stop the server.

    Args:
        wait: seconds for all of them, by default the longest duration of one call; then running calls are stopped.

    Returns:
        True if all calls finished by themselves.
    """
    end = time.monotonic() + (gate.timeout if wait is None else wait)
    calm = gate.stop(end - time.monotonic())
    if not calm:
        gate.cancel()
    until = max(end, time.monotonic() + DELIVERY)
    while (len(page.visits.queue) or gate.count) and time.monotonic() < until:  # waiting ones are refused in turn
        time.sleep(0.02)
    until = time.monotonic() + DELIVERY
    while page.visits.answering and time.monotonic() < until:
        time.sleep(0.02)
    page.close(verbose=False)
    return calm


def _use_one_queue(page: Any, size: int) -> None:
    # Gradio rebuilds a table of the last 10,000 requests for each new one.
    os.environ.update(GRADIO_ANALYTICS_MAX_EVENTS="100", GRADIO_ANALYTICS_CACHE_FREQUENCY="1000000000")
    page.queue(max_size=size, api_open=False, default_concurrency_limit=1)
    for function in page.fns.values():  # one queue, so that positions in it are true; a refusal does not wait
        refuses = function.api_name == REFUSAL
        function.concurrency_id, function.concurrency_limit = ("refusals", None) if refuses else ("model", 1)


def _health(page: Any, gate: Gate) -> Callable[[Any], Any]:
    async def health(_request: Any) -> JSONResponse:
        status = "stopping" if gate.stopping else "ok"
        return JSONResponse(
            {"status": status, "running": gate.count, "waiting": len(page.visits.queue), "model": gate.name},
            headers={"Cache-Control": "no-store"},
        )

    return health


def _wait_for_signal(gate: Gate) -> None:
    asked: list[int] = []  # no lock: the handler interrupts this thread anywhere

    def ask(number: int, _frame: Any) -> None:
        if asked:
            gate.cancel()
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    while not asked:  # polled, since a signal that another thread takes would not end a wait
        time.sleep(0.1)


def _make_lifespan(visits: Visits) -> Callable[[Any], Any]:
    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        async def tidy() -> None:
            while True:
                await asyncio.sleep(TIDY_EVERY)
                visits.tidy()

        task = asyncio.create_task(tidy())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    return lifespan
