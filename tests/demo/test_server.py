"""Left running: one call at a time, calls that end when nobody waits, a bounded queue, an orderly end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gradio as gr
import httpx
import pytest
import torch

from qformer.demo import app, backend, guard, limits, server, visits
from qformer.types import UsageError
from tests.demo.visitor import API, Visitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qformer.model.vision_language import VisionLanguageModel

ROOT = Path(__file__).parent.parent.parent
LONG = {"num_beams": 1, "max_new_tokens": 60, "min_new_tokens": 60}


class Request:
    """What a page's function is handed of its visitor."""

    def __init__(self, session: str) -> None:
        self.session_hash = session


@pytest.fixture
def steps(model: VisionLanguageModel) -> Iterator[list[float]]:
    """When the first layer of the language model ran; it takes a tenth of a second more here, as on a larger model."""
    times: list[float] = []

    def slow(_layer: Any, inputs: Any) -> None:
        times.append(time.monotonic())
        time.sleep(0.1)

    handle = model.llm.model.model.decoder.layers[0].register_forward_pre_hook(slow)
    yield times
    handle.remove()


@pytest.fixture
def tiles(model: VisionLanguageModel, picture: Path) -> Any:
    return model.frontend.tiles([limits.open_picture(picture)])


def until(holds: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """`work` in the background: its result or error is in the list in the end."""
    results: list[Any] = []

    def catch() -> None:
        try:
            results.append(work())
        except UsageError as error:
            results.append(str(error))

    thread = threading.Thread(target=catch, daemon=True)
    thread.start()
    return thread, results


def test_one_call_at_a_time() -> None:
    made = server.Gate()
    inside: list[int] = []

    def work(number: int) -> int:
        inside.append(number)
        time.sleep(0.01)
        assert inside[-1] == number
        return number

    threads = [in_thread(lambda number=number: made.run(work, number)) for number in range(8)]
    for thread, _ in threads:
        thread.join()
    assert [results for _, results in threads] == [[number] for number in range(8)]
    assert made.count == 0


def test_a_cancelled_call_frees_the_model_and_others_go_on(
    model: VisionLanguageModel, gate: server.Gate, tiles: Any, steps: list[float]
) -> None:
    plain = model.generate(tiles, num_beams=1, max_new_tokens=3)
    first, said = in_thread(lambda: gate.run(model.generate, tiles, request=Request("one"), **LONG))
    until(lambda: len(steps) > 5)
    second, other = in_thread(
        lambda: gate.run(model.generate, tiles, request=Request("two"), num_beams=1, max_new_tokens=3)
    )
    until(lambda: gate.count == 2)
    before = len(steps)
    gate.cancel("one")
    first.join(20)
    second.join(20)
    assert said == ["the request was cancelled"]
    assert other == [plain]
    assert len(steps) - before <= 5  # of the first one at most, and three of the second


def test_beam_search_and_streams_are_stopped_too(
    model: VisionLanguageModel, gate: server.Gate, tiles: Any, steps: list[float]
) -> None:
    thread, said = in_thread(lambda: gate.run(model.generate, tiles, request=Request("beams"), min_new_tokens=30))
    until(lambda: len(steps) > 2)
    gate.cancel("beams")
    thread.join(20)
    assert said == ["the request was cancelled"]

    def stream() -> Iterator[str]:
        with gate.running(Request("stream")):
            yield from model.stream(tiles, **LONG)

    pieces = stream()
    next(pieces)
    gate.cancel("stream")
    with pytest.raises(server.Stopped, match="cancelled"):
        list(pieces)
    assert len(steps) < 40
    assert gate.count == 0


def test_a_stream_that_is_not_read_to_its_end_frees_the_model(
    model: VisionLanguageModel, gate: server.Gate, tiles: Any
) -> None:
    def stream() -> Iterator[str]:
        with gate.running():
            yield from model.stream(tiles, **LONG)

    pieces = stream()
    next(pieces)
    assert gate.count == 1
    pieces.close()
    assert gate.count == 0
    assert gate.run(lambda: 3) == 3


def test_a_call_that_takes_too_long_is_told_so(model: VisionLanguageModel, tiles: Any, steps: list[float]) -> None:
    hasty = server.Gate(timeout=0.5)
    hasty.watch(model, "test")
    with pytest.raises(UsageError, match=r"took longer than 0\.5 seconds and was stopped; ask for fewer words"):
        hasty.run(model.generate, tiles, **LONG)
    assert len(steps) < 20


def test_a_stopped_gate_lets_running_calls_finish_and_refuses_others() -> None:
    made = server.Gate()
    release = threading.Event()
    running, answer = in_thread(lambda: made.run(release.wait, 20))
    waiting, told = in_thread(lambda: made.run(lambda: 3))
    until(lambda: made.count == 2)
    assert not made.stop(0.05)
    release.set()
    assert made.stop(20)
    running.join()
    waiting.join()
    assert answer == [True]
    assert told == [guard.CLOSED]


def test_a_page_that_was_built_elsewhere_is_not_served(tmp_path: Path, gate: server.Gate) -> None:
    with pytest.raises(ValueError, match="not the `workplace` in which the page was built"):
        server.launch(None, folder=tmp_path, gate=gate, block=False)


def test_the_workplace_goes_with_all_in_it() -> None:
    before = os.environ.get("GRADIO_TEMP_DIR")
    with server.workplace() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder / server.UPLOADS)
        (folder / server.UPLOADS / "a.png").touch()
    assert not folder.exists()
    assert os.environ.get("GRADIO_TEMP_DIR") == before


@contextmanager
def narrow(model: VisionLanguageModel, gate: server.Gate, queue: int) -> Iterator[tuple[Any, Visitor]]:
    """A page with a function that streams and one that does not, and room for few."""

    def tell(picture: str) -> Iterator[str]:
        with gate.running():
            told = ""
            for piece in model.stream(model.frontend.tiles([limits.open_picture(picture)]), **LONG):
                told += piece
                yield told

    def say(picture: str) -> str:
        try:
            tiles = model.frontend.tiles([limits.open_picture(picture)])
            return gate.run(model.generate, tiles, **LONG)[0]
        except UsageError as error:
            raise gr.Error(str(error)) from error

    with server.workplace() as folder:
        with gr.Blocks(analytics_enabled=False) as page:
            picture = gr.Image(type="filepath", image_mode=None)
            said = gr.Textbox()
            gr.Button().click(tell, picture, said, api_name="tell")
            gr.Button().click(say, picture, said, api_name="say")
        _, url, _ = server.launch(page, folder=folder, gate=gate, queue=queue, block=False)
        yield page, Visitor(url)
        server.close(page, gate, wait=5)
        gate.stopping = False


def test_the_queue_is_bounded_and_a_wait_shows_its_place(
    model: VisionLanguageModel, gate: server.Gate, picture: Path, steps: list[float]
) -> None:
    with narrow(model, gate, queue=2) as (_, visitor):
        shown = visitor.picture(picture)
        visitor.post([shown], "say", session_hash="running")
        until(lambda: visitor.health()["running"] == 1)
        visitor.post([shown], "say", session_hash="second")
        join = {"data": [shown], "fn_index": 1, "session_hash": "third"}
        assert visitor.http.post(f"{API}/queue/join", json=join).status_code == 200
        state = visitor.health()
        assert (state["status"], state["running"], state["waiting"]) == ("ok", 1, 2)
        refused = visitor.post([shown], "say")
        assert refused.status_code == 503
        assert refused.json()["detail"] == "2 requests are waiting, which is the limit; try again in a moment"
        with visitor.http.stream("GET", f"{API}/queue/data", params={"session_hash": "third"}) as response:
            lines = (line for line in response.iter_lines() if '"estimation"' in line)
            assert re.search(r'"rank":1,"queue_size":2', next(lines))
        # who stops listening gives up the place, too
        until(lambda: visitor.health()["waiting"] == 1)
        gate.cancel()


def test_who_leaves_or_cancels_frees_the_model(
    model: VisionLanguageModel, gate: server.Gate, picture: Path, steps: list[float]
) -> None:
    with narrow(model, gate, queue=8) as (page, visitor):
        shown = visitor.picture(picture)
        for name in ("tell", "say"):  # streaming, and not
            steps.clear()
            event = visitor.post([shown], name).json()["event_id"]
            with visitor.http.stream("GET", f"{API}/call/{name}/{event}") as response:
                lines = response.iter_lines()  # when it goes, the connection is closed
                if name == "tell":
                    assert "generating" in next(lines)
                until(lambda: len(steps) > 3)
            until(lambda: visitor.health()["running"] == 0)
            assert len(steps) < 30
        steps.clear()
        join = {"data": [shown], "fn_index": 0, "session_hash": "here"}
        event = visitor.http.post(f"{API}/queue/join", json=join).json()["event_id"]
        until(lambda: len(steps) > 3)
        cancel = {"session_hash": "here", "fn_index": 0, "event_id": event}
        assert visitor.http.post(f"{API}/cancel", json=cancel).status_code == 200
        until(lambda: visitor.health()["running"] == 0)
        assert len(steps) < 30
        steps.clear()
        assert visitor.outcome([shown], "say")[0] == "complete"
        assert not page.app.iterators


def test_an_answer_that_ends_while_it_is_cancelled_is_cancelled(model: VisionLanguageModel, gate: server.Gate) -> None:
    with narrow(model, gate, queue=8) as (page, visitor):

        class Ending:
            async def aclose(self) -> None:
                del page.app.iterators["event"]

        page.app.iterators["event"] = cast("Any", Ending())
        cancel = {"session_hash": "here", "fn_index": 0, "event_id": "event"}
        response = visitor.http.post(f"{API}/cancel", json=cancel)
        assert (response.status_code, response.json()) == (200, {"success": True})


def test_state_and_files_of_those_who_are_gone_are_removed(
    model: VisionLanguageModel, gate: server.Gate, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with narrow(model, gate, queue=8) as (page, visitor):
        shown = visitor.picture(picture)
        for _ in range(3):
            assert visitor.outcome([shown], "say")[0] == "complete"
        assert len(page.app.state_holder.session_data) == 3
        file = Path(shown["path"])
        until(lambda: not page.visits.answering)
        until(lambda: page.visits.tidy() or not page.app.state_holder.session_data)
        assert not page._queue.pending_event_ids_session
        assert not page._queue.pending_messages_per_session
        assert not page.visits.until
        assert file.exists()  # may yet be asked about
        assert page.visits.stored() == file.stat().st_size
        monkeypatch.setattr(visits, "KEEP_FILES", -1)
        page.visits.tidy()
        assert list(page.visits.uploads.iterdir()) == []
        assert str(file) not in page.upload_file_set


SERVE = """
import sys, time, torch
from qformer.demo import app, backend, server
from qformer.checkpoints.loading import load_vision_language
model = load_vision_language(sys.argv[1], "cpu")
layer = model.llm.model.model.decoder.layers[0]
layer.register_forward_pre_hook(lambda *_: time.sleep(0.2))  # slow enough to be interrupted
gate = server.Gate()
gate.watch(model, "test")
with server.workplace() as folder:
    print(folder, flush=True)
    server.launch(app.build(backend.Models("test", model), gate, []), folder=folder, gate=gate)
print("after", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.weekly)])
def test_a_signal_ends_the_page_in_order(trained: Path, picture: Path, number: int) -> None:
    """What runs is answered, what waits is told, nothing is left behind."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(trained)], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        lines = iter(process.stdout.readline, "")
        folder = Path(next(line for line in lines if "qformer-demo-" in line).strip())
        address = re.search(r"http://\S+?/(?=;)", next(line for line in lines if "The page is at" in line))[0]
        visitor = Visitor(address)
        shown = visitor.picture(picture)
        events = []
        for count in range(3):
            events.append(visitor.post([shown, "what is it?", ""]).json()["event_id"])
            until(lambda count=count: visitor.health()["running"] + visitor.health()["waiting"] == count + 1)
        streams = [in_thread(lambda event=event: list(visitor.events(event))[-1]) for event in events]
        until(lambda: visitor.health()["running"] == 1)
        process.send_signal(number)
        until(lambda: visitor.health()["status"] == "stopping")
        assert visitor.post([shown, "what is it?", ""]).status_code == 503
        for thread, _ in streams:
            thread.join(60)
        (answered, *refused) = [results[0] for _, results in streams]
        assert answered[0] == "complete", answered
        assert [(kind, value["error"]) for kind, value in refused] == [("error", guard.CLOSED)] * 2
        assert process.wait(30) == 0
        assert "after" in process.stdout.read()
        assert not folder.exists()
        with pytest.raises(httpx.ConnectError):
            visitor.health()
    finally:
        process.kill()
        process.stdout.close()


def test_a_page_ends_though_calls_do_not(model: VisionLanguageModel, picture: Path, steps: list[float]) -> None:
    slow = server.Gate()
    slow.watch(model, "test")
    with server.workplace() as folder:
        page = app.build(backend.Models("test", model), slow, [])
        _, url, _ = server.launch(page, folder=folder, gate=slow, block=False)
        visitor = Visitor(url)
        event = visitor.post([visitor.picture(picture), "", ""]).json()["event_id"]
        thread, results = in_thread(lambda: list(visitor.events(event))[-1])
        until(lambda: len(steps) > 1)
        assert not server.close(page, slow, wait=0.1)
        thread.join(20)
        assert results[0][0] == "error"
        assert results[0][1]["error"] == "the request was cancelled"


def test_hooks_do_not_change_what_the_model_says(model: VisionLanguageModel, gate: server.Gate, tiles: Any) -> None:
    asked = {"num_beams": 2, "max_new_tokens": 5, "return_ids": True}
    plain = model.generate(tiles, **asked)
    assert torch.equal(gate.run(model.generate, tiles, **asked), plain)
