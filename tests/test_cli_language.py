"""`qformer caption` and `qformer ask` as people meet them, with a real model, whose answers the library gives too."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from qformer.checkpoints import loading
from qformer.data import sources
from qformer.llm.prompts import TASKS
from qformer.model.vision_language import VisionLanguageModel
from qformer.resolution.pad_square import PadSquare
from qformer.types import BadSample, UsageError
from qformer.videos import read_video
from tests.clips import write_clip
from tests.model.test_vision_language import _model
from tests.test_cli import one_sentence
from tests.workspace import make_workspace

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]

QUICK = ("--max-new-tokens", "4", "--beams", "2")
OPTIONS = {"max_new_tokens": 4, "num_beams": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionLanguageModel, Path]:
    root = make_workspace(tmp_path_factory.mktemp("commands"))
    return _model(root), root


@pytest.fixture
def model(
    made: tuple[VisionLanguageModel, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> VisionLanguageModel:
    """Loaded as `x`, with `1.png`, `2.png` and `3.png` of which `text.png` is none."""
    monkeypatch.setattr(loading, "load_vision_language", lambda path, device, quantize, trust: made[0])
    for number in (1, 2, 3):
        shutil.copy(made[1] / "images" / f"{number}.png", tmp_path / f"{number}.png")
    (tmp_path / "text.png").write_text("no image")
    return made[0]


def texts(model: VisionLanguageModel, *files: str, prompt: str | None = None, **options: Any) -> list[str]:
    return model.generate(model.frontend.tiles([*files]), prompt, **OPTIONS | options)


def answers(model: VisionLanguageModel, file: str, *questions: str, **given: Any) -> list[str]:
    return model.answer(model.frontend.tiles([file]), [list(questions)], **OPTIONS | given)[0]


def test_caption_skips_what_is_no_image_and_counts_it(run: Run, model: VisionLanguageModel) -> None:
    code, out, err = run("caption", "x", "1.png", "text.png", "none.png", "2.png", *QUICK, "--prompt", "a")
    assert code == 0
    first, second = texts(model, "1.png", "2.png", prompt="a")
    assert out == f"1.png\t{first}\n2.png\t{second}\n"
    lines = err.splitlines()
    assert [line.split(":")[1].strip() for line in lines[:2]] == ["skipped text.png", "skipped none.png"]
    assert lines[2:] == ["qformer: skipped 2 of 4 files"]


def test_captions_of_folders_in_batches_as_json(run: Run, model: VisionLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number, place in ((1, "b.png"), (2, "more/c.PNG"), (3, "more/a.png")):
        shutil.copy(f"{number}.png", tmp_path / "photos" / place)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "more" / "d.jxl").touch()
    code, out, err = run("caption", "x", "photos", "1.png", *QUICK, "--batch", "2", "--json")
    assert code == 0
    named, counted = err.splitlines()
    assert named.startswith("qformer: skipped photos/more/d.jxl: undecodable: not an image in a supported format")
    assert counted == "qformer: skipped 1 of 5 files"
    told = [json.loads(line) for line in out.splitlines()]
    assert [record["image"] for record in told] == ["photos/b.png", "photos/more/a.png", "photos/more/c.PNG", "1.png"]
    expected = [texts(model, f"{number}.png") for number in (1, 3, 2, 1)]
    assert [record["captions"] for record in told] == expected
    Path("said.jsonl").write_text(out)
    source = sources.build("jsonl", path="said.jsonl")
    assert [source[row].captions for row in range(len(source))] == expected
    assert source[3].image == Path("1.png")


def test_several_drawn_captions(run: Run, model: VisionLanguageModel) -> None:
    drawn = ("--sample", "--captions", "3", "--temperature", "3", "--top-p", "1", "--max-new-tokens", "6", "--seed")
    shown = [run("caption", "x", "1.png", "2.png", *drawn, seed)[1] for seed in ("0", "0", "1")]
    assert shown[0] == shown[1] != shown[2]
    assert [line.split("\t")[0] for line in shown[0].strip("\n").split("\n")] == ["1.png"] * 3 + ["2.png"] * 3
    code, out, _ = run("caption", "x", "1.png", *drawn, "0", "--json")
    assert code == 0
    assert len(json.loads(out)["captions"]) == 3


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("--max-new-tokens", "max_new_tokens", 9),
        ("--min-new-tokens", "min_new_tokens", 4),
        ("--beams", "num_beams", 3),
        ("--repetition-penalty", "repetition_penalty", 1.7),
        ("--length-penalty", "length_penalty", -2.0),
    ],
)
def test_decoding_options_reach_the_model(
    run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, option: str, field: str, value: float
) -> None:
    seen: list[dict[str, Any]] = []
    generate = model.llm.generate
    monkeypatch.setattr(model.llm, "generate", lambda *a, **options: (seen.append(options), generate(*a, **options))[1])
    assert run("caption", "x", "1.png", option, str(value))[0] == 0
    assert run("ask", "x", "1.png", "what?", option, str(value))[0] == 0
    captioning, asking = seen
    assert captioning == {field: value}
    assert asking == TASKS["vqa"]["causal"].generate | {field: value}
    code, _, error = run("ask", "x", "1.png", "what?", "--sample", option, str(value))
    if option == "--beams":
        assert (code, error) == (2, "qformer: --beams is for texts that are searched for; leave it or --sample out\n")
    else:
        sampling = {"do_sample": True, "num_return_sequences": 1}
        assert seen[2] == TASKS["vqa"]["causal"].generate | sampling | {field: value}


@pytest.mark.parametrize("command", [("caption", "x"), ("ask", "x", "-q", "what?")], ids=lambda words: words[0])
def test_quantisation_reaches_the_loader(
    run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(loading, "load_vision_language", lambda path, device, how, trust: (seen.append(how), model)[1])
    for words in ((), ("--quantize", "int8"), ("--quantize", "nf4"), ("--quantize", "none")):
        assert run(*command, "1.png", *words)[0] == 0
    assert seen == [None, "int8", "nf4", "none"]
    assert run(*command, "1.png", "--quantize", "int7")[0] == 2


@pytest.mark.parametrize("command", [("caption", "x"), ("ask", "x", "-q", "what?")], ids=lambda words: words[0])
def test_no_image_at_all(run: Run, model: VisionLanguageModel, command: tuple[str, ...]) -> None:
    code, out, err = run(*command, "text.png", "none.png")
    assert (code, out) == (1, "")
    assert "no file can be read as an image (text.png: undecodable" in one_sentence(err)
    assert "; and 1 more); give JPEG" in err


def test_ask(run: Run, model: VisionLanguageModel) -> None:
    """One image and one question: the answer alone, the question cleaned, the context as it is."""
    (said,) = answers(model, "1.png", "what is it?", context="A.")
    assert run("ask", "x", "1.png", "What (is) it?", "--context", "A.", *QUICK) == (0, f"{said}\n", "")
    code, out, err = run("ask", "x", "text.png", "what?")
    assert (code, out) == (2, "")
    assert "'text.png' cannot be read as an image" in one_sentence(err)


def test_many_questions_about_many_images(run: Run, model: VisionLanguageModel) -> None:
    asked = ("what is it?", "how many?")
    code, out, err = run("ask", "x", "1.png", "text.png", "2.png", "-q", "What is it?", "-q", "how many?", *QUICK)
    expected = [
        f"{file}\t{question}\t{answer}"
        for file in ("1.png", "2.png")
        for question, answer in zip(asked, answers(model, file, *asked), strict=True)
    ]
    assert (code, out.splitlines()) == (0, expected)
    assert err.endswith("qformer: skipped 1 of 3 files\n")
    code, out, err = run("ask", "x", "1.png", "2.png", "what is it?", *QUICK, "--batch", "1")
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{file}\t{answers(model, file, 'what is it?')[0]}" for file in ("1.png", "2.png")]


def test_questions_from_standard_input(run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n\nHow many?\n"))
    code, out, err = run("ask", "x", "1.png", "-", *QUICK, "--json", "--show-prompt")
    assert (code, err) == (0, "")
    asked = ["what is it?", "how many?"]
    assert [json.loads(line) for line in out.splitlines()] == [
        {"image": "1.png", "question": question, "answer": answer, "prompt": f"Question: {question} Answer:"}
        for question, answer in zip(asked, answers(model, "1.png", *asked), strict=True)
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"qu'est-ce que c'\xe9tait?\n", "is not text in UTF-8"),
        ("what?\n".encode("utf-16"), "is not text in UTF-8"),
        ("what?\n".encode("utf-16-le"), "holds zero bytes"),
        (b" \n", "holds no question"),
    ],
)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_no_text_on_standard_input_is_told(
    run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str, errors: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8", errors))
    assert message in one_sentence(run("ask", "x", "1.png", "-")[2])


def test_a_byte_order_mark_is_no_part_of_a_question(
    run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfwhat?\r\n"), "utf-8"))
    assert json.loads(run("ask", "x", "1.png", "-", *QUICK, "--json")[1])["question"] == "what?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("caption", "x", ""), "one of the images is an empty name"),
        (("ask", "x", "", "what?"), "one of the images is an empty name"),
        (("ask", "x", "1.png", ""), "the question is empty"),
        (("ask", "x", "1.png", "--self-ask", "-q", "what?"), "leave -q out"),
        (("caption", "x", "1.png", "--length-penalty", "nan"), "length_penalty: input should be a finite number"),
        (("ask", "x", "1.png", "what?", "--min-new-tokens", "11"), "between 0 and max_new_tokens"),
    ],
)
def test_wrong_use_is_told_before_the_model_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, model: VisionLanguageModel, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(loading, "load_vision_language", None)
    assert message in one_sentence(run(*words)[2])


def test_the_shortest_text_is_held_against_the_longest_of_its_task(run: Run, model: VisionLanguageModel) -> None:
    code, out, _ = run("ask", "x", "1.png", "write", "--task", "writing", "--min-new-tokens", "35", "--beams", "1")
    assert code == 0
    expected = {"task": "writing", "min_new_tokens": 35, "max_new_tokens": 100, "num_beams": 1}
    assert out == f"{answers(model, '1.png', 'write', **expected)[0]}\n"


def test_tasks_and_presets(run: Run, model: VisionLanguageModel) -> None:
    """Free tasks keep stops and capitals; what asks nothing needs no question; prompts are shown on standard error."""
    code, out, err = run("ask", "x", "1.png", "Write. A story!", "--task", "writing", "--show-prompt", *QUICK)
    assert (code, err) == (0, "prompt: Write. A story!\n")
    assert out == f"{answers(model, '1.png', 'Write. A story!', task='writing')[0]}\n"
    code, out, err = run("ask", "x", "1.png", "--task", "caption", "--show-prompt", *QUICK)
    assert (code, err) == (0, "prompt: a photo of\n")
    assert out == f"{texts(model, '1.png', prompt='a photo of')[0]}\n"
    context = ("--context", "it rains", "--task", "context", "--preset", "lavis", "--show-prompt")
    code, out, err = run("ask", "x", "1.png", "why?", *context, *QUICK)
    assert (code, err) == (0, "prompt: Context: it rains. Question: why? Answer:\n")


def test_it_asks_itself(run: Run, model: VisionLanguageModel) -> None:
    turns = model.self_ask(model.frontend.tiles(["1.png", "2.png"]), **OPTIONS)
    code, out, err = run("ask", "x", "1.png", "2.png", "--self-ask", *QUICK)
    assert (code, err) == (0, "")
    assert out == "".join(f"{file}\t{q}\t{a}\n" for file, (q, a) in zip(("1.png", "2.png"), turns, strict=True))
    code, out, err = run("ask", "x", "1.png", "--self-ask", "--show-prompt", "--json", *QUICK)
    question, answer = turns[0]
    prompt = "Ask a question about the picture. Question:"
    assert json.loads(out) == {"image": "1.png", "question": question, "answer": answer, "prompt": prompt}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation(run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn stands in front of the next, an empty line forgets them, a blank question is told; one encoding."""
    monkeypatch.setattr("sys.stdin", Terminal("What is it?\n.\nhow many?\n\nhow many?\n"))
    calls = []
    hook = model.frontend.encoder.register_forward_hook(lambda *_: calls.append(1))
    code, out, err = run("ask", "x", "1.png", *QUICK, "--show-prompt")
    hook.remove()
    assert code == 0
    assert calls == [1]
    (first,) = answers(model, "1.png", "what is it?")
    (second,) = answers(model, "1.png", "how many?", history=[[("what is it?", first)]])
    (third,) = answers(model, "1.png", "how many?")
    assert out == f"{first}\n{second}\n{third}\n"  # the question mark is for a terminal, not for a file
    lines = err.splitlines()
    assert lines[0].startswith("qformer: ask about the picture")
    assert "the question is empty" in lines[2]
    ended = first.rstrip(".")
    assert lines[3] == f"prompt: Question: what is it? Answer: {ended}. Question: how many? Answer:"
    assert lines[4] == "prompt: Question: how many? Answer:"


def test_what_is_cut_is_told(run: Run, model: VisionLanguageModel) -> None:
    code, _, err = run("ask", "x", "1.png", "what?", "--context", "it rains " * 200, *QUICK)
    assert code == 0
    assert "characters from the start of the context and 0 of the oldest turns were left out" in one_sentence(err)
    code, _, err = run("ask", "x", "1.png", "Why?" * 200, "--task", "writing", *QUICK)
    assert code == 2
    assert "128 positions" in one_sentence(err)


def test_long_work_shows_how_far_it_is(
    run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a terminal's standard error, where standard output goes elsewhere; not for what is done at once."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, err = run("caption", "x", "1.png", "2.png", "3.png", *QUICK, "--batch", "1")
    assert "captioning" in err
    assert "3/3" in err
    assert out.count("\n") == 3
    _, out, err = run("caption", "x", "1.png", "2.png", "3.png", *QUICK)
    assert err == ""


def test_files_and_questions_are_told_apart(run: Run, model: VisionLanguageModel) -> None:
    Image.new("RGB", (8, 6)).save("what is it?", "PNG")  # a file, though it reads like a question
    code, out, _ = run("ask", "x", "1.png", "what is it?", "-q", "why?", *QUICK)
    assert code == 0
    assert len(out.splitlines()) == 2
    code, out, _ = run("ask", "x", "1.png", "a photo of a cat " * 20, *QUICK)  # longer than names of files may be
    assert code == 0
    assert out == f"{answers(model, '1.png', ' '.join(['a photo of a cat'] * 10))[0]}\n"


ADDRESSES = (
    "https://example.org/a.jpg",
    "s3://bucket/a.png",
    "HTTP://example.org/a",
    f"data:image/png;base64,{'A' * 5000}",
)


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: address[:12])
@pytest.mark.parametrize("command", [("caption",), ("ask", "-q", "what?"), ("ask",)], ids=" ".join)
def test_addresses_are_not_fetched(
    run: Run, model: VisionLanguageModel, command: tuple[str, ...], address: str
) -> None:
    code, _, err = run(command[0], "x", "1.png", address, *command[1:])
    assert code == 2
    assert one_sentence(err)
    assert f"'{address[:100]}" in err
    assert "is an address, and addresses are not fetched: save it first and give the file" in err
    assert len(err) < 300
    with pytest.raises(BadSample, match="addresses are not fetched: save it first") as raised:
        model.frontend.tiles([address])
    assert raised.value.kind == "missing"


def test_a_folder_of_files_that_are_no_images(run: Run, model: VisionLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "bad" / name).write_bytes(b"nothing")
    for command in (("caption", "x", "bad"), ("ask", "x", "bad", "-q", "what?")):
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert "qformer: no file can be read as an image (bad/a.jpg: undecodable" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run("caption", "x", "empty")
    assert code == 1
    assert err.startswith("qformer: no file can be read as an image (empty: a folder without images)")


def test_texts_that_are_no_utf8_are_named(run: Run, model: VisionLanguageModel, tmp_path: Path) -> None:
    broken = "what\udcff is this?"  # as Python has a byte of the command line that is no UTF-8
    for name, command in (
        ("question", ("ask", "x", "1.png", broken)),
        ("question", ("ask", "x", "1.png", "-q", broken)),
        ("context", ("ask", "x", "1.png", "-q", "what?", "--context", broken)),
        ("prompt", ("caption", "x", "1.png", "--prompt", broken)),
    ):
        code, _, err = run(*command)
        assert code == 2
        assert one_sentence(err)
        assert f"the {name} is not text in UTF-8" in err
    with pytest.raises(UsageError, match="half of a character"):
        model.answer(model.frontend.tiles(["1.png"]), [broken])
    file = tmp_path / "caf\udce9.png"
    shutil.copy("1.png", file)
    code, out, _ = run("caption", "x", str(file), *QUICK)
    assert (code, out.partition("\t")[0]) == (0, f"{tmp_path}/caf\\udce9.png")
    code, out, _ = run("caption", "x", str(file), *QUICK, "--json")
    assert json.loads(out)["image"] == str(file)


@pytest.mark.parametrize(
    "words",
    [
        ("--length-penalty", "nan"),
        ("--length-penalty", "-inf"),
        ("--length-penalty", "1e308"),
        ("--repetition-penalty", "inf"),
        ("--repetition-penalty", "-1"),
        ("--sample", "--temperature", "nan"),
        ("--sample", "--temperature", "1e-300"),
        ("--sample", "--top-p", "nan"),
        ("--sample", "--top-p", "-0.1"),
    ],
    ids=" ".join,
)
def test_penalties_that_are_no_numbers_of_use(run: Run, model: VisionLanguageModel, words: tuple[str, ...]) -> None:
    for command in (("caption", "x", "1.png"), ("ask", "x", "1.png", "what?")):
        code, _, err = run(*command, *words)
        assert code == 2
        assert one_sentence(err)
        assert words[-2][2:].replace("-", "_") in err
        assert "must be" in err or "a finite number, but got" in err


def test_together_is_one_answer_about_all(
    run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two pictures and a video, also in batches of one; what is no image is left out."""
    write_clip(Path("clip.mp4"), 16)
    files = ["1.png", "text.png", "clip.mp4", "2.png"]
    row = ["1.png", read_video("clip.mp4", model.frontend.strategy.sample), "2.png"]
    tiles = model.frontend.tiles([row])
    assert tiles.counts == [1 + 2 + 1]
    code, out, err = run("caption", "x", *files, *QUICK, "--together", "--batch", "1")
    (said,) = model.generate(tiles, **OPTIONS)
    assert (code, out) == (0, f"1.png, clip.mp4, 2.png\t{said}\n")
    assert "skipped text.png" in err
    (answer,) = model.answer(tiles, ["what is it?"], **OPTIONS)
    assert run("ask", "x", *files, "What is it?", "--together", *QUICK)[:2] == (0, f"{answer}\n")
    code, out, _ = run("ask", "x", *files, "-q", "what?", "-q", "who?", "--together", "--json", *QUICK)
    told = [json.loads(line) for line in out.splitlines()]
    assert [record["images"] for record in told] == [["1.png", "clip.mp4", "2.png"]] * 2
    assert [record["answer"] for record in told] == model.answer(tiles, [["what?", "who?"]], **OPTIONS)[0]
    monkeypatch.setattr("sys.stdin", Terminal("what is it?\n"))
    assert run("ask", "x", *files, "--together", *QUICK)[:2] == (0, f"{answer}\n")


def test_what_a_model_cannot_be_shown_is_skipped(
    run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip with more frames than positions, a strip that padding makes a huge square; alone each is refused."""
    limit = model.llm.model.config.max_position_embeddings
    frames = limit // model.connector.qformer.config.queries + 1  # type: ignore[union-attr, operator]
    monkeypatch.setattr(model.frontend, "strategy", PadSquare(size=28, max_frames=frames))
    write_clip(Path("long.mp4"), frames, fps=1)
    Image.new("RGB", (1, 14_000)).save("thin.png")
    (said,) = texts(model, "1.png")
    code, out, err = run("caption", "x", "1.png", "long.mp4", "thin.png", *QUICK)
    assert (code, out) == (0, f"1.png\t{said}\n")
    assert f"skipped long.mp4: a clip of {frames} frames of 64 x 48 pixels makes" in err
    assert "skipped thin.png: a picture of 1 x 14000 pixels would be padded to 14000 x 14000" in err
    for file, told in (("long.mp4", "lower size, or for clips max_frames, of resolution"), ("thin.png", "padded")):
        for words in (("caption", "x", file), ("ask", "x", file, "what?")):
            code, out, err = run(*words, *QUICK)
            assert (code, out) == (2, "")
            assert told in one_sentence(err)


def test_a_gif_that_moves_is_a_clip(run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A still one is a picture, as is any without PyAV, and one that is none is told as a picture."""
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "black", "white")]
    frames[0].save("moves.gif", save_all=True, append_images=frames[1:], duration=1000)
    frames[1].save("still.gif")
    Path("none.gif").write_text("no image")
    clip = read_video("moves.gif", model.frontend.strategy.sample)
    assert len(clip.frames) == 3
    said = model.generate(model.frontend.tiles([clip, "still.gif"]), **OPTIONS)
    assert run("caption", "x", "moves.gif", "still.gif", *QUICK)[1] == f"moves.gif\t{said[0]}\nstill.gif\t{said[1]}\n"
    answers = model.answer(model.frontend.tiles([clip, "moves.gif"]), ["what?"] * 2, **OPTIONS)
    assert run("ask", "x", "moves.gif", "what?", *QUICK)[:2] == (0, f"{answers[0]}\n")
    assert "skipped none.gif: " in run("caption", "x", "still.gif", "none.gif", *QUICK)[2]
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("ask", "x", "moves.gif", "what?", *QUICK)[:2] == (0, f"{answers[1]}\n")


def test_videos_beside_pictures(run: Run, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each; one that is cut off is skipped, and refused where it is the only one."""
    write_clip(Path("clip.mp4"), 16)
    Path("cut.mp4").write_bytes(Path("clip.mp4").read_bytes()[:1000])
    clip = read_video("clip.mp4", model.frontend.strategy.sample)
    said = model.generate(model.frontend.tiles(["1.png", clip]), **OPTIONS)
    code, out, err = run("caption", "x", "1.png", "cut.mp4", "clip.mp4", *QUICK)
    assert (code, out) == (0, f"1.png\t{said[0]}\nclip.mp4\t{said[1]}\n")
    assert "qformer: skipped cut.mp4: undecodable: the video 'cut.mp4'" in err
    (answer,) = model.answer(model.frontend.tiles([clip]), ["what?"], **OPTIONS)
    assert run("ask", "x", "clip.mp4", "what?", *QUICK)[:2] == (0, f"{answer}\n")
    for file, said_of in (("cut.mp4", "cannot be read as an image"), ("none.mov", "missing: none.mov")):
        for words in (("ask", "x", file, "what?"), ("caption", "x", file)):
            code, out, err = run(*words)
            assert (code, out) == (2, "")
            assert said_of in one_sentence(err)
    monkeypatch.setitem(sys.modules, "av", None)
    code, out, err = run("caption", "x", "1.png", "clip.mp4")
    assert (code, out) == (2, "")
    assert "PyAV, which is not installed; run: pip install" in one_sentence(err)
