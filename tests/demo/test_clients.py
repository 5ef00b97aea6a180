"""Replies to `gradio_client`: the page's own snippets work, and refusals reach it as our sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from qformer.demo import endpoints
from tests.demo.visitor import Visitor


@pytest.fixture(scope="module")
def client(served: str) -> Client:
    return Client(served, verbose=False)


def test_the_snippets_of_the_page_work_as_they_stand(
    served: str, client: Client, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made of the examples in `/info`: a file where Gradio's own have an address of its makers."""
    info = Visitor(served).http.get("/gradio_api/info").json()["named_endpoints"]
    assert "://" not in json.dumps([one["example_input"] for about in info.values() for one in about["parameters"]])
    Image.open(picture).save(tmp_path / endpoints.EXAMPLE)
    monkeypatch.chdir(tmp_path)

    def written(value: Any) -> Any:
        is_file = isinstance(value, dict) and value.get("url")
        return handle_file(value["url"]) if is_file else value

    given = {
        one["parameter_name"]: one["parameter_default"]
        if one["parameter_has_default"]
        else written(one["example_input"])
        for one in info["/ask"]["parameters"]
    }
    assert given["image"]["path"] == endpoints.EXAMPLE
    assert isinstance(client.predict(**given, api_name="/ask"), str)


def test_a_refusal_is_a_sentence(served: str, client: Client, picture: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.png"
    page.write_bytes(b"<html>")
    for image, question, said in (
        (
            handle_file("https://example.org/a.png"),
            "what?",
            "addresses are not fetched here; upload the picture itself",
        ),
        (handle_file(page), "what?", "this file cannot be read as a picture"),
        (handle_file(picture), 5, "'Question' must be text, but got a number"),
        (handle_file(picture), "x" * 2_001, "the question has 2,001 characters; the limit is 2,000"),
    ):
        with pytest.raises(AppError, match=said):
            client.predict(image, question, api_name="/ask")
    assert isinstance(client.predict(handle_file(picture), "what?", api_name="/ask"), str)
    assert Visitor(served).upload(page).status_code == 400  # for all others a refusal is one, by its status


def test_texts_that_no_request_can_carry_are_sentences_too(client: Client, picture: Path) -> None:
    """Their requests are refused before they are read, and none is said to be `413 Request Entity Too Large`."""
    for question, said in (("a\0b", "contains a control character"), ("x" * 1_500_000, "more than 1 MB")):
        with pytest.raises(AppError, match=said):
            client.predict(handle_file(picture), question, api_name="/ask")
