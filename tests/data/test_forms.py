"""Every row of the table of published forms in docs/data.md, read by its own options from a small file of that form."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from qformer.data import sources
from qformer.data.base import indices
from qformer.evaluation.benchmarks import choose
from qformer.types import BadSample, UsageError
from tests.data.making import encoded, number_of, photo, shard

if TYPE_CHECKING:
    from collections.abc import Callable

datasets.disable_progress_bars()
DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
SECTION = DOCUMENT.partition("## Published forms")[2].partition("\n## ")[0]
ROWS: dict[str, str] = dict(re.findall(r"^\| ([^|`-][^|]*?) \| `(\{.*?\})` \|", SECTION, flags=re.MULTILINE))
PICTURE = {"bytes": encoded(photo(7), "PNG"), "path": None}
WRITTEN = base64.b64encode(PICTURE["bytes"]).decode()  # type: ignore[arg-type]
#: What is expected of a form: the benchmark that it is of, and for each record its number, what is asked, the captions
#: or the accepted answers, and the choices with the right one; or the kind of a bad record.
Expected = tuple[str, list[Any]]
FORMS: dict[str, Callable[[], Expected]] = {}


def form(name: str) -> Callable[[Callable[[], Expected]], Callable[[], Expected]]:
    def known(function: Callable[[], Expected]) -> Callable[[], Expected]:
        FORMS[name] = function
        return function

    return known


def picture(name: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(PICTURE["bytes"])  # type: ignore[arg-type]


def write(name: str, values: Any) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(json.dumps(values), encoding="utf-8")


def lines(name: str, *records: Any) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def table(name: str, **columns: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), name)


def ten(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(answers, 1)]


def chosen(number: Any, question: str, choices: list[str], right: int | None) -> tuple[Any, ...]:
    return number, question, [], choices, right


def asked(number: Any, question: str, *accepted: str) -> tuple[Any, ...]:
    return number, question, list(accepted), [], None


def described(number: Any, *captions: str) -> tuple[Any, ...]:
    return number, "", list(captions), [], None


@form("Karpathy's COCO, Flickr30k, Flickr8k")
def karpathy() -> Expected:
    picture("coco/val2014/COCO_val2014_000000000042.jpg")
    sentences = [{"tokens": ["a", "kite"], "raw": "A kite.", "imgid": 0, "sentid": 1}]
    image = {"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "cocoid": 42, "split": "test"}
    write("dataset_coco.json", {"dataset": "coco", "images": [image | {"sentences": sentences}, {"split": "train"}]})
    return "caption", [described(42, "A kite.")]


@form("Caption lists of BLIP and LAVIS")
def caption_list() -> Expected:
    picture("coco/val2014/a.jpg")
    write("coco_karpathy_val.json", [{"image": "val2014/a.jpg", "caption": ["A kite.", "A toy."]}])
    return "caption", [described(0, "A kite.", "A toy.")]


@form("COCO, NoCaps")
def nocaps() -> Expected:
    picture("nocaps/0a.jpg")
    images = [{"id": 3, "file_name": "0a.jpg", "domain": "near-domain"}, {"id": 4}]
    annotations = [{"image_id": n, "id": 9, "caption": "A kite."} for n in ("3", 3)]  # ids as text and as numbers
    write("nocaps_val_4500_captions.json", {"info": {}, "images": images, "annotations": annotations})
    return "caption", [described(3, "A kite.", "A kite."), "no image"]


@form("Visual Genome, regions")
def regions() -> Expected:
    picture("vg/VG_100K/7.jpg")
    write("region_descriptions.json", [{"id": 7, "regions": [{"phrase": "a kite", "x": 1, "width": 9}]}])
    return "caption", [described(7, "a kite")]


@form("TextCaps")
def textcaps() -> Expected:
    picture("train_images/0a1b.jpg")
    record = {"image_id": "0a1b", "caption_str": "A sign that says go.", "caption_id": 5, "reference_strs": ["A", "B"]}
    write("TextCaps_0.1_val.json", {"dataset_name": "textcaps", "data": [record]})
    return "caption", [described("0a1b", "A sign that says go.")]


@form("ImageFolder of `datasets`, as it is uploaded to the hub")
def image_folder() -> Expected:
    picture("photos/a.png")
    lines("photos/metadata.jsonl", {"file_name": "a.png", "text": "a kite"}, {"file_name": "a.png", "text": None})
    return "caption", [described(0, "a kite"), described(1)]


@form("COCO on the hub, captions as objects")
def caption_objects() -> Expected:
    sentences = [[{"raw": "A kite.", "tokens": ["a", "kite"]}, {"raw": "A toy.", "tokens": ["a", "toy"]}]]
    table("train-0.parquet", image=[PICTURE], sentences=sentences, cocoid=[42])
    return "caption", [described(42, "A kite.", "A toy.")]


@form("Tables of captions (Flickr8k's `captions.txt` under another name)")
def caption_table() -> Expected:
    picture("Images/a.jpg")
    Path("captions.csv").write_text('image,caption\na.jpg,"A kite, red."\na.jpg,None\na.jpg,12\n')
    return "caption", [described(0, "A kite, red."), described(1, "None"), described(2, "12")]


@form("Tars of webdataset, img2dataset")
def tars() -> Expected:
    shard(Path("cc3m/00000.tar"), [7])
    return "caption", [described(0, "picture 7")]


@form("VQAv2, OK-VQA")
def vqa() -> Expected:
    picture("val2014/COCO_val2014_000000000042.jpg")
    questions = [{"image_id": 42, "question": "What flies?", "question_id": number} for number in (420, 421)]
    write("v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": questions})
    answers = {"question_id": 420, "image_id": 42, "question_type": "four", "answers": ten("kite", "toy")}
    answers["answers"][0]["raw_answer"] = "kites"  # of OK-VQA; the other is what its evaluation counts
    write("v2_mscoco_val2014_annotations.json", {"annotations": [answers]})
    return "vqa", [asked(420, "what flies?", "kite", "toy"), asked(421, "what flies?")]


@form("VQA-CP")
def vqa_cp() -> Expected:
    picture("coco/COCO_train2014_000000000042.jpg")
    base = {"coco_split": "train2014", "image_id": 42, "question_id": 420}
    write("vqacp_v2_test_questions.json", [base | {"question": "What flies?"}])
    write("vqacp_v2_test_annotations.json", [base | {"question_type": "what", "answers": ten("kite")}])
    return "vqa", [asked(420, "what flies?", "kite")]


@form("GQA")
def gqa() -> Expected:
    picture("images/n7.jpg")
    for part, number in enumerate(("201", "202")):
        record = {"imageId": "n7", "question": "What flies?", "answer": "kite", "fullAnswer": "It is a kite."}
        write(f"train_all_questions/train_all_questions_{part}.json", {number: record})
    return "gqa", [asked("201", "what flies?", "kite"), asked("202", "what flies?", "kite")]


@form("A-OKVQA")
def aokvqa() -> Expected:
    picture("val2017/000000000042.jpg")
    base = {"split": "val", "image_id": 42, "question": "What flies?", "choices": ["a kite", "a bird"]}
    base |= {"correct_choice_idx": 0, "rationales": ["It has a string."]}
    known = base | {"question_id": "q1", "direct_answers": ["kite"] * 10, "difficult_direct_answer": False}
    difficult = base | {"question_id": "q2", "direct_answers": ["toy"] * 10, "difficult_direct_answer": True}
    write("aokvqa_v1p0_val.json", [known, difficult])
    return "vqa", [asked("q1", "what flies?", *["kite"] * 10), asked("q2", "what flies?")]


@form("VQA lists of BLIP and LAVIS")
def vqa_list() -> Expected:
    picture("coco/val2014/a.jpg")
    record = {"question": "What flies?", "image": "val2014/a.jpg", "dataset": "vqa"}
    write("vqa_val.json", [record | {"question_id": 420, "answer": ["kite"] * 2}, record | {"question_id": 421}])
    return "vqa", [asked(420, "what flies?", "kite", "kite"), asked(421, "what flies?")]


@form("VizWiz")
def vizwiz() -> Expected:
    picture("vizwiz/VizWiz_val_00000000.jpg")
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}, {"answer": "a kite", "answer_confidence": "no"}]
    record = {"image": "VizWiz_val_00000000.jpg", "question": "What flies?", "answers": answers, "answerable": 0}
    write("val.json", [record])
    return "vqa", [asked("VizWiz_val_00000000.jpg", "what flies?", "unanswerable", "a kite")]


@form("TextVQA")
def textvqa() -> Expected:
    picture("train_images/0a1b.jpg")
    record = {"question": "What is written?", "image_id": "0a1b", "answers": ["go", "go!"], "question_id": 34602}
    write("TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": [record | {"image_classes": ["Sign"]}]})
    return "vqa", [asked(34602, "what is written?", "go", "go!")]


@form("DocVQA, InfographicVQA")
def docvqa() -> Expected:
    picture("infographics/1.jpeg")
    record = {"questionId": 65, "question": "Which year?", "image_local_name": "1.jpeg", "answers": ["1999"]}
    write("infographicsVQA_val_v1.0.json", {"dataset_split": "val", "data": [record]})
    return "vqa", [asked(65, "which year?", "1999")]


@form("ChartQA")
def chartqa() -> Expected:
    picture("png/1.png")
    write("test_human.json", [{"imgname": "1.png", "query": "How many bars?", "label": 3}])
    return "vqa", [asked(0, "how many bars?", "3")]


@form("POPE")
def pope() -> Expected:
    picture("val2014/a.jpg")
    record = {"image": "a.jpg", "text": "Is there a kite?"}
    lines(
        "coco_pope_random.json", *[record | {"question_id": n, "label": label} for n, label in ((1, "yes"), (2, "no"))]
    )
    return "vqa", [asked(1, "is there a kite?", "yes"), asked(2, "is there a kite?", "no")]


@form("LLaVA's question files (LLaVA-Bench, MME, TextVQA, ...)")
def llava() -> Expected:
    picture("images/001.jpg")
    lines("questions.jsonl", {"question_id": 9, "image": "001.jpg", "text": "What flies?", "category": "conv"})
    return "vqa", [asked(9, "what flies?")]


@form("LLaVA's training files, also those of LLaVA-NeXT-Interleave and LLaVA-OneVision")
def llava_training() -> Expected:
    picture("images/001.jpg")
    said = [{"from": "human", "value": "<image>\nWhat flies?"}, {"from": "gpt", "value": "A kite."}]
    told = [{"id": "001", "image": "001.jpg", "conversations": said}, {"id": "t1", "conversations": said}]
    write("llava_v1_5_mix665k.json", told)
    return "vqa", [asked("001", "what flies?", "A kite."), "no image"]


@form("VQAv2, POPE, MME on the hub")
def vqa_on_the_hub() -> Expected:
    columns = {"image": [PICTURE], "image_id": [42], "question_id": [420], "question": ["What flies?"]}
    table("val-0.parquet", **columns, answers=[ten("kite", "toy")], answer_type=["other"])
    return "vqa", [asked(420, "what flies?", "kite", "toy")]


@form("A-OKVQA on the hub")
def aokvqa_on_the_hub() -> Expected:
    columns = {"image": [PICTURE], "question_id": ["q1"], "question": ["What flies?"], "choices": [["kite", "bird"]]}
    columns |= {"correct_choice_idx": [1], "direct_answers": ["['kite', \"a toy\"]"], "difficult_direct_answer": [True]}
    table("val-0.parquet", **columns)
    return "choice", [chosen("q1", "what flies?", ["kite", "bird"], 1)]


@form("ScienceQA on the hub")
def science_on_the_hub() -> Expected:
    columns = {"image": [PICTURE, None], "question": ["What flies?", "Which is even?"], "hint": ["", "Count."]}
    table("test-0.parquet", **columns, choices=[["kite", "bus"], ["1", "2", "3"]], answer=pyarrow.array([1, 1], "int8"))
    return "choice", [chosen(0, "what flies?", ["kite", "bus"], 1), "no image"]


@form("ScienceQA")
def science() -> Expected:
    picture("images/test/5/image.png")
    record = {"question": "What flies?", "choices": ["bus", "kite"], "answer": 1, "lecture": "Wind ..."}
    problems = {"5": record | {"image": "image.png", "split": "test"}, "6": record | {"image": None, "split": "test"}}
    write("problems.json", problems | {"7": record | {"image": "image.png", "split": "train"}})
    return "choice", [chosen("5", "what flies?", ["bus", "kite"], 1), "no image"]


@form("MMBench")
def mmbench() -> Expected:
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"]
    rows = [
        ["241", "What flies?", "", "None", "007", "nan", "", "B", "physics", WRITTEN, "dev"],
        ["242", "What flies?", "nan", "kite", "", "bus", "", "A", "physics", WRITTEN, "dev"],
    ]
    Path("mmbench_dev_20230712.tsv").write_text("".join("\t".join(row) + "\n" for row in [head, *rows]))
    return "choice", [chosen(241, "what flies?", ["None", "007"], 1), "no choices"]


@form("SEED-Bench")
def seed() -> Expected:
    picture("SEED-Bench-image/1454_25")
    record = {
        "question_id": "101",
        "question": "What flies?",
        "answer": "D",
        "data_id": "1454_25",
        "data_type": "image",
    }
    choices = {f"choice_{letter}": letter * 2 for letter in "abcd"}
    write("SEED-Bench.json", {"questions": [record | choices], "question_type": {"Scene": 1}})
    return "choice", [chosen("101", "what flies?", ["aa", "bb", "cc", "dd"], 3)]


@form("AI2D on the hub")
def ai2d() -> Expected:
    table("test-0.parquet", image=[PICTURE], question=["What flies?"], options=[["bus", "kite"]], answer=["1"])
    return "choice", [chosen(0, "what flies?", ["bus", "kite"], 1)]


@form("VSR")
def vsr() -> Expected:
    picture("images/000000000042.jpg")
    record = {"image": "000000000042.jpg", "caption": "The kite is above the bus.", "relation": "above"}
    lines("test.jsonl", *[record | {"label": label} for label in (1, 0)])
    question = "is it true that the kite is above the bus?"
    return "statement", [(n, question, [], ["yes", "no"], n) for n in (0, 1)]


def test_the_table_and_the_tests_name_the_same_forms() -> None:
    assert list(ROWS) == list(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_read_by_the_options_of_its_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    bench, expected = FORMS[name]()
    options = yaml.safe_load(ROWS[name])
    source = sources.build(options.pop("name"), **options)
    found: list[Any] = []
    for place, index in enumerate(indices(source)):
        try:
            sample = source[index]
            assert number_of(sample) == 7
            item = choose(bench).item(sample, place)
            found.append((item.number, item.question, item.accepted, item.choices, item.right))
        except BadSample as bad:
            found.append(bad.kind)
    assert found == expected


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"questions": [{"image_id": 1, "question": "what?", "question_id": 2}]}, "vqa"),
        ([{"image_id": 1, "question": "what?", "question_id": 2}], "vqa"),
        ([{"image_id": 1, "question_id": 2, "answers": []}], "vqa, with this as data.annotations"),
        ({"annotations": [{"image_id": 1, "question_id": 2}]}, "vqa, with this as data.annotations"),
        ([{"image_id": 1, "question": "what?", "choices": ["a", "b"]}], "aokvqa"),
        ({"201": {"imageId": "n7", "question": "what?"}}, "gqa"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, "coco"),
        ({"images": [{"filename": "a.jpg", "sentences": []}]}, "karpathy"),
        ([{"id": 1, "regions": []}], "visual_genome"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_of_another_source_is_named(tmp_path: Path, values: Any, name: str, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(values, indent=indent))
    with pytest.raises(UsageError, match=rf"by name: {re.escape(name)}$"):
        sources.build("jsonl", path=str(tmp_path / "a.json"))


def records_of(name: str, **options: Any) -> list[tuple[list[str], list[str], Any]]:
    source = sources.build(name, **options)
    samples = [source[index] for index in indices(source)]
    return [(sample.captions, sample.answers, sample.facts.get("question_id")) for sample in samples]


def test_tables_in_text_as_people_save_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results.csv").write_text("image_name| comment_number| comment\n7.jpg| 0| A kite, and a bird\n")
    columns = {"image": "image_name", "caption": "comment"}
    assert records_of("datasets", path="results.csv", **columns)[0][0] == ["A kite, and a bird"]
    Path("excel.csv").write_text("image;caption\n7.jpg;a kite, and a bird\n")
    assert records_of("datasets", path="excel.csv")[0][0] == ["a kite, and a bird"]
    rows = ["42,7.jpg,what?,kite", "43.0,7.jpg,what?,bird", "007,7.jpg,what?,kite"]
    Path("asked.csv").write_text("\n".join(["question_id,image,question,answer", *rows]))
    assert [row[2] for row in records_of("datasets", path="asked.csv")] == [42, 43, "007"]
    for kind, told in {"utf-16": "UTF-16 text", "utf-16-le": "UTF-16-LE text", "cp1252": "not UTF-8 text"}.items():
        Path("other.csv").write_bytes("image,caption\n7.jpg,caf\u00e9\n".encode(kind))
        with pytest.raises(UsageError, match=told):
            sources.build("datasets", path="other.csv")
    Path("one.tsv").write_text("image\tcaption\n7.jpg\ta\n")
    with pytest.raises(UsageError, match=r"are files of \.csv, \.tsv; give those of one kind"):
        sources.build("datasets", path=["excel.csv", "one.tsv"])
    datasets.Dataset.from_dict({"image": ["7.jpg"], "caption": ["a kite"]}).save_to_disk("saved")
    with pytest.raises(UsageError, match=r"no row in split 'train\[:10%\]'"):
        sources.build("datasets", path="saved", split="train[:10%]")


def test_files_of_json_that_people_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("filter_cap.json", {"annotations": [{"image_id": "7", "caption": "a kite"}]})
    assert records_of("jsonl", path="filter_cap.json") == [(["a kite"], [], None)]
    lines("a.jsonl", {"image": "7.jpg", "caption": "a kite", "photo": 3})
    with pytest.raises(UsageError, match="no column 'phot': did you mean 'photo'"):
        sources.build("jsonl", path="a.jsonl", id="phot")
    Path("a.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    with pytest.raises(UsageError, match="compressed; unpack it"):
        sources.build("jsonl", path="a.jsonl.gz")


def test_forms_that_are_taken_for_each_other_are_named(tmp_path: Path) -> None:
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    karpathy = {"images": [{"split": "test", "filename": "a.jpg", "sentences": [{"raw": "a"}]}]}
    for given, other, values in [("karpathy", "coco", coco), ("coco", "karpathy", karpathy)]:
        write(str(tmp_path / "a.json"), values)
        with pytest.raises(UsageError, match=f"read it by name: {other}$"):
            sources.build(given, path=str(tmp_path / "a.json"), images=str(tmp_path))
    with pytest.raises(UsageError, match="has no split 'train'; it has test"):
        sources.build("karpathy", path=str(tmp_path / "a.json"), images=str(tmp_path))
