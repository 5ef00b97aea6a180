"""Traces of visitors that a page keeps: a share of the uploads each, and bounded sessions and responses."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from qformer.demo import server, visits
from qformer.demo.exchange import Refused
from tests.demo.test_let_in import png
from tests.demo.visitor import API, Visitor

UNIT = visits.LEAST


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of one function, which says again what it is told."""
    gate = server.Gate()
    with server.workplace() as folder:
        with gr.Blocks(analytics_enabled=False) as made:
            gr.Image(type="filepath", image_mode=None)
            text, back = gr.Textbox(), gr.Textbox()
            gr.Button().click(lambda text: text, text, back, api_name="say")
        _, made.url, _ = server.launch(made, folder=folder, gate=gate, block=False)
        yield made
        server.close(made, gate)


@pytest.fixture
def kept(page: Any) -> Iterator[visits.Visits]:
    """The visits of a page where nobody has been yet."""
    made = visits.Visits(page, page.visits.uploads)
    yield made
    for file in made.uploads.glob("*.png"):
        file.unlink()


def files(kept: visits.Visits, visitor: str, *names: str, size: int = 10) -> list[Path]:
    """Files that a visitor has sent, the first a minute before the next."""
    made = []
    for age, name in enumerate(names):
        file = kept.uploads / f"{visitor}-{name}.png"
        file.write_bytes(bytes(size))
        os.utime(file, (time.time() - 1000 + 60 * age,) * 2)
        made.append(file)
    return made


def test_a_visitor_who_sends_much_loses_its_own_oldest_files(
    kept: visits.Visits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "SHARE", 3 * UNIT)
    (theirs,) = files(kept, "b", "only")
    kept.keep([theirs], "192.0.2.2")
    mine = files(kept, "a", *"12345")
    for file in mine:
        kept.keep([file], "192.0.2.1")
    assert [file.exists() for file in mine] == [False, False, True, True, True]
    assert theirs.exists()
    large = files(kept, "a", "large", size=4 * UNIT)
    kept.keep(large, "192.0.2.1")  # what has just come stays, whatever its size
    assert [file.exists() for file in [*mine, *large, theirs]] == [False] * 5 + [True, True]


def test_who_stores_most_makes_room_for_all(kept: visits.Visits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is refused, and a visitor of one picture keeps it."""
    monkeypatch.setattr(visits, "MAX_STORED", 5 * UNIT)
    greedy, drawn = files(kept, "a", *"1234"), files(kept, "page", "drawn")
    kept.keep(greedy, "192.0.2.1")
    modest = files(kept, "b", "only")
    kept.keep(modest, "192.0.2.2")
    late = files(kept, "c", "late")
    kept.keep(late, "192.0.2.3")
    assert [file.exists() for file in [*greedy, *modest, *drawn, *late]] == [False, False, True, True, True, True, True]
    coming = kept.uploads / "coming.png"  # nobody's yet, and being written
    coming.write_bytes(bytes(9 * UNIT))
    kept.keep(late, "192.0.2.3")
    assert coming.exists()


def test_what_comes_in_at_once_is_bounded_for_each(kept: visits.Visits) -> None:
    with kept.receiving("192.0.2.1", visits.SHARE), ExitStack() as others:
        with pytest.raises(Refused, match="your other uploads are still coming in"), kept.receiving("192.0.2.1", 1):
            pass
        with kept.receiving("192.0.2.2", visits.SHARE):
            pass
        for number in range(9):
            others.enter_context(kept.receiving(f"10.0.0.{number}", visits.SHARE))
        with pytest.raises(Refused, match="too many pictures are coming in"), kept.receiving("192.0.2.3", 1):
            pass


def test_an_upload_is_counted_for_its_address(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visits, "SHARE", 2 * UNIT)
    visitor, other = Visitor(page.url), Visitor(page.url)
    visitor.http.headers["X-Forwarded-For"], other.http.headers["X-Forwarded-For"] = "192.0.2.1", "192.0.2.2"
    theirs = other.upload(png(), "theirs.png").json()[0]
    mine = [visitor.upload(png(), f"{number}.png").json()[0] for number in range(4)]
    assert [Path(file).exists() for file in mine] == [False, False, True, True]
    assert Path(theirs).exists()


def join(visitor: Visitor, session: str) -> int:
    body = {"data": ["hello"], "fn_index": 0, "session_hash": session}
    return visitor.http.post(f"{API}/queue/join", json=body).status_code


def settle(page: Any) -> None:
    end = time.monotonic() + 20
    while page.visits.queue.event_ids_to_events or page.visits.open.total():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_responses_that_nobody_fetches_are_bounded(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all sessions the oldest go; one session alone is told to fetch them."""
    visitor, queue = Visitor(page.url), page.visits.queue
    monkeypatch.setattr(visits, "UNREAD", 3)
    for number in range(8):
        assert join(visitor, f"s{number}") == 200
        settle(page)
    assert [session for session in queue.pending_messages_per_session if session.startswith("s")] == [
        "s4",
        "s5",
        "s6",
        "s7",
    ]
    assert not {f"s{number}" for number in range(4)} & page.app.state_holder.session_data.keys()
    assert "s3" not in queue.pending_event_ids_session
    statuses = [join(visitor, "same") for _ in range(visits.MOST_CALLS + 1)]
    assert statuses == [200] * visits.MOST_CALLS + [429]
    with visitor.http.stream("GET", f"{API}/queue/data", params={"session_hash": "same"}) as stream:
        said = [line for line in stream.iter_lines() if "process_completed" in line]
    assert len(said) == visits.MOST_CALLS
    assert join(visitor, "same") == 200


def test_a_session_holds_no_copy_of_the_page_and_is_soon_forgotten(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor, states = Visitor(page.url), page.app.state_holder.session_data
    assert visitor.outcome(["hello"], "say") == ("complete", "hello")
    settle(page)
    assert join(visitor, "silent") == 200
    settle(page)
    assert max(len(state.config_values) for state in states.values()) <= 2  # of what its call read and wrote
    with visitor.http.stream("GET", f"{API}/heartbeat/silent"):
        pass
    settle(page)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + visits.KEEP_CALL + 5)
    page.visits.tidy()
    assert set(states) == {"silent"}  # an open page's, which was just left
    monkeypatch.setattr(time, "time", lambda: now + visits.KEEP_SESSION + 5)
    page.visits.tidy()
    assert [*states, *page.visits.until, *page.visits.queue.pending_messages_per_session] == []


def test_names_of_sessions_are_short(page: Any) -> None:
    visitor = Visitor(page.url)
    for session in ("s" * 101, 5, ["s"]):
        body = {"data": ["hello"], "fn_index": 0, "session_hash": session}
        response = visitor.http.post(f"{API}/queue/join", json=body)
        assert (response.status_code, "in at most 100 characters" in response.text) == (400, True)
    assert visitor.http.get(f"{API}/heartbeat/{'s' * 101}").status_code == 400


def test_what_a_full_disk_cut_off_goes_soon(kept: visits.Visits) -> None:
    """Gradio leaves it; of what comes in no part is older than the time in which some must come."""
    names = {"tmpold": 2 * visits.STALL + 5, "tmpnew": 5, "own.png": 2 * visits.STALL + 5}
    for name, age in names.items():
        (kept.uploads / name).touch()
        os.utime(kept.uploads / name, (time.time() - age,) * 2)
    kept.tidy()
    assert [name for name in names if (kept.uploads / name).exists()] == ["tmpnew", "own.png"]
    (kept.uploads / "tmpnew").unlink()
