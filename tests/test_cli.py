"""The command line: when something is wrong, users see one sentence and the exit code that design.md promises."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from PIL import Image

from qformer import cli

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).parent.parent


def config(**changes: Any) -> str:
    """A configuration in the working folder; its data exist, its towers do not."""
    Image.new("RGB", (8, 8)).save("0.jpg")
    Path("a.jsonl").write_text(json.dumps({"image": "1.jpg", "caption": "a dog"}) + "\n")
    values = {
        "stage": "stage1",
        "run": "run",
        "vision": {"name": "hf", "path": "no/vit"},
        "text": {"bert": "no/bert"},
        "data": {"train": {"name": "jsonl", "path": "a.jsonl"}},
        "train": {"steps": 10, "warmup": 1},
    }
    Path("c.yaml").write_text(yaml.safe_dump(values | changes))
    return "c.yaml"


def one_sentence(error: str) -> str:
    assert error.startswith("qformer: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert "Traceback" not in error
    assert "Error:" not in error
    return error


IMPORTED = """
import sys
sys.argv = ["qformer", *sys.argv[1:]]
from qformer import cli
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "numpy", "accelerate", "yaml", "PIL", "qformer.stages"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "train" in ended.stdout


def test_a_configuration_is_checked_without_torch() -> None:
    """Options of an encoder, of a resolution and of data, two of whose sources are mixed; a second, not ten."""
    mixed = "data.train={name: mix, sources: [{name: jsonl, path: a.jsonl}, {name: webdataset, path: b.tar}]}"
    program = IMPORTED.replace('"numpy", "accelerate", "yaml", "PIL", "qformer.stages"', '"accelerate", "PIL"')
    ended = subprocess.run(
        [sys.executable, "-c", program, "config", "configs/stage1_small.yaml", mixed],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "path: b.tar" in ended.stdout


def test_python_m_qformer() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "qformer", "config", "none.yaml"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 2
    assert "no configuration at 'none.yaml'" in one_sentence(ended.stderr)
    assert ended.stdout == ""


def test_config_is_printed_whole(run: Run) -> None:
    code, out, err = run("config", config(), "train.lr=1e-4", "data.batch=3")
    assert (code, err) == (0, "")
    shown = yaml.safe_load(out)
    assert (shown["train"]["lr"], shown["data"]["batch"]) == (1e-4, 3)
    assert shown["qformer"]["queries"] == 32
    assert "# text.bert 'no/bert' is not downloaded yet: the Q-Former will take its sizes\n" in out


def test_a_shipped_configuration_is_found_by_its_name(run: Run) -> None:
    """From an empty folder, as a file is; a file at the path comes first, also where a shipped one has its name."""
    wanted = yaml.safe_load((ROOT / "configs/quickstart/stage1.yaml").read_text())["train"]["steps"]
    for name in ("quickstart/stage1.yaml", "configs/quickstart/stage1.yaml"):
        code, out, err = run("config", name)
        assert (code, err, yaml.safe_load(out)["train"]["steps"]) == (0, "", wanted)
    Path("quickstart").mkdir()
    Path(config()).rename("quickstart/stage1.yaml")
    code, out, _ = run("config", "quickstart/stage1.yaml")
    assert (code, yaml.safe_load(out)["train"]["steps"]) == (0, 10)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("quickstart/stge1.yaml", "did you mean 'quickstart/stage1.yaml' or 'quickstart/stage2.yaml'?"),
        ("stage1", "did you mean 'quickstart/stage1.yaml' or 'real/stage1.yaml'?"),
        ("configs/quickstart/../../pyproject.toml", "such as quickstart/stage1.yaml"),
        ("zzz.yaml", "such as quickstart/stage1.yaml"),
    ],
)
def test_near_names_of_an_unknown_configuration_are_listed(run: Run, name: str, near: str) -> None:
    for command in ("config", "train"):
        code, out, err = run(command, name)
        assert (code, out) == (2, "")
        assert near in one_sentence(err)


def test_config_shows_the_data(run: Run) -> None:
    path = config()
    Image.new("RGB", (8, 6)).save("1.jpg")
    records: list[Any] = [{"image": "1.jpg", "caption": f"A\tdog, {n}!"} for n in range(5)]
    records += [{"image": "1.jpg"}, {"image": "none.jpg", "caption": "a"}]
    Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    mix = "{name: mix, sources: [{name: jsonl, path: a.jsonl, prompt: a photo of}, {name: scenes, count: 2, size: 32}]}"
    code, out, err = run("config", path, f"data.train={mix}", "data.validation={name: jsonl, path: a.jsonl}", "--data")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["data"]["train"]["name"] == "mix"
    lines = [line for line in out.splitlines() if line.startswith("# data.")]
    used = "7 of the first 9 samples can be used; not: 1 no caption, 1 missing"
    assert lines[:2] == [f"# data.train: {used}", "# data.train: 8 x 6: a photo of a dog, 0"]
    assert lines[2].startswith("# data.train: 32 x 32: ")
    assert lines[4].startswith("# data.validation: 5 of the first 7 samples can be used")
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("{name: jsonl, path: none.jsonl}", "no file at 'none.jsonl'"),
        ("{name: webdataset, path: 'none/{000..331}.tar'}", "no shard at 'none/{000..331}.tar'"),
        ("{name: datasets, path: nobody/nothing}", "the hub cannot be reached"),
        ("{name: coco, path: a.jsonl, images: .}", "does not have the form that data.name requires"),
        (
            "{name: coco, path: a.jsonl, image: .}",
            "data.train.image is not an option of 'coco': did you",
        ),
        (
            "{name: mix, sources: [{name: scenes, wieght: 2}]}",
            "data.train.sources.0.wieght is not an option",
        ),
        ("{name: mix, sources: [{name: jsonl, path: none.jsonl}]}", "no file at 'none.jsonl'"),
    ],
)
@pytest.mark.parametrize("command", [["config", "--data"], ["train"]], ids=" ".join)
def test_data_that_cannot_be_used(run: Run, command: list[str], train: str, expected: str) -> None:
    code, out, err = run(*command, config(), f"data.train={train}")
    assert (code, out) == (2, "")
    assert expected in one_sentence(err)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stps=3", "unknown configuration key 'train.stps': did you mean 'steps'?"),
        ("train.steps=many", "train.steps: "),
        ("train.warmup=10", "train.warmup 10 is not below train.steps 10"),
        ("qformer.heads=7", "does not divide into 7 heads"),
        ("stage=stage2", "add llm.path"),
        ("train.steps", "write key=value"),
    ],
)
@pytest.mark.parametrize("command", ["config", "train"])
def test_configurations_that_are_refused(run: Run, command: str, override: str, expected: str) -> None:
    code, out, err = run(command, config(), override)
    assert (code, out) == (2, "")
    assert expected in one_sentence(err)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"train": {"name": "jsonl", "path": "none.jsonl"}}}, "no file at 'none.jsonl'"),
        ({"data": {"train": {"name": "folder", "path": "empty"}}}, "no image below 'empty'"),
        ({"data": {"train": {"name": "jsnl", "path": "a.jsonl"}}}, "did you mean 'jsonl'?"),
        ({"data": {"train": {"name": "jsonl", "path": "a.jsonl", "pth": 1}}}, "did you mean 'path'?"),
        ({"resolution": {"name": "fixd"}}, "did you mean 'fixed'?"),
        ({"resolution": {"name": "fixed", "size": 0}}, "resolution.size is 0"),
        ({"vision": {"name": "hfx"}}, "unknown vision"),
        ({}, "no/vit"),
        ({"stage": "stage2", "llm": {"path": "no/llm"}}, "no/llm"),
        ({"stage": "stage2", "llm": {"path": "empty"}}, "/empty'"),
        ({"stage": "stage2", "llm": {"path": "empty"}, "init": "no/stage1"}, "no checkpoint at 'no/stage1'"),
        ({"stage": "vision", "backbone": {"kind": "vit", "text": "no/bert"}}, "no/bert"),
    ],
)
def test_training_that_cannot_start(run: Run, changes: dict[str, Any], expected: str) -> None:
    Path("empty").mkdir()
    code, out, err = run("train", config(**changes))
    assert (code, out) == (2, "")
    assert expected in one_sentence(err)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["eval", "none", "--bench", "retrievl", "--data", "path=a.jsonl"],
            "did you mean 'retrieval'?",
        ),
        (["eval", "none", "--bench", "retrieval", "--data", "path"], "write key=value"),
        (["eval", "none", "--bench", "retrieval", "--data", "path=none.jsonl"], "no file at 'none.jsonl'"),
        (["eval", "none", "--bench", "retrieval", "--data", "path=a.jsonl"], "no checkpoint at 'none'"),
        (
            ["eval", "none", "--bench", "vqa", "--data", "path=https://example.org/a.jsonl"],
            "'https://example.org/a.jsonl' is an address, and addresses are not fetched: save it first and give the",
        ),
        (
            ["eval", "none", "--bench", "vqa", "--data", "name=vqa", "--data", "path=.", "--data", "images=."],
            "'.' is a folder; data.path must",
        ),
        (["config", "https://example.org/a.yaml"], "'https://example.org/a.yaml' is an address, and addresses are not"),
        (["search", "none", "https://example.org/g", "a dog"], "'https://example.org/g' is an address, and addresses"),
        (["caption", "https://example.org/run", "0.jpg"], "'https://example.org/run' is an address, and addresses are"),
        (["caption", "none", "0.jpg"], "no checkpoint at 'none'"),
        (["caption", "none", "0.jpg", "--top-p", "0.5"], "--top-p is for texts that are drawn; add --sample"),
        (["caption", "none", "0.jpg", "--captions", "3"], "--captions is for texts that are drawn; add --sample"),
        (["caption", "none", "0.jpg", "--sample", "--top-p", "2"], "top_p must be above 0 and at most 1, but got 2.0"),
        (["caption", "none", "0.jpg", "--min-new-tokens", "31"], "min_new_tokens must be between 0 and max_new_tokens"),
        (["ask", "none", "0.jpg", "what is it?"], "no checkpoint at 'none'"),
        (["ask", "none", "a.jsonl", "what is it?"], "'a.jsonl' cannot be read as an image (undecodable"),
        (["ask", "none", "none.jpg", "what is it?"], "'none.jpg' cannot be read as an image (missing"),
        (["ask", "none", "a.jsonl", " (.) "], "the question is empty"),
        (["ask", "none", "0.jpg", "-q", "."], "the question is empty"),
        (["ask", "none", "0.jpg"], "there is no question; write it in quotes"),
        (["ask", "none", "0.jpg", "none.png"], "there is no question; write it in quotes"),
        (["ask", "none", "0.jpg", "-"], "standard input holds no question"),
        (["ask", "none", "0.jpg", "why?", "--task", "vqaa"], "unknown task 'vqaa': did you mean 'vqa'?"),
        (["ask", "none", "0.jpg", "why?", "--preset", "papr"], "unknown preset 'papr': did you mean 'paper'?"),
        (["config", "none.yaml"], "no configuration at 'none.yaml'"),
        (["train", "a.jsonl"], "unknown configuration key 'image'"),
    ],
)
def test_wrong_usage_of_the_other_commands(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    config()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert expected in one_sentence(err)


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["config", "--nope"], ["eval", "x", "--bench", "retrieval"], ["caption", "x"]]
)
def test_typers_own_errors_exit_with_two(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(run: Run) -> None:
    from qformer.types import UsageError

    with pytest.raises(UsageError, match="no configuration"):
        run("config", "none.yaml", "--debug")
    with pytest.raises(UsageError, match="no configuration"):
        run("--debug", "config", "none.yaml")


@pytest.mark.parametrize(
    ("raised", "code", "expected"),
    [
        (RuntimeError("it broke"), 1, "qformer: RuntimeError: it broke (--debug shows where)\n"),
        (RuntimeError("it \x1b[31m \u202e broke"), 1, "qformer: RuntimeError: it ?[31m ? broke"),
        (MemoryError(), 2, "qformer: this needs more memory than the machine has;"),
        (RuntimeError(f"[enforce fail] {cli.NO_ROOM}: 8 bytes"), 2, "qformer: this needs more memory than the machine"),
        (KeyboardInterrupt(), 130, "qformer: interrupted;"),
    ],
)
def test_what_is_not_the_users_fault(
    run: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, expected: str
) -> None:
    def fails(*_: Any) -> None:
        raise raised

    monkeypatch.setattr("qformer.config.load_config", fails)
    ended, _, err = run("config", "x.yaml")
    assert ended == code
    assert expected in err
    assert "Traceback" not in err


FAILS = """
import atexit, os, sys
os.environ["WORLD_SIZE"], sys.argv = sys.argv[1], ["qformer", "config", "c.yaml"]
atexit.register(print, "taken down")  # stands for all that Python and libraries do behind the exit functions
from qformer import cli, config
from qformer.types import UsageError
def fails(*_):
    atexit.register(print, "tidied up")
    raise UsageError("no such thing")
config.load_config = fails
cli.main()
"""


@pytest.mark.parametrize(("world", "printed"), [("2", ["tidied up"]), ("1", ["tidied up", "taken down"])])
def test_one_of_several_processes_that_failed_is_not_taken_down(world: str, printed: list[str]) -> None:
    """Where a peer has died gloo's threads abort then, with a signal in place of the exit code."""
    command = [sys.executable, "-c", FAILS, world]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout.split("\n")[:-1]) == (2, printed)
    assert one_sentence(ended.stderr) == "qformer: no such thing\n"
