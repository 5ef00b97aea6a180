"""How the page is served and left running: one call at a time into one model, a bounded queue, an orderly end.

Gradio has the queue and tells each visitor the place in it. `Gate` stands in front of the model: it stops a call whose
visitor left, cancelled or has waited too long, and refuses new ones at the end. `qformer.demo.guard` stands in front of
Gradio.
"""

from __future__ import annotations

import asyncio
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

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

from gradio.context import LocalContext
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from torch import nn

from qformer.demo import limits
from qformer.demo.guard import CLOSED, Guard, Visits
from qformer.demo.hosts import Hosts
from qformer.demo.password import Password
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

UPLOADS = "uploads"
PLACE = "qformer-demo-"  # how the names of temporary folders begin
LOCK = "lock"  # a file in each of them, locked while its page stands
TIDY_EVERY = 30.0  # seconds
OFF = dict.fromkeys(("run_history", "enable_monitoring", "ssr_mode", "mcp_server", "pwa", "inline"), False)
DELIVERY = 5.0  # seconds that the last answers have to reach their visitors


class Stopped(UsageError):
    """A call into the model was ended from outside."""


class Call:
    """One visitor's call into the model."""

    def __init__(self, session: str | None, timeout: float) -> None:
        self.session = session
        self.timeout = timeout
        self.deadline = float("inf")  # counts from the moment when the model is free
        self.cancelled = False

    def check(self) -> None:
        """Raises `Stopped` where the call was cancelled or has taken too long; for loops that do not run the model."""
        if self.cancelled:
            raise Stopped("the request was cancelled")
        if time.monotonic() > self.deadline:
            raise Stopped(
                f"the answer took longer than {self.timeout:g} seconds and was stopped; "
                "ask for fewer words or beams, or give a smaller picture"
            )


class Gate:
    """One model, many visitors: one call at a time, each of which can be stopped between two layers of the model.

    Args:
        timeout: seconds that a call may take, not counting its wait.
    """

    def __init__(self, timeout: float = 120) -> None:
        self.timeout = timeout
        self.name = ""
        self.stopping = False
        self._model = threading.Lock()  # held during a call; a streaming one is released by another thread
        self._calls: list[Call] = []
        self._current: Call | None = None
        self._changed = threading.Condition()

    def watch(self, model: nn.Module, name: str) -> None:
        """Make calls into `model` stoppable; `name` is what `/health` tells."""
        self.name = name
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for layer in (layer for stack in stacks for layer in stack):
            layer.register_forward_pre_hook(self._check)

    def _check(self, _layer: nn.Module, _inputs: Any) -> None:
        if (call := self._current) is not None:
            call.check()

    @property
    def count(self) -> int:
        """Calls that are in the model or in front of it."""
        return len(self._calls)

    @contextmanager
    def running(self, request: Any = None) -> Iterator[Call]:
        """The model for oneself, until the end of the block; it may be left in another thread.

        Args:
            request: Gradio's, by whose session the call is stopped when its visitor leaves. Inside a function of a page
                it need not be given.

        Raises:
            Stopped: the page is being stopped. In the block the model raises it where the call is cancelled or has
                taken too long.
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
        """`function(*args, **options)` with the model for itself; raises what `running` does."""
        with self.running(request):
            return function(*args, **options)

    def cancel(self, session: str | None = None) -> None:
        """Stop the calls of a session, or all of them."""
        with self._changed:
            for call in self._calls:
                call.cancelled |= session is None or call.session == session

    def stop(self, wait: float) -> bool:
        """Take no new calls, and let those in the model finish; whether they did so within `wait` seconds."""
        self.stopping = True
        with self._changed:
            return self._changed.wait_for(lambda: not self._calls, wait)


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder that goes with all in it, the only one where Gradio keeps files while it stands.

    A page is to be built and served inside: Gradio's components note the folder when they are made. What pages left
    that were killed is removed first.
    """
    names = ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE")
    before = {name: os.environ.get(name) for name in names}
    _remove_left_over(Path(tempfile.gettempdir()))
    with (
        tempfile.TemporaryDirectory(prefix=PLACE, ignore_cleanup_errors=True) as made,
        (Path(made) / "new").open("w") as lock,
    ):
        _lock(lock)
        Path(lock.name).rename(Path(made) / LOCK)  # locked from the moment when it has the name
        folder = Path(made).resolve()
        (folder / UPLOADS).mkdir()
        os.environ.update(dict.fromkeys(names, str(folder / UPLOADS)))
        try:
            yield folder
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _remove_left_over(temporary: Path) -> None:
    """Remove the folders of our own pages that ended without a chance to do so; nobody else's, and none that stands."""
    for folder in temporary.glob(f"{PLACE}*"):
        with suppress(OSError):  # gone meanwhile, another user's, or still locked
            if folder.lstat().st_uid == os.getuid():
                with (folder / LOCK).open("r+") as lock:
                    _lock(lock)
                    shutil.rmtree(folder, ignore_errors=True)


def _lock(file: IO[str]) -> None:
    """Lock a file for as long as it is open here; the kernel unlocks it when the process ends, however it does.

    Raises:
        OSError: another process has it.
    """
    import fcntl  # of Unix alone, as the signals here

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_bind(hosts: Hosts) -> None:
    """Try to listen where the page is to be served, before anything is loaded.

    Raises:
        UsageError: this machine has no such address.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(hosts.bind, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.bind(place)
    except OSError as error:
        raise UsageError(
            f"--host '{hosts.bind}' is no address of this machine ({error.strerror}); "
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
    """Serve a page on this machine, of whose files only those in `folder` are read or served.

    Args:
        page: Gradio's Blocks, built inside the `workplace` that `folder` is.
        gate: through which the page's functions reach the model.
        port: None: the first free one from 7860 on.
        queue: how many requests may wait; one more is refused with a sentence.
        share: also by a public address of Gradio's makers, through their machines.
        auth: name and password, without which nothing is answered but the form that asks for them.
        hosts: where to listen, under which names and below which path; by default on 127.0.0.1, at `/`.
        block: until SIGTERM or SIGINT: what runs then finishes, what waits is told; a second signal ends what runs too.
        looks: `theme`, `css`, `head` and the like of Gradio's own `launch`.

    Returns:
        Gradio's (app, address, public address); end it with `close`.

    Raises:
        OSError: the port is taken.
    """
    uploads = folder / UPLOADS
    if os.environ.get("GRADIO_TEMP_DIR") != str(uploads):
        raise ValueError(f"'{folder}' is not the workplace in which the page was built; see `workplace`")
    _one_queue(page, queue)
    hosts = hosts or Hosts()
    page.visits = Visits(page, uploads)
    started = page.launch(
        server_name=f"[{hosts.bind}]" if ":" in hosts.bind else hosts.bind,
        server_port=port,
        share=share,
        auth=None if auth is None else Password(*auth),
        root_path=hosts.root_path,
        max_file_size=limits.MAX_BYTES,
        app_kwargs=_around(page, gate, hosts, auth is not None, queue),
        state_session_capacity=2000,
        prevent_thread_lock=True,
        quiet=True,
        **OFF,
        **looks,
    )
    page.visits.has_started = True
    if share and started[2]:
        hosts.add_address(started[2])
    if block:
        print(f"The page is at {started[1]}" + (f" and {started[2]}" if share else "") + "; Ctrl-C ends it", flush=True)
        _until_signal(gate)
        close(page, gate)
    return started


def _around(page: Any, gate: Gate, hosts: Hosts, has_password: bool, queue: int) -> dict[str, Any]:
    """What Starlette has beside Gradio's own: the guard before everything, `/health`, and tidying."""
    known = {"page": page, "gate": gate, "visits": page.visits, "hosts": hosts}
    guard = Middleware(Guard, **known, has_password=has_password, queue=queue)
    health = Route("/health", _health(page, gate))
    return {"routes": [health], "middleware": [guard], "lifespan": _tidying(page.visits)}


def close(page: Any, gate: Gate, wait: float | None = None) -> bool:
    """End a page in order: no new requests, running ones finish, waiting ones are told, then the server goes.

    Args:
        wait: seconds for all of them, by default what one call may take; what runs then is stopped.

    Returns:
        Whether all ended by themselves.
    """
    end = time.monotonic() + (gate.timeout if wait is None else wait)
    calm = gate.stop(end - time.monotonic())
    if not calm:
        gate.cancel()
    until = max(end, time.monotonic() + DELIVERY)
    while (len(page.visits.queue) or gate.count) and time.monotonic() < until:  # each that waits is refused in its turn
        time.sleep(0.02)
    until = time.monotonic() + DELIVERY
    while page.visits.answering and time.monotonic() < until:
        time.sleep(0.02)
    page.close(verbose=False)
    return calm


def _one_queue(page: Any, size: int) -> None:
    # Gradio counts the last 10,000 requests in a table that it makes anew for each.
    os.environ.update(GRADIO_ANALYTICS_MAX_EVENTS="100", GRADIO_ANALYTICS_CACHE_FREQUENCY="1000000000")
    page.queue(max_size=size, api_open=False, default_concurrency_limit=1)
    for function in page.fns.values():
        function.concurrency_id, function.concurrency_limit = "model", 1  # one queue: a place in it is the real one


def _health(page: Any, gate: Gate) -> Callable[[Any], Any]:
    async def health(_request: Any) -> JSONResponse:
        status = "stopping" if gate.stopping else "ok"
        return JSONResponse(
            {"status": status, "running": gate.count, "waiting": len(page.visits.queue), "model": gate.name},
            headers={"Cache-Control": "no-store"},
        )

    return health


def _until_signal(gate: Gate) -> None:
    asked: list[int] = []  # no lock: the handler runs within whatever this thread is doing

    def ask(number: int, _frame: Any) -> None:
        if asked:
            gate.cancel()
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    while not asked:  # looked at again and again: a signal that another thread took would not end a wait of this one
        time.sleep(0.1)


def _tidying(visits: Visits) -> Callable[[Any], Any]:
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
