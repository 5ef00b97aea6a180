"""What somebody else's checkpoint, gallery or store names is not run, unless it is trusted; what the user types is.

Whatever is tried here would leave a file, the witness, if it ran: an import writes it, and so does a command.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lancedb
import pytest
import yaml
from qdrant_client import QdrantClient

import qformer
from qformer import resolution, vision
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.checkpoints.weights import trained_tensors
from qformer.config import load_config, parse_config
from qformer.data import sources
from qformer.demo.backend import Decoding, load_models
from qformer.images import read_file
from qformer.model.assembly import build_image_text, build_vision_language
from qformer.retrieval import qdrant
from qformer.retrieval.gallery import Gallery
from qformer.retrieval.lance import SCHEMA, LanceStore
from qformer.retrieval.search import Retriever
from qformer.stages.inherit import inherit
from qformer.trust import Untrusted
from qformer.types import BadSample, UsageError
from tests.retrieval.photos import gallery, index, model_of_tiles, picture
from tests.test_architecture import PRODUCT, name
from tests.test_cli import one_sentence
from tests.workspace import config, make_workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Run = Callable[..., tuple[int, str, str]]

#: What a stranger's module does when it is imported, and behind that what would really work.
EVIL = """
open({witness!r}, "a").write("imported ")
from qformer.vision.options import HFVisionConfig as Tower
from qformer.resolution.fixed import Fixed
from qformer.data.folders import Folder
"""


class Made(NamedTuple):
    """Folder of the data and towers, and checkpoints of both stages in it."""

    root: Path
    one: Path
    two: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = make_workspace(tmp_path_factory.mktemp("workspace"))
    first, sized = build_image_text(config(root, "stage1"))
    one = checkpoint.save(root / "one", 1, sized, trained_tensors(first), {}, extra=first.tokenizer.save_pretrained)
    bridge = inherit(config(root, "stage2", init=str(root / "one")), sized)
    second, sized = build_vision_language(bridge)
    return Made(root, one, checkpoint.save(root / "two", 1, sized, trained_tensors(second), {}))


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that is there once something ran; `evil` can be imported."""
    file, modules = tmp_path / "witness", tmp_path / "modules"
    modules.mkdir()
    (modules / "evil.py").write_text(EVIL.format(witness=str(file)))
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    yield file
    sys.modules.pop("evil", None)


def changed(folder: Path, to: Path, **sections: Any) -> Path:
    """A copy of a checkpoint with other sections in its configuration; of those that are dicts some keys."""
    shutil.copytree(folder, to)
    about = yaml.safe_load((to / checkpoint.CONFIG).read_text())
    for key, value in sections.items():
        about[key] = about[key] | value if isinstance(value, dict) else value
    (to / checkpoint.CONFIG).write_text(yaml.safe_dump(about))
    return to


SECTIONS = {"vision": {"name": "evil:Tower"}, "resolution": {"name": "evil:Fixed"}}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_checkpoint_runs_no_code(section: str, made: Made, witness: Path, tmp_path: Path) -> None:
    """In Python, of both stages; nor where it is trusted the first time and opened again without."""
    for stage, folder in (("one", made.one), ("two", made.two)):
        given = changed(folder, tmp_path / stage, **{section: SECTIONS[section]})
        with pytest.raises(Untrusted) as caught:
            qformer.load(given, "cpu")
        told = SECTIONS[section]["name"]
        assert f"checkpoint '{given}' names '{told}', which would be imported and run" in str(caught.value)
        assert not witness.exists()
    model = qformer.load(given, "cpu", trust=True)
    assert witness.read_text() == "imported "
    assert type(model.frontend.strategy).__name__ == "Fixed"
    with pytest.raises(Untrusted):
        qformer.load(given, "cpu")


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("one", "index {evil} {root}/images -o g"),
        ("one", "search {evil} {gallery} cat"),
        ("one", "eval {evil} --bench retrieval --data path={root}/captions.jsonl"),
        ("one", "capfilt {root}/captions.jsonl --captioner {evil} --ranker {one} -o o"),
        ("one", "capfilt {root}/captions.jsonl --captioner {one} --ranker {evil} -o o"),
        ("one", "train c.yaml init={evil}"),
        ("one", "features c.yaml init={evil} data.features=tokens"),
        ("one", "plan c.yaml init={evil} --gpu cpu"),
        ("two", "train c.yaml init={evil}"),
        ("two", "caption {evil} {root}/images"),
        ("two", "ask {evil} {root}/images/0.png what"),
        ("two", "eval {evil} --bench vqa --data path={root}/asked.jsonl"),
        ("two", "demo {evil}"),
        ("one", "demo {two} --stage1 {evil}"),
    ],
)
def test_no_command_runs_the_code_of_a_checkpoint(
    stage: str, command: str, made: Made, witness: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qformer.demo.server.check_bind", lambda *_: None)  # no test opens a socket
    evil = changed(getattr(made, stage), tmp_path / "evil", vision=SECTIONS["vision"])
    record = {"image": "images/0.png", "question": "what?", "answers": ["cat"]}
    (made.root / "asked.jsonl").write_text(json.dumps(record))
    Path("c.yaml").write_text(yaml.safe_dump(_plain(config(made.root, "stage2"))))
    model = model_of_tiles()
    opened = gallery(tmp_path / "gallery", model)
    index(opened, model, path=made.root / "images")
    words = command.format(evil=evil, gallery=opened.folder, root=made.root, one=made.one, two=made.two).split()
    code, _, error = run(*words)
    assert not witness.exists()
    assert "names 'evil:Tower', which would be imported and run; pass --trust" in one_sentence(error)
    assert code == 2
    if words[0] in ("index", "eval", "features") and stage == "one":
        code, _, error = run(*words, "--trust")
        assert code == 0, error
        assert witness.exists()


def _plain(checked: Any) -> dict[str, Any]:
    """What was set of a configuration; only then stage two has its bridge from `init`."""
    return checked.model_dump(mode="json", exclude_unset=True, exclude={"init"})


def test_every_command_that_opens_what_others_made_has_the_flag(run: Run) -> None:
    for command in [
        "train",
        "features",
        "plan",
        "eval",
        "index",
        "search",
        "caption",
        "ask",
        "probe",
        "capfilt",
        "convert",
        "push",
        "demo",
    ]:
        assert "--trust" in run(command, "--help")[1], command


def test_only_what_is_built_is_judged(made: Made, witness: Path, tmp_path: Path) -> None:
    """A checkpoint whose data were a command loads, and converts; its data are refused to whoever opens them."""
    data = {"train": {"name": "webdataset", "path": f"pipe:touch {witness}"}, "validation": {"name": "evil:Folder"}}
    given = changed(made.one, tmp_path / "given", data=data)
    qformer.load(given, "cpu")
    found = checkpoint.read(given).config.data
    for choice in (found.train, found.validation):
        assert choice is not None
        with pytest.raises(Untrusted):
            sources.for_run(choice, str(tmp_path))
    evil = changed(made.one, tmp_path / "evil", **SECTIONS)
    convert_checkpoint(str(evil), tmp_path / "converted", "qformer", LoadOptions())  # which builds no encoder
    with pytest.raises(Untrusted):
        qformer.load(tmp_path / "converted", "cpu")
    with pytest.raises(UsageError, match="sees with EVA"):
        convert_checkpoint(str(evil), tmp_path / "theirs", "transformers", LoadOptions())
    assert not witness.exists()


@pytest.mark.parametrize(
    "sections",
    [
        {"vision": {"name": "hf", "path": "mini:evil:Tower"}},
        {"vision": {"name": "evil:Tower", "_origin": ""}},
        {"vision": {"name": "hf", "path": "https://evil.example/vit"}},
        {"llm": {"path": "mini:evil:Tower"}},
        {"llm": {"path": "s3://evil/llm"}},
    ],
)
def test_other_names_of_a_checkpoint_run_nothing(
    sections: dict[str, Any], made: Made, witness: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        qformer.load(changed(made.two, tmp_path / "given", **sections), "cpu")
    assert not witness.exists()


def test_stage_two_inherits_no_code(made: Made, witness: Path, tmp_path: Path) -> None:
    """The encoder and the resolution of `init` are somebody else's, unless the configuration names the same."""
    evil = changed(made.one, tmp_path / "evil", **SECTIONS)
    plain = config(made.root, "stage2", init=str(evil))
    start = checkpoint.read_config(evil)
    values = {key: value for key, value in _plain(plain).items() if key != "resolution"}
    with pytest.raises(Untrusted):
        vision.options_of(inherit(plain, start).vision)
    with pytest.raises(Untrusted):
        resolution.chosen(inherit(parse_config(values), start).resolution)
    with pytest.raises(UsageError, match="the section 'vision' differs"):
        inherit(config(made.root, "stage2", vision={"name": "eva"}), start)
    assert not witness.exists()
    typed = inherit(config(made.root, "stage2", vision={"name": "evil:Tower", "path": str(made.root / "vit")}), start)
    assert vision.options_of(typed.vision).path == str(made.root / "vit")
    assert witness.exists()


def test_a_page_runs_nothing_of_the_run_that_its_checkpoint_started_from(
    made: Made, witness: Path, tmp_path: Path
) -> None:
    evil = changed(made.one, tmp_path / "evil", vision=SECTIONS["vision"])
    given = changed(made.two, tmp_path / "given", init=str(evil))
    with pytest.raises(Untrusted):
        load_models(str(given), device="cpu")
    assert not witness.exists()
    assert load_models(str(given), device="cpu", trust=True).matching is not None


def test_a_visitor_of_the_page_imports_nothing(witness: Path) -> None:
    with pytest.raises(UsageError, match="unknown option of decoding 'evil:Tower'"):
        Decoding.of({"evil:Tower": 1})
    assert not witness.exists()


#: Sources that a gallery may name, WITNESS in the place of the file, and what of them would have been run or called.
DOORS: dict[str, tuple[dict[str, Any], str]] = {
    "pipe": ({"name": "webdataset", "path": "pipe:touch WITNESS"}, "pipe:touch WITNESS"),
    "pipe in a list": ({"name": "webdataset", "path": ["a.tar", "pipe:touch WITNESS"]}, "pipe:touch WITNESS"),
    "pipe as a file": ({"name": "webdataset", "path": "file://pipe:touch WITNESS"}, "pipe:touch WITNESS"),
    "pipe in braces": ({"name": "webdataset", "path": "{pipe:touch WITNESS,a.tar}"}, "pipe:touch WITNESS"),
    "pipe from braces": ({"name": "webdataset", "path": "{p,q}ipe:touch WITNESS"}, "pipe:touch WITNESS"),
    "pipe of a prompt": ({"name": "webdataset", "path": "pipe:touch WITNESS", "prompt": "a"}, "pipe:touch WITNESS"),
    "https": ({"name": "webdataset", "path": "https://evil.example/a.tar"}, "https://evil.example/a.tar"),
    "s3, listed": ({"name": "webdataset", "path": "s3://evil/*.tar"}, "s3://evil/*.tar"),
    "class": ({"name": "evil:Folder", "path": "."}, "evil:Folder"),
    "mix": ({"name": "mix", "sources": [{"name": "evil:Folder", "path": "."}]}, "evil:Folder"),
    "mix of mixes": (
        {
            "name": "mix",
            "sources": [
                {"name": "scenes", "split": "test"},
                {"name": "mix", "sources": [{"name": "webdataset", "path": "pipe:touch WITNESS"}]},
            ],
        },
        "pipe:touch WITNESS",
    ),
    "parquet": ({"name": "datasets", "path": "https://evil.example/a.parquet"}, "https://evil.example/a.parquet"),
    "data set": ({"name": "datasets", "path": "s3://evil/set"}, "s3://evil/set"),
    "lines, listed": ({"name": "jsonl", "path": "s3://evil/*.jsonl"}, "s3://evil/*.jsonl"),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_gallery_runs_and_calls_nothing(door: str, witness: Path, tmp_path: Path) -> None:
    text = json.dumps(DOORS[door]).replace("WITNESS", str(witness))
    choice, told = json.loads(text)
    made = gallery(tmp_path / "g", model_of_tiles())
    made.about["sources"] = [choice]
    made.save()
    with pytest.raises(Untrusted) as caught:
        Gallery.open(tmp_path / "g").source(0)
    assert f"the gallery '{tmp_path / 'g'}' names '{told}', which would be " in str(caught.value)
    assert not witness.exists()


@pytest.fixture
def tarred(tmp_path: Path, witness: Path) -> tuple[Path, Any]:
    """A gallery over a tar of two pictures, which `evil` now says are what a command writes; and its model."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            (tmp_path / f"{number}.png").write_bytes(picture(number))
            tar.add(tmp_path / f"{number}.png", f"{number}.png")
    model = model_of_tiles()
    opened = gallery(tmp_path / "g", model)
    index(opened, model, name="webdataset", path=tmp_path / "a.tar")
    return opened.folder, model


def say(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / "gallery.json").read_text())
    (folder / "gallery.json").write_text(json.dumps(about | changes))


def test_a_search_runs_nothing_and_says_so(tarred: tuple[Path, Any], witness: Path, tmp_path: Path) -> None:
    """Tars that stand anywhere are opened. Where no picture is needed, nothing is refused; with trust all works."""
    folder, model = tarred
    retriever = Retriever(folder, model)
    assert len(retriever.text_to_image("a cat")) == 2
    assert not retriever.unread
    command = f"pipe:touch {witness}; cat {tmp_path / 'a.tar'}"
    say(folder, sources=[{"name": "webdataset", "path": command}])
    closed = Retriever(folder, model)
    assert len(closed.text_to_image("a cat", shortlist=0)) == 2
    for call in (
        lambda: closed.text_to_image("a cat"),
        lambda: closed.open_image(closed.image_to_image(picture(0))[0]),
    ):
        with pytest.raises(Untrusted, match="which would be run as a command; pass --trust"):
            call()
    assert not witness.exists()
    trusted = Retriever(folder, model, trust=True)
    hit = trusted.text_to_image("a cat")[0]
    with pytest.raises(qformer.types.BadSample):  # its key is that of another tar by now, but the command did run
        trusted.open_image(hit)
    assert witness.exists()


def test_a_gallery_of_ones_own_in_this_process_is_typed(witness: Path, tmp_path: Path) -> None:
    model = model_of_tiles()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(picture(0))
    opened = gallery(tmp_path / "g", model)
    index(opened, model, name="evil:Folder", path=tmp_path / "photos")
    assert opened.source(0)[0].image == tmp_path / "photos" / "0.png"
    with pytest.raises(Untrusted):
        Gallery.open(tmp_path / "g").source(0)


@pytest.mark.parametrize("sources_", [[], {}, [3], [{"path": "x"}], None])
def test_a_gallery_with_no_such_source_is_a_missing_picture(sources_: Any, tarred: tuple[Path, Any]) -> None:
    folder, model = tarred
    say(folder, sources=sources_)
    retriever = Retriever(folder, model)
    retriever.text_to_image("a cat")
    assert len(retriever.unread) == 2


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
def test_no_server_is_asked_that_a_gallery_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    client = QdrantClient(":memory:")
    monkeypatch.setattr(qdrant, "connect", lambda url: asked.append(url) or client)
    url = "qdrant://evil.example:6333"
    Gallery.create(tmp_path, url, fingerprint="x", checkpoint="y", queries=4, width=8)
    assert asked.pop() == url
    for typed in (None, "lance", "qdrant://localhost:6333"):
        with pytest.raises(Untrusted, match=f"names '{url}', which would be called over the network"):
            Gallery.open(tmp_path, store=typed)
    assert not asked
    Gallery.open(tmp_path, store=url)
    Gallery.open(tmp_path, trust=True)
    assert asked == [url, url]


def test_a_store_with_embedding_functions_is_refused(tmp_path: Path) -> None:
    """LanceDB would make them, models of anybody, with `trust_remote_code` if they say so, when entries are added."""
    function = {"name": "huggingface", "model": {"name": "evil", "trust_remote_code": True}}
    about = [function | {"source_column": "path", "vector_column": "embeds"}]
    schema = SCHEMA.with_metadata({"embedding_functions": json.dumps(about)})
    lancedb.connect(tmp_path / "lance").create_table("images", schema=schema)
    with pytest.raises(UsageError, match="names embedding functions"):
        LanceStore(tmp_path, 4, 8)


def test_a_store_whose_data_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    """As those of a shallow clone, which LanceDB would fetch from wherever it says."""
    lancedb.connect(tmp_path / "lance").create_table("images", schema=SCHEMA)
    LanceStore(tmp_path, 4, 8)
    place = b"s3://bucket/other"
    base = b"\x08\x01" + b"\x22" + bytes([len(place)]) + place  # its number, its path
    message = b"\x08\x05" + b"\x92\x01" + bytes([len(base)]) + base
    data = len(message).to_bytes(4, "little") + message + (0).to_bytes(8, "little") + b"\0\0\0\0LANC"
    (tmp_path / "lance" / "images.lance" / "_versions" / "9.manifest").write_bytes(data)
    with pytest.raises(UsageError, match="has data at 's3://bucket/other'"):
        LanceStore(tmp_path, 4, 8)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"name": "datasets", "path": "simplecache::http://host/x.parquet"}, "simplecache::http://host/x.parquet"),
        ({"name": "datasets", "path": "set"}, "../secret.csv"),
        ({"name": "datasets", "path": "cards"}, "zip://a::http://host/x.zip"),
        ({"name": "jsonl", "path": "a.jsonl", "cache": "elsewhere"}, "elsewhere"),
    ],
)
def test_a_gallery_reads_and_writes_nothing_elsewhere(
    choice: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, named in (("set", "../secret.csv"), ("cards", "zip://a::http://host/x.zip")):
        Path(folder).mkdir()
        card = {"configs": [{"config_name": "default", "data_files": named}]}
        Path(folder, "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    opened = gallery(tmp_path / "g", model_of_tiles())
    opened.about["sources"] = [choice]
    opened.save()
    with pytest.raises(Untrusted) as caught:
        Gallery.open(tmp_path / "g").source(0)
    assert f"names '{told}', which would be" in str(caught.value)
    assert not Path("elsewhere").exists()


def test_a_reader_of_the_library_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pandas` would unpickle what lies in the working folder, and `csv` read it."""
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text("image,caption\n")
    for reader in ("pandas", "csv"):
        with pytest.raises(UsageError, match=f"'{reader}' does not say whose data set it is"):
            sources.build("datasets", path=reader)


@pytest.mark.parametrize("about", [{"queries": "x"}, {"width": 0}, {"width": 1e30}, {"queries": None}])
def test_a_gallery_of_odd_sizes_is_damaged(about: dict[str, Any], tmp_path: Path) -> None:
    opened = gallery(tmp_path / "g", model_of_tiles())
    say(opened.folder, **about)
    with pytest.raises(UsageError, match=f"is damaged \\({next(iter(about))} is "):
        Gallery.open(tmp_path / "g")


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for path in (Path("/dev/zero"), tmp_path / "pipe.tar"):
        with pytest.raises(BadSample, match="not a file"):
            read_file(path)
    with pytest.raises(UsageError, match=r"more than 1,000,000 shards"):
        sources.build("webdataset", path=str(tmp_path / "{0..30000000}.tar"))
    with pytest.raises(UsageError, match=r"more than 1,000,000 shards"):
        sources.build("webdataset", path="{a,b}" * 24 + ".tar")


def test_a_configuration_does_not_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="holds more than 100,000 values once its aliases are written out"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("seed: 2024-99-99")
    with pytest.raises(UsageError, match="is not YAML"):
        load_config(tmp_path / "c.yaml")


def test_what_is_typed_runs(made: Made, witness: Path, tmp_path: Path, run: Run) -> None:
    """A class and a command in a configuration, in an override, and in the arguments of a command."""
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / "photos" / f"{number}.png").write_bytes(picture(number))
        (tmp_path / "photos" / f"{number}.txt").write_text("a cat")
    values = _plain(config(made.root, "stage1", vision={"name": "evil:Tower"}))
    values["data"] = {"train": {"name": "evil:Folder", "path": "photos"}}
    Path("c.yaml").write_text(yaml.safe_dump(values))
    code, out, error = run("config", "c.yaml", "resolution.name=evil:Fixed", "--data")
    assert code == 0, error
    assert "4 of the first 4 samples can be used" in out
    assert witness.read_text() == "imported "
    code, out, error = run("index", str(made.one), "name=evil:Folder", "path=photos", "-o", "g")
    assert code == 0, error
    command = f"pipe:touch {tmp_path / 'fetched'}; tar -c -C {tmp_path / 'photos'} ."
    code, out, error = run("index", str(made.one), command, "-o", "g2")
    assert code == 0, error
    assert (tmp_path / "fetched").exists()


def test_a_file_that_is_named_like_a_command_is_a_file(witness: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.png").write_bytes(picture(0))
    with tarfile.open("pipe:touch witness #.tar", "w") as tar:
        tar.add("0.png")
    assert len(sources.build("webdataset", path="*.tar")) == 1  # type: ignore[arg-type]
    assert not witness.exists()


def test_nothing_unpickles_or_evaluates() -> None:
    """Read from the syntax trees: where a stranger's file is read, it is read as data."""
    wrong, shells = [], set()
    for file in PRODUCT:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                wrong += [(name(file), node.lineno) for one in names if one in ("pickle", "marshal", "shelve", "dill")]
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            bad = called in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen")
            bad |= called == "torch.load" and given.get("weights_only") != "True"
            bad |= called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False"
            bad |= given.get("trust_remote_code", "False") != "False"
            wrong += [(name(file), node.lineno)] if bad else []
            shells |= {name(file)} if "shell" in given else set()
    assert not wrong
    assert shells == {"qformer/data/fetching.py"}
