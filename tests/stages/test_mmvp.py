"""`qformer eval --bench mmvp` and `mmvp-vlm` as commands, with untrained models and files of the published layouts."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qformer import stages
from qformer.canvases.pairs import Twins, write_pairs
from qformer.evaluation.mmvp import PATTERNS, correlation
from qformer.images import read_image
from qformer.metrics.proportions import correlation_interval
from qformer.retrieval.embedders import load_embedder
from qformer.suites.mmvp_statements import compare_pair
from tests.evaluation.test_mmvp import write_vlm
from tests.tiny_clip import save_tiny_blip_retrieval, save_tiny_clip, save_tiny_siglip
from tests.workspace import config, make_workspace

Run = Callable[..., tuple[int, str, str]]
PAIRS = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("space"))
    stages.train(config(root, "stage1", train={"steps": 2}))
    stages.train(config(root, "stage2", train={"steps": 2}))
    write_pairs(root / "pairs", Twins(), PAIRS)
    return root


def test_questions_are_asked_kept_and_scored_again_with_a_graders_verdicts(
    root: Path, run: Run, tmp_path: Path
) -> None:
    words = [
        "eval",
        str(root / "runs" / "stage2"),
        "--bench",
        "mmvp",
        "--data",
        f"path={root / 'pairs'}",
        "--beams",
        "1",
    ]
    code, out, err = run(*words, "-o", "a.json", "--submission", "answers.jsonl", "--html", "a.html", "--device", "cpu")
    assert code == 0, err
    assert "grader is not available" in out
    first = json.loads(Path("a.json").read_text())
    assert (first["asked"], first["scored"], first["resumed"]) == (6 * PAIRS, 6 * PAIRS, 0)
    assert {"parser", "likelier", "single", "unread"} == first["scores"].keys()
    assert len(first["groups"]["asked"]) == 3
    assert len(Path("answers.jsonl").read_text().splitlines()) == 2 * PAIRS
    (tmp_path / "grades.txt").write_text("yes\n" * 2 * PAIRS)
    code, _, err = run(*words, "--data", f"grades={tmp_path / 'grades.txt'}", "-o", "a.json", "--device", "cpu")
    assert code == 0, err
    again = json.loads(Path("a.json").read_text())
    assert again["resumed"] == 6 * PAIRS  # verdicts change no answer
    assert again["scores"]["grader"] == 1.0
    assert again["scores"]["parser"] == first["scores"]["parser"]
    assert again["intervals"]["all"]["grader"][1] == 1.0


@pytest.mark.parametrize("save", [save_tiny_clip, save_tiny_siglip, save_tiny_blip_retrieval, None])
def test_any_model_that_compares_is_measured(root: Path, run: Run, tmp_path: Path, save: Any) -> None:
    model = str(root / "runs" / "stage1") if save is None else str(save(tmp_path / "model"))
    folder = write_vlm(tmp_path / "vlm", kinds=tuple("ABCDEFGHI"))
    (tmp_path / "mllm.json").write_text(
        json.dumps({"groups": {"pattern": {"Texts": {"parser": 0.5}, "State and Condition": {"parser": 0.1}}}})
    )
    for number, name in enumerate(("red_thing", "green_thing")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (28, 28), (200 * (1 - number), 200 * number, 0)).save(tmp_path / "classes" / name / "0.png")
    data = [f"path={folder}", f"mllm={tmp_path / 'mllm.json'}", f"zero_shot={tmp_path / 'classes'}"]
    words = ["eval", model, "--bench", "mmvp-vlm", *(word for one in data for word in ("--data", one))]
    code, _, err = run(*words, "-o", "b.json", "--device", "cpu")
    assert code == 0, err
    result = json.loads(Path("b.json").read_text())
    ways = {"itc", "itm"} if save in (save_tiny_blip_retrieval, None) else {"itc"}
    assert result["scores"].keys() == ways == result["correlation"].keys()
    assert (result["pairs"], len(result["groups"]["pattern"])) == (9, 9)
    assert result["scores"]["itc"] == pytest.approx(sum(v["itc"] for v in result["groups"]["pattern"].values()) / 9)
    assert (result["zero_shot"]["images"], result["zero_shot"]["classes"]) == (2, 2)
    run(*words, "-o", "b.json", "--device", "cpu")
    assert json.loads(Path("b.json").read_text())["resumed"] == 9


def test_models_of_several_sizes_stand_in_one_table(root: Path, run: Run, tmp_path: Path) -> None:
    """Two CLIPs of other widths and resolutions, the shipped one, and a stage-one checkpoint with two columns."""
    small, large = save_tiny_clip(tmp_path / "small"), save_tiny_clip(tmp_path / "large", side=56, width=32)
    models = [str(small), str(large), "mini:clip", str(root / "runs" / "stage1")]
    folder = write_vlm(tmp_path / "vlm", kinds=tuple("ABCDEFGHI"))
    scores = {name: {"parser": place / 10, "people": 1 - place / 10} for place, name in enumerate(PATTERNS)}
    (tmp_path / "mllm.json").write_text(json.dumps({"groups": {"pattern": scores}}))
    data = ("--data", f"path={folder}", "--data", f"mllm={tmp_path / 'mllm.json'}")
    words = ("eval", *models, "--bench", "mmvp-vlm", *data, "-o", "t.json", "--device", "cpu")
    code, out, err = run(*words)
    assert code == 0, err
    assert "4 models, 9 pairs" in out
    result = json.loads(Path("t.json").read_text())
    assert [one["checkpoint"] for one in result["models"]] == models
    assert [one["side"] for one in result["models"]] == [28, 56, 120, 28]
    assert result["models"][0]["parameters"] < result["models"][1]["parameters"]
    head, rows = result["table"]["head"], {row[0]: row[1:] for row in result["table"]["rows"]}
    assert head[1:4] == [f"{model} (itc)" for model in models[:3]]
    assert head[4:] == [f"{models[3]} (itc)", f"{models[3]} (itm)", "MLLM", "people"]
    assert [name for name in rows if name in PATTERNS] == list(PATTERNS)
    assert rows["Texts"][-2:] == ["70.0", "30.0"]
    assert rows["mean of patterns"][-2] == "40.0"
    for place, one in enumerate(result["models"][:3]):
        shares = [values["itc"] for values in one["groups"]["pattern"].values()]
        value = correlation(shares, [place / 10 for place in range(9)])
        low, high = correlation_interval(value, 9)
        if value == value:  # else all photos of a pattern are alike to the model
            assert rows["correlation with MLLM"][place] == f"{value:.2f} ({low:.2f} to {high:.2f})"
            assert one["correlation"]["itc"] == pytest.approx(-one["correlation_people"]["itc"])
    kept = sorted(file.name for file in Path().glob("t.*.predictions.jsonl"))
    assert len(kept) == 4
    assert run(*words)[0] == 0
    assert [one["resumed"] for one in json.loads(Path("t.json").read_text())["models"]] == [9] * 4
    code, _, err = run("eval", models[0], models[0], "--bench", "mmvp-vlm", *data)
    assert (code, "was given twice" in err) == (2, True)
    code, _, err = run("eval", models[0], models[1], "--bench", "vqa", *data)
    assert (code, "vqa measures one model at a time" in err) == (2, True)


def test_blip_is_compared_as_transformers_compares_it(tmp_path: Path) -> None:
    path = save_tiny_blip_retrieval(tmp_path / "blip")
    embedder: Any = load_embedder(str(path), "cpu")
    files = []
    for number in range(2):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (28, 28), (90 * number, 10, 200)).save(files[-1])
    images, texts = [read_image(file) for file in files], ["a cat on the mat", "two dogs"]
    found = compare_pair(embedder, images, texts)
    pixels = embedder.processor(images=images, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    for row, text in enumerate(texts):
        tokens = embedder.tokenizer([text] * 2, return_tensors="pt")
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "pixel_values": pixels}
        with torch.no_grad():
            cosines = embedder.model(**inputs, use_itm_head=False).itm_score[:, 0]
            matches = embedder.model(**inputs).itm_score
        torch.testing.assert_close(torch.tensor(found["itc"][row]), cosines, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(found["itm"][row]), matches[:, 1] - matches[:, 0], rtol=1e-4, atol=1e-4)


class _OpenClip(torch.nn.Module):
    """What is used of a model of open_clip: a photo is its mean color, a text the number of its letters."""

    logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([tokens.ne(0).sum(1), tokens[:, 0], tokens[:, 1]], dim=1).float()


def test_open_clip_is_used_by_name_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    folder = write_vlm(tmp_path / "vlm")
    words = ["eval", "open_clip:tiny/own", "--bench", "mmvp-vlm", "--data", f"path={folder}", "--device", "cpu"]
    monkeypatch.setitem(sys.modules, "open_clip", None)
    code, _, err = run(*words)
    assert (code, err.count("pip install open_clip_torch")) == (2, 1)

    class Tokenizer:
        context_length = 8

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[*map(ord, text[:8]), *[0] * (8 - len(text[:8]))] for text in texts])

    def create(model: str, pretrained: str) -> Any:
        if pretrained != "own":
            raise RuntimeError(f"no {pretrained}")
        return _OpenClip(), None, lambda image: torch.tensor(image.getpixel((0, 0)))[:, None, None].float()

    fake: Any = types.ModuleType("open_clip")
    fake.create_model_and_transforms, fake.get_tokenizer = create, lambda model: Tokenizer()
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    code, out, err = run(*words)
    assert code == 0, err
    assert "2 pairs" in out
    words[1] = "open_clip:tiny/other"
    code, _, err = run(*words)
    assert (code, "open_clip cannot load 'tiny/other' (no other)" in err) == (2, True)


@pytest.mark.parametrize("word", ["--preset lavis", "-k 7", "--by type", "--beams 2", "--prompt {}"])
def test_options_of_other_benchmarks_are_refused(run: Run, tmp_path: Path, word: str) -> None:
    folder, model = write_vlm(tmp_path / "vlm"), save_tiny_clip(tmp_path / "clip")
    code, _, err = run("eval", str(model), "--bench", "mmvp-vlm", "--data", f"path={folder}", *word.split())
    assert (code, "is for other benchmarks; leave it out for mmvp-vlm" in err) == (2, True)


def test_precision_is_that_of_the_model(run: Run, tmp_path: Path) -> None:
    """What is compared differs from fp32, is no coarse number itself, and does not go on from the other's file."""
    folder, model = write_vlm(tmp_path / "vlm"), save_tiny_clip(tmp_path / "clip")
    words = ["eval", str(model), "--bench", "mmvp-vlm", "--data", f"path={folder}", "--device", "cpu"]
    logits = {}
    for precision in ("fp32", "bf16"):
        assert run(*words, "--precision", precision, "-o", f"{precision}.json")[0] == 0
        assert json.loads(Path(f"{precision}.json").read_text())["precision"] == precision
        lines = Path(f"{precision}.predictions.jsonl").read_text().splitlines()
        logits[precision] = torch.tensor([json.loads(line)["itc"] for line in lines[1:]])
    assert not torch.equal(logits["fp32"], logits["bf16"])
    torch.testing.assert_close(logits["fp32"], logits["bf16"], rtol=0.05, atol=0.05)
    assert not torch.equal(logits["bf16"], logits["bf16"].bfloat16().float())
    code, _, err = run(*words, "--precision", "bf16", "-o", "fp32.json")
    assert (code, "belong to another run" in err) == (2, True)


def test_pairs_have_no_column_in_which_their_answers_differ(root: Path, run: Run) -> None:
    words = ("eval", str(root / "runs" / "stage2"), "--bench", "mmvp", "--data", f"path={root / 'pairs'}")
    code, _, err = run(*words, "--by", "answer", "--device", "cpu")
    assert (code, "--by is 'answer'" in err, "give asked or pattern" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (["pathh=x"], "pathh"),
        (["path=none"], "no folder at"),
        (["path={vlm}", "mllm=none.json"], "no accuracy by pattern"),
        (["path={vlm}", "zero_shot={vlm}"], "at least two"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_sentence(run: Run, tmp_path: Path, data: list[str], told: str) -> None:
    folder, model = write_vlm(tmp_path / "vlm"), save_tiny_clip(tmp_path / "clip")
    options = [word for one in data for word in ("--data", one.format(vlm=folder))]
    code, _, err = run("eval", str(model), "--bench", "mmvp-vlm", *options, "--device", "cpu")
    assert code == 2
    assert told in err
