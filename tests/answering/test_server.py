"""The client of OpenAI-compatible servers: what it sends, and what servers cannot do to it."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from qformer.answering.server import KEY, Server
from qformer.types import UsageError
from tests.answering.stand_in import HTML, StandIn, completion

RED, BLUE = Image.new("RGB", (5, 4), (255, 0, 0)), Image.new("RGB", (3, 2), (0, 0, 255))


def client(stand_in: StandIn, **options: object) -> Server:
    return Server(stand_in.url, **({"timeout": 0.4, "tries": 2, "wait": 0.01} | options))  # type: ignore[arg-type]


def test_pictures_and_questions_arrive(stand_in: StandIn) -> None:
    stand_in.answer = lambda images, text: f"{[image.getpixel((0, 0)) for image in images]} {text}"
    server = client(stand_in)
    assert server([RED, [RED, BLUE]], ["one?", "two?"]) == [
        "[(255, 0, 0)] one?",
        "[(255, 0, 0), (0, 0, 255)] two?",
    ]
    assert server.identity == {"server": f"{stand_in.url}/v1", "model": "tiny"}
    assert [body["temperature"] for body in stand_in.asked] == [0, 0]
    assert "Authorization" not in stand_in.heads[0]


def test_several_models_are_named(stand_in: StandIn) -> None:
    stand_in.models = ["first", "second"]
    with pytest.raises(UsageError, match=r"lists 2 models \(first, second\); choose one with --model"):
        client(stand_in)([RED], ["?"])
    stand_in.models = ["\x1b[31mred\ud800"]  # would color a terminal, and cannot be written in UTF-8
    with pytest.raises(UsageError, match=r"lists a model '\\x1b\[31mred\\ud800'; choose one with --model"):
        client(stand_in)([RED], ["?"])
    client(stand_in, model="second")([RED], ["?"])
    assert stand_in.asked[0]["model"] == "second"


@pytest.mark.parametrize("fault", ["500 busy", "429", "hang", "drip", "endless", "cut", HTML, "[]", '{"choices": []}'])
def test_a_fault_that_passes_costs_nothing(stand_in: StandIn, fault: str) -> None:
    stand_in.faults = [fault]
    assert client(stand_in)([RED], ["?"]) == ["4"]
    assert len(stand_in.asked) == 2


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("500 out of\nmemory\x1b[31m", r"state 500: out of memory \[31m"),
        ("hang", "no whole reply in 0.4 s|nothing for 0.4 s"),
        ("drip", "no whole reply in 0.4 s"),
        ("endless", "a reply of more than 4 MiB"),
        ("cut", "no JSON"),
        (HTML, "no JSON: <html>"),
        ("[" * 100_000, "JSON"),
        ("77", "JSON of another shape: 77"),
        (completion(7), "JSON of another shape"),
        ("404 no such model", "state 404: no such model.*check the address"),
        ("401", f"state 401.*{KEY}"),
        ("redirect http://127.0.0.1:9/", "state 307"),
    ],
)
def test_a_fault_that_stays_is_one_sentence(stand_in: StandIn, fault: str, told: str) -> None:
    stand_in.faults = [fault] * 2
    began = time.perf_counter()
    with pytest.raises(UsageError, match=told) as raised:
        client(stand_in)([RED], ["?"])
    assert time.perf_counter() - began < 5
    assert len(str(raised.value)) < 500
    assert str(raised.value).isprintable()
    assert len(stand_in.asked) == (1 if fault[:1] in "4r" else 2)


def test_nobody_listens(stand_in: StandIn) -> None:
    stand_in.__exit__()
    with pytest.raises(UsageError, match=r"no reply: .*refused"):
        client(stand_in)([RED], ["?"])


def test_refusals_and_parts_are_answers(stand_in: StandIn) -> None:
    parts = [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": " fo"}, {"type": "text", "text": "ur "}]
    stand_in.faults = [completion(None), completion(parts)]
    assert client(stand_in)([RED, RED], ["?", "?"]) == ["", "four"]


def test_the_key_goes_to_the_server_and_nowhere_else(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    stand_in.answer = lambda *_: "your key is sk-secret"
    server = client(stand_in)
    assert "secret" not in repr(server) + str(server.identity)
    assert server([RED], ["?"]) == ["your key is ***"]
    assert stand_in.heads[0]["Authorization"] == "Bearer sk-secret"
    stand_in.faults = ["401 wrong key sk-secret"]
    with pytest.raises(UsageError, match=r"wrong key \*\*\*"):
        server([RED], ["?"])
    with StandIn() as other:
        stand_in.faults = [f"redirect {other.url}"]
        with pytest.raises(UsageError, match="307"):
            server([RED], ["?"])
        assert not other.heads


def test_settings_that_newer_models_refuse_are_given_up(stand_in: StandIn) -> None:
    stand_in.faults = ["400 use 'max_completion_tokens' instead", "400 'temperature' must be 1", ""]
    assert client(stand_in)([RED, RED], ["?", "?"]) == ["4", "4"]
    assert [set(body) - {"model", "messages"} for body in stand_in.asked[2:]] == [{"max_completion_tokens"}] * 2
    stand_in.faults = ["400 'temperature' is odd"] * 2
    with pytest.raises(UsageError, match="state 400"):
        client(stand_in)([RED], ["?"])


@pytest.mark.parametrize(
    "url",
    ["localhost", "ftp://a/v1", "http://", "http://a:b/v1", "http://me:secret@a/v1", "http://a/v1?k=1", "http://a b/"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="address") as raised:
        Server(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://a:8000", "http://a:8000/v1"),
        ("http://a:8000/v1/", "http://a:8000/v1"),
        ("https://a/api/v1/chat/completions", "https://a/api/v1"),
    ],
)
def test_addresses_are_completed(given: str, base: str) -> None:
    assert Server(given).url == base
