"""`qformer push`: what is uploaded, to whom, and that it loads where the hub's cache has put it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, Blip2ForConditionalGeneration

import qformer
from qformer import stages
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.commands import pushing as hub
from qformer.types import UsageError
from tests.their_blip2 import make
from tests.workspace import config, make_workspace

REPO = "somebody/my-bridge"
Run = Callable[..., tuple[int, str, str]]


class FakeHub:
    """The hub at its border: what `HfApi` is asked, and the repository as the cache of another machine holds it."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self) -> FakeHub:
        return self

    def whoami(self) -> dict[str, Any]:
        return {"name": "somebody"}

    def create_repo(self, repo: str, **options: Any) -> None:
        self.asked.append(("create", {"repo": repo, **options}))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.asked.append(("upload", {"repo": repo_id, "message": commit_message}))
        place = self.cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder_path, place / "snapshots" / "abc123")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("abc123")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("space"))
    stages.train(config(root, "stage1"))
    stages.train(config(root, "stage2", train={"validate_every": 2}))
    (root / "runs" / "stage2" / "results.json").write_text(json.dumps({"vqa": {"opt": {"accuracy": 0.5}}, "by": "x"}))
    return root


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    found = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(hub, "HfApi", found)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(found.cache))
    return found


def photo() -> list[Image.Image]:
    return [Image.radial_gradient("L").convert("RGB").resize((40, 30))]


@torch.no_grad()
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_what_was_pushed_loads_without_this_machine(
    space: Path, fake: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    """Its towers were folders of this machine, which are gone."""
    here = tmp_path / "here"
    shutil.copytree(space, here)
    for file in here.rglob("*.yaml"):
        file.write_text(file.read_text().replace(str(space), str(here)))
    known: Any = qformer.load(here / "runs" / stage, device="cpu")
    code, out, err = run("push", str(here / "runs" / stage), REPO, "--private")
    assert (code, out) == (0, f"https://huggingface.co/{REPO}\n"), err
    assert [name for name, _ in fake.asked] == ["create", "upload"]
    assert fake.asked[0][1] == {"repo": REPO, "private": True, "exist_ok": True}
    shutil.rmtree(here)
    loaded: Any = qformer.load(REPO, device="cpu")
    both = zip(loaded.state_dict().values(), known.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    said = [(m.caption if stage == "stage1" else m.generate)(m.frontend.tiles(photo())) for m in (loaded, known)]
    assert said[0] == said[1]
    again = convert_checkpoint(REPO, tmp_path / "again", "qformer", LoadOptions())
    assert qformer.load(again, device="cpu")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_folder(space: Path, fake: FakeHub, run: Run, tmp_path: Path, stage: str) -> None:
    """A dry run asks nobody; no path of this machine and nothing of the optimizer is in it; the card is of the run."""
    folder = tmp_path / "look"
    code, out, err = run("push", str(space / "runs" / stage), REPO, "--dry-run", "-o", str(folder))
    assert (code, out) == (0, f"{folder}\n"), err
    assert fake.asked == []
    assert not (folder / checkpoint.TRAINER).exists()
    for file in ("README.md", "config.yaml", "meta.json"):
        assert str(space) not in (folder / file).read_text(), file
    assert "commit" in json.loads((folder / "meta.json").read_text())
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "qformer"
    assert "license" not in yaml.safe_load(front)
    assert f'qformer.load("{REPO}")' in text
    assert "| steps x samples | 4 x 4 per process |" in text
    losses = (space / "runs" / stage / "metrics.jsonl").read_text().splitlines()
    last = next(r for r in map(json.loads, reversed(losses)) if r["kind"] == "train")
    assert f"| train, step 4 | loss {last['loss']:.4f} |" in text
    assert "| validation, step 4 |" in text
    assert "![losses](curves.png)" in text
    assert (folder / "curves.png").is_file()
    assert "Not stated yet" in text
    assert ("| vqa.opt.accuracy | 0.5000 |" in text) == (stage == "stage2")
    assert ("| language model kept in | auto |" in text) == (stage == "stage2")
    compile(text.partition("```python\n")[2].partition("```")[0], "card", "exec")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_in_the_form_of_transformers(fake: FakeHub, tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "theirs")
    ours = convert_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours", "qformer", LoadOptions())
    assert hub.push(str(ours), REPO, "transformers").endswith(REPO)
    model = Blip2ForConditionalGeneration.from_pretrained(REPO).eval()
    given = AutoProcessor.from_pretrained(REPO)(images=photo(), text=["a photo of"], return_tensors="pt")
    assert model.generate(**given, max_new_tokens=3).shape[0] == 1
    loaded: Any = qformer.load(REPO, device="cpu")
    known: Any = qformer.load(ours, device="cpu")
    options = {"num_beams": 1, "max_new_tokens": 8}
    assert loaded.generate(loaded.frontend.tiles(photo()), "a", **options) == known.generate(
        known.frontend.tiles(photo()), "a", **options
    )
    (snapshot,) = (fake.cache / "models--somebody--my-bridge" / "snapshots").iterdir()
    text = (snapshot / "README.md").read_text()
    assert "library_name: transformers" in text
    compile(text.partition("```python\n")[2].partition("```")[0], "card", "exec")


def test_base_models_are_those_of_the_hub(tmp_path: Path) -> None:
    from qformer.commands.card import card
    from qformer.config import load_config

    chosen = load_config(Path("configs/stage2_opt2.7b.yaml"))
    front = card(REPO, "qformer", "stage2", chosen, {}, None).split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == ["facebook/opt-2.7b"]


def test_the_card_takes_no_file_for_a_base_model_and_any_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qformer.commands.card import card
    from qformer.config import load_config

    changes = ["vision={name: eva, weights: weights/eva.pth}", 'llm.prompt=the "photo"']
    chosen = load_config(Path("configs/stage2_opt2.7b.yaml"), changes)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "eva.pth").touch()
    _, front, text = card(REPO, "transformers", "stage2", chosen, {}, None).split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == ["facebook/opt-2.7b"]
    assert "image encoder: eva.pth" in text
    compile(text.partition("```python\n")[2].partition("```")[0], "card", "exec")


def test_nothing_but_towers_is_published(space: Path, fake: FakeHub, tmp_path: Path) -> None:
    """Whoever made a checkpoint may name a folder of secrets as a tower, or link to one."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "key").write_text("secret")
    newest = max((space / "runs" / "stage2" / "checkpoints").iterdir())
    shutil.copytree(newest, tmp_path / "one")
    (tmp_path / "one" / "linked").symlink_to(secrets)
    hub.push(str(tmp_path / "one"), REPO, "qformer", dry_run=True, to=tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_symlink() or file.name == "key"]
    told = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    told["llm"]["path"] = str(secrets)
    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(UsageError, match="which is not a tower and is not uploaded"):
        hub.push(str(tmp_path / "one"), REPO, "qformer", dry_run=True, to=tmp_path / "two")
    assert not list(tmp_path.glob("two*"))


def test_refusals(space: Path, fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(space / "runs" / "stage2")
    for repo, said in (
        ("my-bridge", "does not name the owner"),
        ("a/b/c", "is not the name"),
        ("x/--y", "is not the name"),
    ):
        with pytest.raises(UsageError, match=said):
            hub.push(source, repo, "qformer")
    with pytest.raises(UsageError, match="give one with -o"):
        hub.push(source, REPO, "qformer", dry_run=True)
    with pytest.raises(UsageError, match="exists"):
        hub.push(source, REPO, "qformer", dry_run=True, to=tmp_path)
    with pytest.raises(UsageError, match="no checkpoint at"):
        hub.push(str(tmp_path / "nothing" / "here" / "x"), REPO, "qformer", dry_run=True, to=tmp_path / "new")
    with pytest.raises(UsageError, match="sees with EVA, and this checkpoint with 'hf'"):
        hub.push(source, REPO, "transformers", dry_run=True, to=tmp_path / "new")
    assert not list(tmp_path.glob("new*"))

    with pytest.raises(UsageError, match="sees with EVA, and this checkpoint with 'hf'"):
        hub.push(source, REPO, "transformers")
    assert fake.asked == []  # no empty repository is left behind

    def refuse(*_args: Any, **_options: Any) -> None:
        raise ConnectionError("401 Client Error: Unauthorized")

    monkeypatch.setattr(fake, "create_repo", refuse)
    with pytest.raises(UsageError, match=r"cannot be created \(401 Client Error: Unauthorized\); log in with"):
        hub.push(source, REPO, "qformer")
    monkeypatch.setattr(fake, "whoami", refuse)
    with pytest.raises(UsageError, match="no checkpoint at"):
        hub.push(str(tmp_path / "nothing"), REPO, "qformer")
    with pytest.raises(UsageError, match=r"cannot be reached \(401 Client Error: Unauthorized\); log in with"):
        hub.push(source, REPO, "qformer")
    assert not fake.cache.exists()
