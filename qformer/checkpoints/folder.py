"""Checkpoints: a folder with the tensors that were trained, the resolved configuration, and where they come from.

    model.safetensors   trained tensors only: the frozen towers are found again through the configuration, where
                        `checkpoint:` begins the path of one that is kept in this folder (`qformer convert` does so)
    config.yaml         every key, defaults included
    meta.json           step, commit, versions, size and checksum of every other file, and a checksum of itself
    trainer.pt          optimizer, scaler and random states, for resuming (absent in an exported model)

A checkpoint appears under its name only when it is complete, so an interrupted save leaves the previous one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qformer import lookup
from qformer.config import dump_config, load_config
from qformer.fields import read_from
from qformer.files import soundness
from qformer.files.digests import digests, with_paths, with_towers
from qformer.files.records import Form, flush, read_object, replacing
from qformer.files.releases import RELEASES
from qformer.schema import Config
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = "checkpoints"
HUGGING_FACE = "config.json"  # what a folder of transformers holds
FILES = (".pth", ".pt", ".bin", ".safetensors")  # an id on the hub may have a dot, too: opt-2.7b
MERGED = "adapters_merged_into"  # in META: the language model to whose weights adapters were added
INSIDE = "checkpoint:"  # begins the path of a tower that the checkpoint holds itself
TOWERS = "towers"  # in META: digest of the weights of each tower that has a name of ours
WEIGHTS, CONFIG, META, TRAINER = "model.safetensors", "config.yaml", "meta.json", "trainer.pt"


class Damaged(UsageError):
    """A checkpoint lacks something that was once written, or holds what cannot be read."""


class Meta(Form):
    """Contents of `meta.json`, see the top of this module; older files have no checksums."""

    step: int
    files: dict[str, int] = Field(default_factory=dict)
    checksums: dict[str, str] = Field(default_factory=dict)
    parameters: int = 0
    skipped: dict[str, int] = Field(default_factory=dict)
    towers: dict[str, str] = Field(default_factory=dict)
    precision: str = ""
    commit: str = ""
    torch: str = ""
    transformers: str = ""


@dataclass
class Checkpoint:
    """Checkpoint that was read; its tensors are on the CPU."""

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(
    run: Path,
    step: int,
    config: Config,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    trainer: dict[str, Any] | None = None,
    extra: Callable[[Path], object] | None = None,
    keep_last: int = 2,
    keep_every: int = 0,
) -> Path:
    """Write `run/checkpoints/step-N` atomically, then remove all that came before but the `keep_last` newest.

    Args:
        extra: writes further files (the tokenizer) into the folder it is given.
        keep_every: those of steps that it divides stay, too; 0 keeps none for that.

    Raises:
        OSError: it could not be written, as on a full disk; what was there before is as it was.
    """
    final = run / FOLDER / f"step-{step:07d}"
    try:
        with replacing(final) as partial:
            partial.mkdir(parents=True)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / WEIGHTS)
            (partial / CONFIG).write_text(dump_config(config), encoding="utf-8")
            if trainer is not None:
                torch.save(trainer, partial / TRAINER)
            if extra is not None:
                extra(partial)
            write_meta(partial, {"step": step, **provenance(), TOWERS: digests(config), **meta})
        flush(final.parent)
    except (SafetensorError, RuntimeError) as error:  # what safetensors and torch.save make of a full disk
        raise OSError(f"{error}") from error
    before = [folder for folder in complete(run) if _step(folder) <= step]  # later ones are of a run that went back
    for old in before[:-keep_last]:
        if not keep_every or _step(old) % keep_every:
            shutil.rmtree(old, ignore_errors=True)
    return final


def write_meta(folder: Path, about: dict[str, Any]) -> None:
    """Write `meta.json` of a checkpoint whose other files are there, with their sizes and checksums."""
    sizes = _sizes(folder)
    sums = {name: soundness.checksum(folder / name) for name in sizes if name not in (CONFIG, META)}
    sizes.pop(META, None)
    sealed = soundness.seal({**about, "files": sizes, "checksums": sums})
    (folder / META).write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """Read `meta.json`.

    Raises:
        Damaged: it is missing, not as it was written, or of another step than the folder.
    """
    try:
        meta = read_object(folder / META, Meta)
    except UsageError as error:
        raise _damaged(folder, error) from error
    sealed = soundness.SEAL in meta or "checksums" not in meta
    if soundness.checks() and not (sealed and soundness.seal_holds(meta)):
        raise _damaged(folder, f"{META} is not as it was written: its checksum is another")
    if folder.parent.name == FOLDER and folder.name != f"step-{meta['step']:07d}" and _is_step(folder):
        raise _damaged(folder, f"{META} says step {meta['step']}")
    return meta


def _damaged(folder: Path, what: object) -> Damaged:
    return Damaged(f"the checkpoint '{folder}' is damaged ({what}); use an earlier one")


def check(folder: Path) -> None:
    """Check that every file has the size with which it was written; only the configuration can be edited.

    Raises:
        Damaged: naming a file that is missing or cut off.
    """
    found = _sizes(folder)
    for name, size in read_meta(folder).get("files", {}).items():
        if found.get(name) != size and name != CONFIG:
            what = "is missing" if name not in found else f"has {found[name]:,} bytes instead of {size:,}"
            raise _damaged(folder, f"{name} {what}")


def check_files(folder: Path, trainer: bool = False) -> None:
    """Check that files equal those that were written, if their checksums are known; see `soundness.unchecked`.

    Args:
        trainer: that of `trainer.pt`, which only resuming reads, instead of all the others.

    Raises:
        Damaged: naming a file that is missing or has changed.
    """
    sums = read_meta(folder).get("checksums", {}) if soundness.checks() else {}
    for name, written in sums.items():
        if (name == TRAINER) != trainer:
            continue
        try:
            found = soundness.checksum(folder / name)
        except OSError as error:
            raise _damaged(folder, f"{name}: {error.strerror}") from error
        if found != written:
            raise _damaged(folder, f"{name} is not as it was written: its checksum is {found} instead of {written}")


def _sizes(folder: Path) -> dict[str, int]:
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a run.

    Raises:
        UsageError: neither.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file() and (path / CONFIG).is_file():
        return path
    if found := complete(path):
        return found[-1]
    if address := lookup.address(path):
        raise UsageError(f"'{address}'{lookup.NOT_FETCHED} and give the folder")
    raise UsageError(f"no checkpoint at '{path}'; give a run folder or one of its checkpoints, a folder with {WEIGHTS}")


def is_foreign(path: str | Path) -> bool:
    """Return True for a path that is not ours: a file, a folder of transformers, a release, or a hub id.

    A path that is nothing at all counts as ours if it looks like one, so that the message says what is missing.
    """
    path = Path(path)
    if path.exists():
        return path.is_file() or ((path / HUGGING_FACE).is_file() and not (path / CONFIG).is_file())
    is_id = len(path.parts) == 2 and path.suffix not in FILES and not path.parent.exists()
    return is_id or str(path) in RELEASES


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, None when it has none."""
    found = complete(run)
    return found[-1] if found else None


def read(path: str | Path, trust: bool = False, verify: bool = True) -> Checkpoint:
    """Tensors (on the CPU), configuration and provenance.

    Args:
        trust: what the configuration names may be imported and run when it is built (`qformer.trust`).
        verify: compare the files with their checksums, and refuse weights that are not finite.

    Raises:
        UsageError: no checkpoint there, or (`Damaged`) one of its files cannot be read or is not as it was written.
    """
    folder = find(path)
    with soundness.unchecked(not verify):
        check_files(folder)
        meta = read_meta(folder)
        try:
            tensors = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(folder, error) from error
        if soundness.checks() and (name := soundness.not_finite(tensors)):
            raise _damaged(folder, f"the weight '{name}' holds NaN or infinity")
        config = _read_config(folder, trust, meta)
    return Checkpoint(folder, config, tensors, meta)


def read_config(path: str | Path, trust: bool = False) -> Config:
    """The configuration alone, with the paths of towers inside the checkpoint made those of files; `trust`: see `read`.

    Raises:
        UsageError: no checkpoint there, or a configuration that is refused.
    """
    folder = find(path)
    return _read_config(folder, trust, read_meta(folder) if (folder / META).is_file() else {})


def _read_config(folder: Path, trust: bool, meta: dict[str, Any]) -> Config:
    try:
        config = with_own_towers(load_config(folder / CONFIG), folder)
    except UsageError as error:
        raise _damaged(folder, f"its {CONFIG} is refused: {error}") from error
    config = with_towers(config, meta.get(TOWERS, {}), str(folder))
    return config if trust else read_from(config, f"the configuration of the checkpoint '{folder}'")


def with_own_towers(config: Config, folder: Path) -> Config:
    """Paths of towers that begin with `checkpoint:` made those of files in the folder of the configuration."""

    def place(path: Any) -> Any:
        return str(folder / path.removeprefix(INSIDE)) if isinstance(path, str) and path.startswith(INSIDE) else path

    return with_paths(config, place)


def read_trainer(folder: Path, verify: bool = True) -> dict[str, Any]:
    """Optimizer, scaler and random states; tensors and plain values only, so nothing in the file is executed.

    Raises:
        UsageError: the file is missing, as in an exported model, or damaged.
    """
    with soundness.unchecked(not verify):
        if (folder / TRAINER).exists():
            check_files(folder, trainer=True)
    try:
        trainer = torch.load(folder / TRAINER, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"'{folder}' has no {TRAINER}, so training cannot go on from it; set init to it") from error
    except Exception as error:  # torch.load raises nearly anything
        raise damaged_trainer(folder, "it cannot be read") from error
    if not isinstance(trainer, dict):
        raise damaged_trainer(folder, "it holds no keys")
    return trainer


def damaged_trainer(folder: Path, what: object) -> Damaged:
    """To be raised where the trainer's state is `what`."""
    return Damaged(f"'{folder / TRAINER}' is damaged ({what}); remove '{folder}' to go on from an earlier one")


def complete(run: Path) -> list[Path]:
    """Finished checkpoints, by step."""
    folders = [folder for folder in (run / FOLDER).glob("step-*") if (folder / WEIGHTS).is_file()]
    return sorted(filter(_is_step, folders), key=_step)  # no .partial


def _is_step(folder: Path) -> bool:
    return folder.name.removeprefix("step-").isdecimal()


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def provenance() -> dict[str, str]:
    """The commit of the working copy (empty outside one) and the versions that matter."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return {"commit": commit, "torch": torch.__version__, "transformers": version("transformers")}
