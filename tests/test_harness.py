"""The plug-in of lmms-eval, against a stand-in for the interface of version 0.7.3, and a model that really answers."""

from __future__ import annotations

import importlib
import math
import sys
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import qformer
from qformer.llm.rows import positions
from qformer.types import UsageError
from qformer.videos import read_video
from tests.clips import write_clip
from tests.their_blip2 import make

ROOT = Path(__file__).parent.parent
SETTINGS = {"max_new_tokens": 6, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


class Lmms(ABC):
    """What a model inherits, as published: three abstract methods, and a table of the documents of each task."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...

    @abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]: ...


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture(autouse=True)
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in, under the names of the real modules."""
    for name, content in (
        ("lmms_eval", {}),
        ("lmms_eval.api", {}),
        ("lmms_eval.api.model", {"lmms": Lmms}),
        ("lmms_eval.models", {}),
        ("lmms_eval.models.registry_v2", {"ModelManifest": ModelManifest}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop("qformer.evaluation.harness", None)
    yield
    sys.modules.pop("qformer.evaluation.harness", None)


@pytest.fixture(scope="module", params=["opt", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / request.param
    make(request.param, path)
    return path


def documents(count: int = 5) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8) for i in range(count)]
    questions = ["what colour is the bus?", "how many cats are there?", "what is on the beach?", "who?", "a cat"]
    return [{"images": [image], "question": text} for image, text in zip(images, questions, strict=True)]


def harness(folder: Path, docs: list[dict[str, Any]], **options: Any) -> Any:
    model = importlib.import_module("qformer.evaluation.harness").Harness(str(folder), device="cpu", **options)
    model.task_dict["scenes"] = {"test": docs}
    return model


def asking(docs: list[dict[str, Any]], settings: dict[str, Any] = SETTINGS, wording: str = "{}") -> list[Any]:
    return [
        SimpleNamespace(
            args=(wording.format(doc["question"]), settings, lambda doc: doc["images"], number, "scenes", "test")
        )
        for number, doc in enumerate(docs)
    ]


def test_the_entry_point_leads_to_the_class() -> None:
    """As lmms-eval resolves it: the payload is called, and the path of the class imported."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, _, name = declared["qformer"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "qformer"
    path, _, kind = manifest.simple_class_path.rpartition(".")
    found = getattr(importlib.import_module(path), kind)
    assert issubclass(found, Lmms)
    assert found.is_simple
    assert not found.__abstractmethods__


@pytest.mark.parametrize("batch_size", [1, "3"])
def test_answers_are_those_of_answer(folder: Path, batch_size: Any) -> None:
    """Of each document its own, whatever the batch, the wording of chat models taken away."""
    docs = documents()
    model: Any = qformer.load(folder, device="cpu")
    tiles = model.frontend.tiles([doc["images"][0] for doc in docs])
    wanted = model.answer(tiles, [doc["question"] for doc in docs], num_beams=1, max_new_tokens=6, length_penalty=1.0)
    tested = harness(folder, docs, batch_size=batch_size)
    chat = "<image>\n{}\nAnswer the question using a single word or phrase."
    assert tested.generate_until(asking(docs, wording=chat)) == wanted
    assert len(set(wanted)) > 1
    assert tested.ignored_images == 0


def test_wordings_and_settings(folder: Path) -> None:
    docs = documents()
    model: Any = qformer.load(folder, device="cpu")
    tiles = model.frontend.tiles([doc["images"][0] for doc in docs])
    plain = model.generate(tiles, [doc["question"] for doc in docs], num_beams=3, max_new_tokens=5)
    settings = {"max_gen_toks": 5, "num_beams": 3, "until": ["\n\n"], "temperature": None, "use_cache": True}
    assert harness(folder, docs, prompt="plain").generate_until(asking(docs, settings)) == plain
    captions = model.generate(tiles, num_beams=1, max_new_tokens=6)
    assert harness(folder, docs, prompt="caption").generate_until(asking(docs)) == captions
    stop = captions[0][-1]
    stopped = harness(folder, docs, prompt="caption").generate_until(asking(docs, {**SETTINGS, "until": stop}))
    assert stopped == [caption.partition(stop)[0].strip() for caption in captions]
    with pytest.raises(UsageError, match="max_new_token"):
        harness(folder, docs).generate_until(asking(docs, {"max_new_tokns": 5}))


def test_unequal_settings_keep_their_order(folder: Path) -> None:
    docs = documents()
    short, long = asking(docs, {**SETTINGS, "max_new_tokens": 1}), asking(docs)
    mixed = [pair[i % 2] for i, pair in enumerate(zip(short, long, strict=True))]
    tested = harness(folder, docs, batch_size=4)
    both = tested.generate_until(short), tested.generate_until(long)
    assert tested.generate_until(mixed) == [both[i % 2][i] for i in range(len(docs))]


def test_a_task_may_ask_for_more_tokens_than_the_model_has_positions(folder: Path) -> None:
    docs = documents()
    tested = harness(folder, docs, batch_size=2)
    llm, limit = tested.model.llm, positions(tested.model.llm.model)
    new = 40 if limit is None else 10 * limit
    texts = tested.generate_until(asking(docs, SETTINGS | {"max_new_tokens": new}))
    assert [len(llm.tokenizer(text)["input_ids"]) > 6 for text in texts].count(True) >= 1
    assert tested._new_tokens(30, 3, "a") == 30


@torch.no_grad()
def test_loglikelihood_adds_up_by_hand(folder: Path) -> None:
    """Of the continuation without the end of the text; what greedy search would write is called so."""
    docs = documents()
    tested = harness(folder, docs, batch_size=2, prompt="plain")
    llm, one = tested.model.llm, docs[0]
    prefix, mask = tested.model.prefix(tested.model.frontend.tiles([one["images"][0]]))
    requests = [
        SimpleNamespace(args=(one["question"], target, lambda doc: doc["images"], 0, "scenes", "test"))
        for target in (lambda doc: "two people", "two people", "dogs")
    ]
    scored = tested.loglikelihood(requests)
    assert scored[0] == pytest.approx(scored[1])
    for (score, _), target in zip(scored[1:], ("two people", "dogs"), strict=True):
        total, count = llm.loss(prefix, mask, [target], [one["question"]])
        with_end, _ = llm._predict(prefix, mask, [target], [one["question"]], 99)
        end = with_end[0, int(count) - 1 + (with_end.shape[1] - int(count)), :].log_softmax(dim=0)[llm.end]
        assert score == pytest.approx(-float(total) - float(end), abs=1e-3)
        assert score < 0
        assert not math.isnan(score)
    (likely,) = llm.tokenizer(" a", add_special_tokens=False)["input_ids"]
    push = torch.zeros(llm.model.config.vocab_size).index_fill(0, torch.tensor(likely), 1000.0)
    llm.model.get_output_embeddings().register_forward_hook(lambda _module, _args, logits: logits + push)
    requests[0].args = (one["question"], " a", lambda doc: doc["images"], 0, "scenes", "test")
    assert [is_greedy for _, is_greedy in tested.loglikelihood(requests)] == [True, False, False]


def test_rounds(folder: Path) -> None:
    """The next question is made of what was said; the list of all rounds comes back."""
    docs, seen = documents(), []

    def to_text(doc: dict[str, Any], previous_output: list[str], round_idx: int, previous_round_info: Any) -> Any:
        seen.append((round_idx, previous_round_info))
        return doc["images"], f"{previous_output[-1]} and then?", round_idx == 2, previous_output, round_idx

    requests = [
        SimpleNamespace(args=(doc["question"], SETTINGS, lambda doc: doc["images"], to_text, number, "scenes", "test"))
        for number, doc in enumerate(docs[:2])
    ]
    tested = harness(folder, docs)
    said = tested.generate_until_multi_round(requests)
    assert [len(rounds) for rounds in said] == [2, 2]
    assert seen == [(1, None), (2, 1)] * 2
    assert [rounds[0] for rounds in said] == tested.generate_until(asking(docs[:2]))
    again = [
        {"images": doc["images"], "question": f"{rounds[0]} and then?"} for doc, rounds in zip(docs, said, strict=False)
    ]
    assert [rounds[1] for rounds in said] == harness(folder, again).generate_until(asking(again))


def test_all_pictures_and_clips_of_a_document_are_shown(folder: Path, tmp_path: Path) -> None:
    """In the order of the document, beside others of one picture; what cannot be read is left out and counted."""
    docs, clip = documents(), write_clip(tmp_path / "clip.mp4", 20)
    pictures = [doc["images"][0] for doc in docs]
    docs[0]["images"] = [pictures[0], [pictures[1], None], b"no image"]
    docs[1]["images"] = [str(clip), pictures[1]]
    tested = harness(folder, docs, batch_size=5)
    said = tested.generate_until(asking(docs))
    model: Any = tested.model
    rows = [pictures[:2], [read_video(clip, model.frontend.strategy.sample), pictures[1]], *pictures[2:]]
    tiles = model.frontend.tiles(rows)
    assert tiles.counts == [2, 4, 1, 1, 1]  # three frames of the clip at one a second
    known = SETTINGS | {"temperature": 1}
    assert said == model.answer(tiles, [doc["question"] for doc in docs], **known)
    assert tested.ignored_images == 1
    first = model.frontend.tiles(pictures[:2])
    assert said[:2] != model.answer(first, [doc["question"] for doc in docs[:2]], **known)


def test_images_and_refusals(folder: Path) -> None:
    docs = documents()
    tested = harness(folder, docs)
    assert tested.device == torch.device("cpu")
    for wrong, said in (({"prompt": "papr"}, "did you mean 'paper'"), ({"batch_size": "auto"}, "batch_size is 'auto'")):
        with pytest.raises(UsageError, match=said):
            harness(folder, docs, **wrong)


def by_text(tested: Any, prompt: str) -> str:
    """What the language model writes behind a prompt alone."""
    llm = tested.model.llm
    nothing = torch.zeros(1, 0, llm.width), torch.zeros(1, 0, dtype=torch.bool)
    return llm.decode(llm.generate(*nothing, [prompt], num_beams=1, max_new_tokens=6))[0]


def no_image(doc: Any) -> Any:
    return doc["image"].convert("RGB")


def test_documents_without_an_image_are_answered_from_their_text(folder: Path) -> None:
    """Among others, in one batch; the others' answers stay what they are."""
    docs = documents()
    tested = harness(folder, docs, batch_size=5, prompt="plain")
    whole = tested.generate_until(asking(docs))
    for doc, images in zip(docs[1:], ([], None, [None], [b"no image"]), strict=True):
        doc["images"] = images
    with pytest.warns(UserWarning, match="4 had no readable image and were answered from their text alone"):
        said = tested.generate_until(asking(docs))
    assert said == [whole[0], *(by_text(tested, doc["question"]) for doc in docs[1:])]
    assert said[1:] != whole[1:]
    assert (tested.shortfalls.imageless, tested.ignored_images) == (4, 0)
    broken = SimpleNamespace(args=(docs[1]["question"], SETTINGS, no_image, 1, "scenes", "test"))
    with pytest.warns(UserWarning, match="5 had no readable image"):
        assert tested.generate_until([broken]) == said[1:2]
    empty = SimpleNamespace(args=("", SETTINGS, lambda doc: None, 1, "scenes", "test"))
    with pytest.warns(UserWarning, match="1 were not answered"):
        assert tested.generate_until([empty]) == [""]


def test_scores_of_documents_without_an_image(folder: Path) -> None:
    docs = documents()[:3]
    tested = harness(folder, docs, batch_size=3)
    requests = [
        SimpleNamespace(args=(doc["question"], "two people", lambda doc: doc["images"], number, "scenes", "test"))
        for number, doc in enumerate(docs)
    ]
    whole = tested.loglikelihood(requests)
    docs[1]["images"] = None
    with pytest.warns(UserWarning, match="1 had no readable image"):
        scored = tested.loglikelihood(requests)
    for row in (0, 2):
        assert scored[row] == (pytest.approx(whole[row][0], abs=1e-4), whole[row][1])
    llm, prompt = tested.model.llm, tested._worded(docs[1]["question"])
    if llm.family == "causal":  # by hand: nothing in front of the prompt, the end of the text not counted
        given, ids = llm._ids([prompt])[0], llm._ids([f"{prompt} two people"])[0]
        logits = llm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=1)
        alone = sum(float(logits[place - 1, ids[place]]) for place in range(len(given), len(ids)))
        assert scored[1][0] == pytest.approx(alone, abs=1e-3)
    assert scored[1][0] != pytest.approx(whole[1][0], abs=1e-3)


@pytest.mark.parametrize("folder", ["opt"], indirect=True)
def test_contexts_longer_than_the_positions_lose_their_start(folder: Path) -> None:
    """The end of what is asked and room for an answer stay; a target that fits nowhere has no chance."""
    docs = documents()[:3]
    long = [dict(doc, question="who is there " * 900 + doc["question"]) for doc in docs[:2]] + docs[2:]
    tested = harness(folder, long, batch_size=3)
    alone = harness(folder, long, batch_size=1)
    with pytest.warns(UserWarning, match="2 lost words at the start of their context"):
        said = tested.generate_until(asking(long))
    with pytest.warns(UserWarning, match="lost words"):
        assert alone.generate_until(asking(long)) == said
    assert said[2] == harness(folder, docs).generate_until(asking(docs))[2]
    llm, visual = (
        tested.model.llm,
        tested.model.connector.count_tokens(tested.model.frontend.tiles(docs[0]["images"]).plans[0]),
    )
    prompt, limit = tested._fitting(long[0]["question"], llm.room(visual, 6)), positions(llm.model)
    assert prompt.endswith(f"who is there {docs[0]['question']} Answer:")
    assert prompt.startswith("Question: ")
    assert limit - 8 < visual + llm.count_tokens(prompt) + 6 <= limit
    requests = [
        SimpleNamespace(args=(doc["question"], target, lambda doc: doc["images"], number, "scenes", "test"))
        for number, (doc, target) in enumerate(zip(long, ["dogs", "dogs " * 3000, "dogs"], strict=True))
    ]
    with pytest.warns(UserWarning, match="1 were not answered"):
        (cut, _), nowhere, (short, _) = tested.loglikelihood(requests)
    assert nowhere == (-math.inf, False)
    assert -math.inf < cut < 0
    assert short == pytest.approx(harness(folder, docs).loglikelihood(requests[2:])[0][0], abs=1e-4)


def test_quantised(folder: Path) -> None:
    from qformer.llm.quantize import is_quantized

    tested = harness(folder, documents(), quantize="nf4")
    assert any(is_quantized(module) for module in tested.model.llm.modules())
