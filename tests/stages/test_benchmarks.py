"""`qformer eval` of a stage-two checkpoint on files of the official forms, by the command as people run it.

The model is untrained and says nonsense, so scores are checked on predictions that the test wrote into the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qformer import stages
from qformer.evaluation import caption
from qformer.evaluation.benchmarks import Benchmark, Item, Measured, choose, mean_scores, new_item
from qformer.llm.base import LanguageModel
from qformer.stages.evaluate import language as benchmarks
from qformer.stages.evaluate.language import evaluate_language
from qformer.stages.evaluate.settings import Settings
from qformer.types import Sample, UsageError
from tests.processes import together
from tests.workspace import config, make_workspace

Run = Callable[..., tuple[int, str, str]]
PEOPLE = {10: ["red"] * 10, 11: ["2"] * 3 + ["3"] * 7, 12: ["bus"] * 2 + ["car"] * 8, 13: ["no"] * 10}
TYPES = {10: ("what color", "other"), 11: ("how many", "number"), 12: ("what", "other"), 13: ("is", "yes/no")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("space"))
    stages.train(config(root, "stage1", train={"steps": 2}))
    stages.train(config(root, "stage2", train={"steps": 2}))
    coco = root / "coco"
    coco.mkdir()
    for number in range(3):  # the image of question 13 is missing
        with Image.open(root / "images" / f"{number}.png") as image:
            image.save(coco / f"COCO_val2014_{number:012d}.jpg")
    images = {10: 0, 11: 0, 12: 1, 13: 9}
    questions = [{"question_id": q, "image_id": i, "question": f"What is it {q}?"} for q, i in images.items()]
    (root / "questions.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    annotations = [
        {
            "question_id": number,
            "question_type": TYPES[number][0],
            "answer_type": TYPES[number][1],
            "answers": [{"answer": text, "answer_id": place} for place, text in enumerate(PEOPLE[number], 1)],
        }
        for number in PEOPLE
    ]
    (root / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return root


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes half a minute to start."""
    monkeypatch.setattr(caption.shutil, "which", lambda name: None)


def words(root: Path, bench: str, *data: str) -> list[str]:
    listed = [word for option in data for word in ("--data", option)]
    return ["eval", str(root / "runs" / "stage2"), "--bench", bench, *listed, "--device", "cpu"]


def vqa(root: Path) -> list[str]:
    return [
        "name=vqa",
        f"path={root / 'questions.json'}",
        f"annotations={root / 'annotations.json'}",
        f"images={root / 'coco'}",
    ]


def rewrite(file: Path, said: dict[str, Any]) -> None:
    """Let a file of predictions say this, and nothing of the others."""
    head, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [line | said[line["id"]] for line in lines if line["id"] in said]
    file.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))


def test_vqa_from_official_files_to_the_official_score(root: Path, run: Run) -> None:
    """By hand: `Red.` earns 1, `two` 0.9 (3 of ten), `a bus` 0.6 (2 of ten); question 13 has no image."""
    command = [*words(root, "vqa", *vqa(root)), "-o", "a.json", "--submission", "s.json", "--html", "a.html"]
    code, out, err = run(*command)
    assert code == 0, err
    assert "skipped 1 samples" in out
    rewrite(Path("a.predictions.jsonl"), {"10": {"said": "Red."}, "11": {"said": "two"}, "12": {"said": "a bus"}})
    code, out, err = run(*command)
    assert code == 0, err
    result = json.loads(Path("a.json").read_text())
    assert (result["images"], result["asked"], result["scored"], result["resumed"]) == (3, 4, 3, 3)
    assert [record["kind"] for record in result["skipped"]] == ["missing"]
    assert result["scores"] == {"accuracy": pytest.approx(2.5 / 3), "all normalised": pytest.approx(2.5 / 3)}
    other = {"count": 2, "accuracy": pytest.approx(0.8), "all normalised": pytest.approx(0.8)}
    assert result["groups"]["answer_type"]["other"] == other
    assert result["groups"]["question_type"]["how many"]["accuracy"] == pytest.approx(0.9)
    assert "83.33" in out
    assert json.loads(Path("s.json").read_text()) == [
        {"question_id": 10, "answer": "Red."},
        {"question_id": 11, "answer": "two"},
        {"question_id": 12, "answer": "a bus"},
        {"question_id": 13, "answer": ""},
    ]
    page = Path("a.html").read_text()
    assert "Right, 1 of 3" in page
    assert "Partly right, 2 of 3" in page
    assert "red (10)" in page
    assert not re.findall(r"(?:src|href)='(?!data:)", page)


def test_captions_of_nocaps_from_the_file_to_cider(root: Path, run: Run) -> None:
    """Each domain has two images; of the one both captions are their references, of the other neither."""
    texts = ["a red bus in the street", "two dogs run on some grass", "people eat at the table", "an old boat is blue"]
    domains = ["in-domain", "in-domain", "out-domain", "out-domain"]
    images = [{"id": n, "file_name": f"{n}.png", "domain": domains[n]} for n in range(4)]
    captions = [{"image_id": n, "id": n, "caption": text.capitalize() + "."} for n, text in enumerate(texts)]
    Path("nocaps.json").write_text(json.dumps({"images": images, "annotations": captions}))
    command = words(root, "caption", "name=coco", "path=nocaps.json", f"images={root / 'images'}")
    command += ["-o", "a.json", "--submission", "s.json"]
    code, _, err = run(*command)
    assert code == 0, err
    said = {"0": texts[0], "1": texts[1], "2": "zebra", "3": "zebra"}
    rewrite(Path("a.predictions.jsonl"), {number: {"said": text} for number, text in said.items()})
    code, out, err = run(*command)
    assert code == 0, err
    result = json.loads(Path("a.json").read_text())
    assert result["scores"]["CIDEr"] == pytest.approx(5, abs=1e-6)
    assert result["groups"]["domain"]["in-domain"]["CIDEr"] == pytest.approx(10, abs=1e-6)
    assert result["groups"]["domain"]["out-domain"]["CIDEr"] == pytest.approx(0, abs=1e-6)
    assert "SPICE is not available: Java is not installed" in out
    assert json.loads(Path("s.json").read_text())[3] == {"image_id": 3, "caption": "zebra"}


def test_submissions_of_lists_have_the_ids_of_the_data(root: Path, run: Run) -> None:
    """BLIP's lists: captions name no id, but COCO's files do; questions are read through `datasets`."""
    names = [f"COCO_val2014_{number:012d}.jpg" for number in (2, 0)]
    Path("captions.json").write_text(json.dumps([{"image": name, "caption": ["a bus"]} for name in names]))
    listed = words(root, "caption", "name=karpathy", "path=captions.json", f"images={root / 'coco'}")
    assert run(*listed, "--submission", "s.json", "--beams", "1")[0] == 0
    assert [record["image_id"] for record in json.loads(Path("s.json").read_text())] == [2, 0]
    asked = [{"image": name, "question": "what?", "answer": ["a bus"] * 10} for name in names]
    for column, given in (("question_id", []), ("number", ["question_id=number"]), (None, [])):
        rows = [record | ({column: 42000 + n} if column else {}) for n, record in enumerate(asked)]
        Path("questions.json").write_text(json.dumps(rows))
        data = ["name=datasets", "path=questions.json", "question=question", "answers=answer", *given]
        code, out, err = run(*words(root, "vqa", *data, f"images={root / 'coco'}"), "--submission", "s.json")
        assert code == 0, err
        numbers = [record["question_id"] for record in json.loads(Path("s.json").read_text())]
        assert numbers == ([42000, 42001] if column else [0, 1])
        assert ("2 of 2 records have no id" in " ".join(out.split())) == (column is None)


def test_answers_to_pictures_that_were_replaced_are_given_again(root: Path, run: Run, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (30, 30), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{tmp_path}/{n}.png", "question": "what is it?", "answers": ["a"]} for n in range(3)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*words(root, "vqa", "path=q.jsonl"), "-o", "a.json"]
    assert run(*command)[0] == 0
    before = (tmp_path / "1.png").stat()
    Image.new("RGB", (30, 30), (0, 0, 250)).save(tmp_path / "1.png")
    os.utime(tmp_path / "1.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    code, out, err = run(*command)
    assert code == 0, err
    assert json.loads(Path("a.json").read_text())["resumed"] == 2
    assert "1 answers in 'a.predictions.jsonl' are to pictures, questions or choices that have changed" in out


def test_choices_and_statements_of_json_lines_by_a_column(root: Path, run: Run) -> None:
    rows = [
        {
            "image": f"{root}/images/{n}.png",
            "question": "What?",
            "choices": ["a cat", "a dog"],
            "answer": "AB"[n % 2],
            "level": n // 2,
        }
        for n in range(4)
    ]
    Path("choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(*words(root, "choice", "path=choice.jsonl"), "--by", "level", "-o", "a.json")
    assert code == 0, err
    result = json.loads(Path("a.json").read_text())
    assert {level: row["count"] for level, row in result["groups"]["level"].items()} == {"0": 2, "1": 2}
    assert "by mean loss" in out
    rows = [{"image": f"{root}/images/{n}.png", "sentence": f"There are {n}.", "label": n > 1} for n in range(4)]
    Path("true.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(*words(root, "statement", "path=true.jsonl"), "-o", "b.json", "--prompt", "{} Answer:")
    assert code == 0, err
    assert json.loads(Path("b.json").read_text())["scores"].keys() == {"accuracy", "said yes"}


def test_an_interrupted_run_goes_on(root: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a line: that answer alone is given again, and the result is that of one run."""
    command = [*words(root, "vqa", *vqa(root)), "--batch", "1", "--predictions", "p.jsonl", "-o", "a.json"]
    assert run(*command)[0] == 0
    whole = Path("p.jsonl").read_text()
    Path("p.jsonl").write_text(whole[:-9])
    asked: list[str] = []
    real = benchmarks.predict

    def counted(bench: Any, model: Any, tiles: Any, items: Any, *rest: Any) -> Any:
        asked.extend(item.id for group in items for item in group)
        return real(bench, model, tiles, items, *rest)

    monkeypatch.setattr(benchmarks, "predict", counted)
    assert run(*command)[0] == 0
    assert asked == ["12"]
    assert Path("p.jsonl").read_text() == whole


def test_predictions_of_other_settings_are_not_mixed(root: Path, run: Run) -> None:
    command = [*words(root, "vqa", *vqa(root)), "--predictions", "p.jsonl"]
    assert run(*command)[0] == 0
    code, _, err = run(*command, "--preset", "lavis")
    assert code == 2
    assert "preset was 'paper', is 'lavis'" in err
    assert run(*command, "--limit", "1")[0] == 0  # asks for less of the same


@pytest.mark.parametrize("more", [["vqa"], ["vqa", "--prompt", "{}"], ["caption"]], ids=" ".join)
def test_beams_reach_the_model(root: Path, run: Run, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    asked: list[int] = []
    real = LanguageModel.generate

    def counted(self: LanguageModel, *given: Any, **options: Any) -> Any:
        asked.append(options.get("num_beams", 5))
        return real(self, *given, **options)

    monkeypatch.setattr(LanguageModel, "generate", counted)
    data = vqa(root) if more[0] == "vqa" else [f"path={root / 'captions.jsonl'}"]
    command = [*words(root, more[0], *data), *more[1:], "--limit", "1"]
    assert run(*command, "--beams", "2")[0] == run(*command)[0] == 0
    assert set(asked) == {2, 5}


def test_what_was_asked_about_something_else_is_asked_again(root: Path, run: Run) -> None:
    """Without ids a line's number is its id, so a file that lost a line says other things under the same ids."""
    rows = [{"image": f"{root}/images/{n}.png", "question": f"What is it {n}?", "answer": "cat"} for n in range(4)]
    command = [*words(root, "vqa", "path=q.jsonl"), "--predictions", "p.jsonl", "-o", "a.json"]

    def resumed(rows: list[dict[str, Any]]) -> int:
        Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, _, err = run(*command)
        assert code == 0, err
        return int(json.loads(Path("a.json").read_text())["resumed"])

    assert resumed(rows) == 0
    assert resumed(rows) == 4
    assert resumed(rows[1:]) == 0  # each line has moved to another id
    said = Path("p.jsonl").read_text()
    rows[3]["question"] = "And what is this?"
    assert resumed(rows[1:]) == 2
    assert len(said.splitlines()) == len(Path("p.jsonl").read_text().splitlines())


def test_a_question_that_is_too_long_is_counted_and_the_others_are_asked(root: Path, run: Run) -> None:
    rows = [{"id": n, "image": f"{root}/images/{n // 2}.png", "question": "What?", "answer": "cat"} for n in range(4)]
    rows[1]["question"] = "これは何ですか" * 200  # words are counted, and this is one
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(*words(root, "vqa", "path=q.jsonl"), "-o", "a.json", "--submission", "s.json")
    assert code == 0, err
    result = json.loads(Path("a.json").read_text())
    assert [record["kind"] for record in result["skipped"]] == ["too long"]
    assert result["skipped"][0]["detail"].startswith("1: ")
    assert (result["asked"], result["scored"]) == (4, 3)
    assert [row["question_id"] for row in json.loads(Path("s.json").read_text())] == [0, 1, 2, 3]
    Path("q.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert "none could be asked" in " ".join(run(*words(root, "vqa", "path=q.jsonl"))[1].split())


def test_without_answers_nothing_is_scored(root: Path, run: Run) -> None:
    data = [option for option in vqa(root) if not option.startswith("annotations")]
    code, out, err = run(*words(root, "vqa", *data), "--submission", "s.json", "--html", "a.html")
    assert code == 0, err
    assert "nothing is scored" in out
    assert [row["question_id"] for row in json.loads(Path("s.json").read_text())] == [10, 11, 12, 13]
    assert "Not scored" in Path("a.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--bench", "vqa", "--preset", "papper"], "papper"),
        (["--bench", "vqa", "--prompt", "Answer:"], "write {} where the question belongs"),
        (["--bench", "caption", "--lemmatize"], "does not compare answers by lemmas"),
        (["--bench", "vqa", "--submission", "none/s.json"], "cannot write 'none/s.json'"),
        (["--bench", "retrieval", "--by", "level"], "leave it out for retrieval"),
        (["--bench", "vqa", "--by", "levle"], "no record has it; they have answer_type, image_id, question_id"),
        (["--bench", "statement", "--beams", "2"], "statement compares given answers and writes none"),
        (["--bench", "choice"], "none of the 4 records could be used"),
    ],
)
def test_wrong_use_is_one_sentence_before_any_work(root: Path, run: Run, changes: list[str], message: str) -> None:
    command = words(root, "vqa", *vqa(root))
    code, _, err = run(*command[:2], *changes, *command[4:])
    assert code == 2
    assert message in err


def test_stage_one_cannot_answer(root: Path, run: Run) -> None:
    command = words(root, "vqa", *vqa(root))
    command[1] = str(root / "runs" / "stage1")
    code, _, err = run(*command)
    assert code == 2
    assert "stage one" in err


def _measured(root: str, folder: str) -> None:
    settings = Settings(f"{root}/runs/stage2", "vqa", vqa(Path(root)), batch=1, device="cpu")
    settings = Settings(**(vars(settings) | {"output": Path(folder) / "a.json"}))
    evaluate_language(settings)


@pytest.mark.slow
def test_two_processes_say_what_one_says(root: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    _measured(str(root), str(tmp_path / "one"))
    together(tmp_path / "store", 2, _measured, str(root), str(tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "a.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    for key in ("scores", "groups", "skipped", "asked", "scored", "made_by"):
        assert one[key] == two[key]
    said = [(tmp_path / name / "a.predictions.jsonl").read_text() for name in ("one", "two")]
    assert said[0] == said[1]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["a.json", "a.predictions.jsonl"]


def test_two_records_of_one_id_are_both_asked(root: Path) -> None:
    file = root / "twice.jsonl"
    rows = [{"id": "x", "image": "images/0.png", "question": f"What {n}?", "answer": "cat"} for n in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from qformer.data import sources

    listed, _ = choose("vqa").items(sources.build("jsonl", path=str(file)))
    assert [item.id for item in listed[0].items] == ["x", "x'"]
    with pytest.raises(UsageError, match="none of the 2 records"):
        choose("statement").items(sources.build("jsonl", path=str(file)))


class Loudness(Benchmark):
    """A benchmark of somebody else's, whole: does the model say more than nothing?"""

    def item(self, sample: Sample, place: int) -> Item:
        item = new_item(sample, place)
        item.question, item.accepted = f"how loud is picture {place}?", ["loud"]
        return item

    def predict(self, model: Any, tiles: Any, items: Any, ask: Any) -> list[dict[str, Any]]:
        texts = model.generate(tiles, "a photo of", **ask.decoding)
        return [{"said": text, "place": item.number} for text, own in zip(texts, items, strict=True) for item in own]

    def score(self, items: Any, records: Any, by: str | None, lemmas: bool) -> Measured:
        return mean_scores(items, {"even places": [float(record["place"] % 2 == 0) for record in records]}, by)


class Redness(Loudness):
    """One that needs a model of stage one, and compares what is given."""

    stage, writes = "stage1", False

    def predict(self, model: Any, tiles: Any, items: Any, ask: Any) -> list[dict[str, Any]]:
        rows, _ = model.embed_images(tiles)
        said = [str(len(own)) for own in rows]  # as many as there are queries
        return [{"said": text, "place": item.number} for text, own in zip(said, items, strict=True) for item in own]


def test_a_benchmark_of_ones_own_is_one_class(root: Path, run: Run) -> None:
    """By its name on the command line alone: table, JSON, page, submission, and kept predictions."""
    rows = [{"id": 70 + n, "image": f"{root}/images/{n}.png", "caption": "a cat", "level": n // 2} for n in range(4)]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"{__name__}:Loudness"
    command = [*words(root, name, "path=own.jsonl"), "-o", "a.json", "--submission", "s.json", "--html", "a.html"]
    code, out, err = run(*command, "--beams", "2", "--by", "level", "--limit", "3")
    assert code == 0, err
    result = json.loads(Path("a.json").read_text())
    assert (result["bench"], result["scored"]) == (name, 3)
    assert result["scores"] == {"even places": pytest.approx(2 / 3)}
    assert result["groups"]["level"]["1"] == {"count": 1, "even places": 1.0}
    assert "66.67" in out
    kept = [json.loads(line) for line in Path("a.predictions.jsonl").read_text().splitlines()]
    assert [record["place"] for record in kept[1:]] == [0, 1, 2]
    assert [record["question_id"] for record in json.loads(Path("s.json").read_text())] == [0, 1, 2]
    assert "how loud is picture 1?" in Path("a.html").read_text()
    code, _, err = run(*command, "--beams", "2", "--lemmatize")
    assert (code, f"{name} does not compare answers by lemmas" in err) == (2, True)


def test_a_benchmark_says_whose_model_it_needs(root: Path, run: Run) -> None:
    Path("own.jsonl").write_text(json.dumps({"image": f"{root}/images/0.png", "caption": "a cat"}) + "\n")
    command = words(root, f"{__name__}:Redness", "path=own.jsonl")
    code, _, err = run(*command)
    assert (code, "Redness needs one of stage one" in err) == (2, True)
    command[1] = str(root / "runs" / "stage1")
    code, _, err = run(*command, "-o", "a.json", "--predictions", "p.jsonl")
    assert code == 0, err
    made_by = json.loads(Path("a.json").read_text())["made_by"]
    assert len(made_by["weights"]) == 16
    assert json.loads(Path("p.jsonl").read_text().splitlines()[1])["said"].isdecimal()
    code, _, err = run(*command, "--beams", "2")
    assert (code, "leave --beams out" in err) == (2, True)
