"""`qformer push`: a checkpoint as a repository of the Hugging Face hub with a card, in our or transformers' form.

    README.md                                  the card (`qformer/commands/card.py`)
    config.yaml, model.safetensors, meta.json  our form, as in a checkpoint: trained weights and their configuration
    llm/, vision/                              our form: towers that were local folders
    config.json, model.safetensors, ...        form of transformers: all weights, including the towers

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
from qformer.config import dump_config, map_towers
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
    """Write a checkpoint as a repository and upload it; returns its address.

    Args:
        source: a run or checkpoint of ours, or anything that `qformer convert` takes.
        repo: `user/name`.
        dry_run: write the folder `to` and upload nothing.
        to: new folder that keeps the uploaded files.
        trust: run the code that the checkpoint names, if the form needs its towers.

    Raises:
        UsageError: no checkpoint there, one that the form cannot represent, a folder that exists, or no access.
    """
    _check(repo, dry_run, to)
    if not checkpoint.is_foreign(source):
        checkpoint.find(source)
    if not dry_run:
        _try("reached", repo, lambda api: api.whoami())  # before anything slow
    with TemporaryDirectory() as scratch:
        folder = to or Path(scratch) / "repository"
        write(source, repo, form, folder, trust)
        if dry_run:
            return str(folder)
        _try("created", repo, lambda api: api.create_repo(repo, private=private, exist_ok=True))
        title = f"{checkpoint_stage(folder, form)} in the form of {form}"
        _try("uploaded to", repo, lambda api: api.upload_folder(repo_id=repo, folder_path=folder, commit_message=title))
    return f"https://huggingface.co/{repo}"


def _check(repo: str, dry_run: bool, to: Path | None) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise UsageError(f"'{repo}' is not the name of a repository ({error}); give user/name") from error
    if repo.count("/") != 1:
        raise UsageError(f"'{repo}' does not name the owner of the repository; give user/name")
    if dry_run and to is None:
        raise UsageError("a dry run needs a folder to write to; give one with -o")
    if to is not None and to.exists():
        raise UsageError(f"'{to}' exists; give another path with -o, or remove it")


def _try(what: str, repo: str, call: Any) -> None:
    try:
        call(HfApi())
    except Exception as error:  # the client also raises errors of its HTTP library
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"the repository '{repo}' cannot be {what} ({reason}); log in with `hf auth login` as a user with write "
            "access, or only write the folder with --dry-run -o DIR"
        ) from error


def checkpoint_stage(folder: Path, form: Form) -> str:
    """Stage of the checkpoint in a written folder: `stage1` or `stage2`."""
    if form == "qformer":
        return checkpoint.read_config(folder).stage
    kinds = json.loads((folder / checkpoint.HUGGING_FACE).read_text(encoding="utf-8"))["architectures"]
    return "stage1" if "Blip2ForImageTextRetrieval" in kinds else "stage2"


def write(source: str, repo: str, form: Form, folder: Path, trust: bool = False) -> None:
    """Write the folder of the repository, complete or not at all.

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
    """Copy a checkpoint without trainer state and local paths, but with towers that exist only on this machine."""
    checkpoint.check_files(own)
    shutil.copytree(own, folder, ignore=lambda place, names: [n for n in names if _is_excluded(own, Path(place) / n)])
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


def _is_excluded(own: Path, file: Path) -> bool:
    """Check whether a file of a checkpoint is not uploaded: trainer state, and links to files elsewhere."""
    return file.name == checkpoint.TRAINER or (file.is_symlink() and own.resolve() not in file.resolve().parents)


def _with_towers_inside(config: Config, own: Path, folder: Path) -> Config:
    """Copy towers that are local files or folders; names of others are kept."""

    def inside(path: Any, name: str) -> Any:
        if not isinstance(path, str) or not Path(path).exists():
            return path
        place = Path(path)
        if not (place.suffix in checkpoint.FILES if place.is_file() else (place / checkpoint.HUGGING_FACE).is_file()):
            raise UsageError(
                f"the checkpoint names '{path}', which is not a tower and is not uploaded; correct its "
                f"{checkpoint.CONFIG}"
            )
        if own in place.parents:  # inside the checkpoint
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

    names = iter(("vision", "vision-second"))  # a mixture has two
    options = map_towers(config.vision.options, lambda path: inside(path, next(names)))
    update: dict[str, Any] = {"vision": config.vision.model_copy(update=options)}
    if config.llm is not None:
        update["llm"] = config.llm.model_copy(update={"path": inside(config.llm.path, "llm")})
    update["text"] = config.text.model_copy(update={"bert": _bare(config.text.bert)})  # the folder holds its tokenizer
    return config.model_copy(update=update)


def _bare(value: Any) -> Any:
    """Cut the absolute paths in plain data to their last part."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
