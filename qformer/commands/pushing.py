"""`qformer push`: a checkpoint as a repository of the Hugging Face hub, with a card, in our form or transformers'.

    README.md                                  the card (`qformer/commands/card.py`)
    config.yaml, model.safetensors, meta.json  of our form, as in a checkpoint: what was trained, and how it was
    llm/, vision/                              of our form: towers that were folders of this machine
    config.json, model.safetensors, ...        of the form of transformers: everything, towers included

`qformer.load("user/name")` loads either.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.commands.card import card
from qformer.config import dump_config
from qformer.files import pretrained
from qformer.files.records import replacing
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.schema import Config

Form = Literal["qformer", "transformers"]


def push(
    source: str,
    repo: str,
    form: Form,
    *,
    private: bool = False,
    dry_run: bool = False,
    to: Path | None = None,
    trust: bool = False,
) -> str:
    """Write a checkpoint as a repository and upload it; returns where it is.

    Args:
        source: a run or checkpoint of ours, or whatever `qformer convert` takes.
        repo: `user/name`.
        to: a new folder that keeps what is uploaded. Needed for a dry run, which uploads nothing.
        trust: run the code that the checkpoint names, where the form needs its towers.

    Raises:
        UsageError: no checkpoint there, one that the form has no place for, a folder that exists, or no access.
    """
    _check(repo, dry_run, to)
    if not checkpoint.is_foreign(source):
        checkpoint.find(source)
    if not dry_run:
        _try("reached", repo, lambda api: api.whoami())  # before what may take long
    with TemporaryDirectory() as scratch:
        folder = to or Path(scratch) / "repository"
        write(source, repo, form, folder, trust)
        if dry_run:
            return str(folder)
        _try("created", repo, lambda api: api.create_repo(repo, private=private, exist_ok=True))
        said = f"{checkpoint_stage(folder, form)} in the form of {form}"
        _try("uploaded to", repo, lambda api: api.upload_folder(repo_id=repo, folder_path=folder, commit_message=said))
    return f"https://huggingface.co/{repo}"


def _check(repo: str, dry_run: bool, to: Path | None) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise UsageError(f"'{repo}' is no name of a repository ({error}); give user/name") from error
    if repo.count("/") != 1:
        raise UsageError(f"'{repo}' does not say whose repository it is; give user/name")
    if dry_run and to is None:
        raise UsageError("a dry run leaves a folder to look at; say where with -o")
    if to is not None and to.exists():
        raise UsageError(f"'{to}' exists; give another path with -o, or remove it")


def _try(what: str, repo: str, call: Any) -> None:
    try:
        call(HfApi())
    except Exception as error:  # the client raises those of the HTTP library that it happens to use, too
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"the repository '{repo}' cannot be {what} ({reason}); log in with `hf auth login` as one who may write "
            "there, or look at the folder with --dry-run -o DIR"
        ) from error


def checkpoint_stage(folder: Path, form: Form) -> str:
    """`stage1` or `stage2`, of what was written."""
    if form == "qformer":
        return checkpoint.read_config(folder).stage
    kinds = json.loads((folder / checkpoint.HUGGING_FACE).read_text(encoding="utf-8"))["architectures"]
    return "stage1" if "Blip2ForImageTextRetrieval" in kinds else "stage2"


def write(source: str, repo: str, form: Form, folder: Path, trust: bool = False) -> None:
    """The folder of the repository, complete or not at all.

    Raises:
        UsageError: see `push`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = None if checkpoint.is_foreign(source) else checkpoint.find(source)
    run = None if own is None or own.parent.name != checkpoint.FOLDER else own.parent.parent
    with replacing(folder) as partial:
        if form == "qformer" and own is not None:
            _copy(own, repo, partial)
        else:
            convert_checkpoint(source, partial, form, LoadOptions(), trust)
        described = None if own is None else checkpoint.read_config(own)
        meta = {} if own is None else checkpoint.read_meta(own)
        text = card(repo, form, checkpoint_stage(partial, form), described, meta, run)
        (partial / "README.md").write_text(text, encoding="utf-8")
        if run is not None and (run / "curves.png").is_file() and not (run / "curves.png").is_symlink():
            shutil.copy2(run / "curves.png", partial / "curves.png")


def _copy(own: Path, repo: str, folder: Path) -> None:
    """A checkpoint without what only resuming needs and paths of this machine, with towers that are only here."""
    checkpoint.check_files(own)
    shutil.copytree(own, folder, ignore=lambda place, names: [n for n in names if _stays(own, Path(place) / n)])
    config = _with_towers_inside(checkpoint.read_config(own), own, folder)
    data = {key: _bare(value) for key, value in config.data.model_dump(exclude_unset=True).items()}
    config = config.model_copy(
        update={
            "run": repo.partition("/")[2],
            "init": _bare(config.init),
            "data": type(config.data).model_validate(data),
        }
    )
    (folder / checkpoint.CONFIG).write_text(dump_config(config), encoding="utf-8")
    checkpoint.write_meta(folder, _bare(checkpoint.read_meta(own)))


def _stays(own: Path, file: Path) -> bool:
    """Whether a file of a checkpoint is not uploaded: what only resuming needs, and links to what lies elsewhere."""
    return file.name == checkpoint.TRAINER or (file.is_symlink() and own.resolve() not in file.resolve().parents)


def _with_towers_inside(config: Config, own: Path, folder: Path) -> Config:
    """Towers that are files or folders of this machine are copied; those known by name stay names."""

    def inside(path: Any, name: str) -> Any:
        if not isinstance(path, str) or not Path(path).exists():
            return path
        place = Path(path)
        if not (place.suffix in checkpoint.FILES if place.is_file() else (place / checkpoint.HUGGING_FACE).is_file()):
            raise UsageError(
                f"the checkpoint names '{path}', which is no tower and is not uploaded; mend its {checkpoint.CONFIG}"
            )
        if own in place.parents:  # the checkpoint holds it itself
            return f"{checkpoint.INSIDE}{place.relative_to(own).as_posix()}"
        name += place.suffix if place.is_file() else ""
        if place.is_dir():
            (folder / name).mkdir()
            for file in sorted(
                {file for pattern in pretrained.NEEDED for file in place.glob(pattern) if file.is_file()}
            ):
                shutil.copy2(file, folder / name)
        else:
            shutil.copy2(place, folder / name)
        return f"{checkpoint.INSIDE}{name}"

    towers = ("path", "weights")
    options = {k: inside(value, "vision") if k in towers else value for k, value in config.vision.options.items()}
    update: dict[str, Any] = {"vision": config.vision.model_copy(update=options)}
    if config.llm is not None:
        update["llm"] = config.llm.model_copy(update={"path": inside(config.llm.path, "llm")})
    update["text"] = config.text.model_copy(update={"bert": _bare(config.text.bert)})  # its tokenizer is in the folder
    return config.model_copy(update=update)


def _bare(value: Any) -> Any:
    """Plain data whose absolute paths are cut to their last part."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
