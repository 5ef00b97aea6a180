"""`qformer eval`: what it writes, whatever the data and k are, and that several processes write what one does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qformer import stages
from qformer.evaluation import retrieval
from qformer.stages.evaluate import retrieval as evaluate
from qformer.stages.evaluate.retrieval import evaluate_retrieval
from qformer.stages.evaluate.settings import Settings
from tests.processes import together
from tests.tiny import CAPTIONS
from tests.workspace import PHOTOS, config, make_workspace

Run = Callable[..., tuple[int, str, str]]
NUMBERS = 13
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("space"))
    stages.train(config(root, "stage1", train={"steps": 2}, data={"features": str(root / "store")}))
    bad = [{"image": "images/none.png", "caption": "a cat"}, {"image": "images/0.png", "caption": "..."}]
    bad += [{"image": f"images/none{number}.png", "caption": "a dog"} for number in range(3)]
    more = [{"image": "images/1.png", "caption": EVIL}, {"image": "images/2.png", "caption": "a cat " * 5000}]
    lines = (root / "captions.jsonl").read_text().splitlines()
    lines = [json.dumps(bad[0]), *lines[:5], json.dumps(bad[1]), *lines[5:], *map(json.dumps, [*more, *bad[2:]])]
    (root / "mixed.jsonl").write_text("\n".join(lines))
    return root


def settings(root: Path, **changes: Any) -> Settings:
    options = {"k": 4, "batch": 5, "device": "cpu"} | changes
    return Settings(str(root / "runs" / "stage1"), "retrieval", [f"path={root / 'mixed.jsonl'}"], **options)


def test_the_command_writes_table_json_and_sheet(root: Path, run: Run) -> None:
    words = ["eval", str(root / "runs" / "stage1"), "--bench", "retrieval", "--data", f"path={root / 'mixed.jsonl'}"]
    code, out, err = run(*words, "-k", "4", "-o", "a.json", "--html", "a.html", "--device", "cpu")
    assert code == 0, err
    assert f"{PHOTOS} images, {2 * PHOTOS + 2} texts, k = 4, fp32" in out
    assert out.count("ITM + ITC") == 4  # of both queries, once more as the original counts
    assert "skipped 5 samples" in out
    result = json.loads(Path("a.json").read_text())
    assert (result["images"], result["texts"], result["processes"]) == (PHOTOS, 2 * PHOTOS + 2, 1)
    assert [record["kind"] for record in result["skipped"]] == ["no caption", *["missing"] * 4]
    assert PHOTOS * 4 <= result["pairs"] <= (3 * PHOTOS + 2) * 4
    assert result["equal_captions"] == PHOTOS  # the first caption of each photo is that of another one
    assert f"{PHOTOS} texts are word for word a caption of another image" in " ".join(out.split())
    plain = ("itc", "itm", "reranked", "linear")
    for kind in (*plain, *(f"{kind}_original" for kind in plain)):
        assert len(result[kind]) == NUMBERS
        assert all(0 <= value <= 1 for name, value in result[kind].items() if "rank" not in name)
        assert all(1 <= value <= 2 * PHOTOS + 2 for name, value in result[kind].items() if "rank" in name)
    page = Path("a.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)='(?!data:)", page)
    for way, queries in (("A text looks for its image", 2 * PHOTOS + 2), ("An image looks for its texts", PHOTOS)):
        fates = re.findall(rf"{way}: [\w -]+, (\d+) of {queries}<", page)
        assert sum(map(int, fates)) == queries
    assert page.count("Re-ranked, by ITM + ITC") == page.count("By ITC") == page.count("class=search")
    searches = page.split("<section class=search>")[1:]
    assert all("✓ right" in search for search in searches)
    assert any("<h3>The right one<" in search for search in searches)


def test_karpathy_json_with_several_captions_an_image(root: Path, run: Run) -> None:
    """One split of a file as that of Flickr30k or COCO; another has images that are not here."""
    images = [
        {
            "filename": f"{number}.png",
            "split": "test" if number < 6 else "val",
            "sentences": [{"raw": f"{CAPTIONS[number % 5]} {which}"} for which in range(1 + number % 3)],
        }
        for number in range(PHOTOS + 4)
    ]
    Path("karpathy.json").write_text(json.dumps({"images": images}))
    data = ["name=karpathy", "path=karpathy.json", f"images={root / 'images'}", "split=test"]
    words = [word for option in data for word in ("--data", option)]
    code, _, err = run("eval", str(root / "runs" / "stage1"), "--bench", "retrieval", *words, "-o", "a.json")
    assert code == 0, err
    result = json.loads(Path("a.json").read_text())
    assert (result["images"], result["texts"], result["skipped"]) == (6, 12, [])
    assert result["pairs"] == 6 * 12  # all, since k is more than there are
    assert result["reranked"]["i2t_r10"] <= 1


def test_scores_are_those_of_everything_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed in groups with bad images among them, against `score` of the good ones."""
    kept: list[Any] = []
    monkeypatch.setattr(evaluate, "_report", lambda *given: kept.append(given))
    evaluate_retrieval(settings(root))
    _, _, images, _, scores, *_ = kept[0]
    bridge = evaluate._load(settings(root))
    photos = [root / "images" / f"{number}.png" for number in range(PHOTOS)]
    texts = [text for image in images for text in image.captions]
    expected = retrieval.score(bridge, [bridge.frontend.tiles(photos)], texts, 4)
    torch.testing.assert_close(scores.itc, expected.itc)
    assert torch.equal(scores.of_image, expected.of_image)
    torch.testing.assert_close(scores.image_to_text, expected.image_to_text, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.text_to_image, expected.text_to_image, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "images", "kinds"),
    [
        ({"k": 0}, PHOTOS, ["itc"]),
        ({"k": 9999, "limit": 1}, 0, []),  # the first image is missing, and no other is asked for
        ({"k": 9999, "limit": 3}, 2, ["itc", "itm", "reranked"]),
        ({"precision": "bf16"}, PHOTOS, ["itc", "itm", "reranked"]),
        ({"precision": "fp16", "batch": 1}, PHOTOS, ["itc", "itm", "reranked"]),
    ],
)
def test_sizes_and_precisions(
    root: Path, tmp_path: Path, changes: dict[str, Any], images: int, kinds: list[str]
) -> None:
    files = {"output": tmp_path / "a.json", "html": tmp_path / "a.html"}
    if not images:
        with pytest.raises(evaluate.UsageError, match="none of the 1 images could be read"):
            evaluate_retrieval(settings(root, **changes, **files))
        return
    evaluate_retrieval(settings(root, **changes, **files))
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["images"] == images
    assert [kind for kind in ("itc", "itm", "reranked") if kind in result] == kinds
    assert ("Re-ranked, by" in (tmp_path / "a.html").read_text()) == (len(kinds) > 1)


def test_a_sheet_of_images_that_have_gone(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(root / "images", tmp_path / "images")
    shutil.copy(root / "mixed.jsonl", tmp_path / "mixed.jsonl")
    score = evaluate._score

    def and_remove(*given: Any) -> Any:
        done = score(*given)
        shutil.rmtree(tmp_path / "images")
        return done

    monkeypatch.setattr(evaluate, "_score", and_remove)
    data = [f"path={tmp_path / 'mixed.jsonl'}"]
    evaluate_retrieval(Settings(str(root / "runs" / "stage1"), "retrieval", data, 4, html=tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text()
    assert "<img" not in page
    assert "cannot be read any more" in page


@pytest.mark.parametrize("name", ["no/folder/a.json", "."])
def test_a_result_that_cannot_be_written_is_told_at_once(root: Path, run: Run, name: str) -> None:
    words = ["eval", str(root / "runs" / "stage1"), "--bench", "retrieval", "--data", f"path={root / 'mixed.jsonl'}"]
    code, out, err = run(*words, "-o", name)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == f"qformer: cannot write '{name}'; give a file in a folder that exists"


def test_no_room_for_the_features(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(evaluate.UsageError, match="10 bytes are free; set TMPDIR to a folder with more room"):
        evaluate_retrieval(settings(root))
    evaluate_retrieval(settings(root, k=0))


def measure(root: Path, folder: Path) -> str:
    """What this process says, and rank 0 writes."""
    with evaluate.console.capture() as said:
        evaluate_retrieval(settings(root, k=3, batch=2, output=folder / "a.json", html=folder / "a.html"))
    return said.get()


def test_two_processes_write_what_one_does(root: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "one").mkdir()
    measure(root, tmp_path / "one")
    torch.set_num_threads(threads)
    first, second = together(tmp_path / "two", 2, measure, root, tmp_path / "two")
    assert f"{PHOTOS} images" in first
    assert second == ""
    one, two = (json.loads((tmp_path / folder / "a.json").read_text()) for folder in ("one", "two"))
    assert one.pop("processes") == 1
    assert two.pop("processes") == 2
    assert one.pop("seconds") > 0 < two.pop("seconds")
    assert one == two
    pages = [re.sub(r"\d+ s<", "s<", (tmp_path / folder / "a.html").read_text()) for folder in ("one", "two")]
    assert pages[0] == pages[1]
