"""Digests of the weights of towers that have names of ours: a name fixes bytes, and checkpoints say which."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.config import map_towers
from qformer.files import pretrained, real_towers
from qformer.files.pretrained import DIGITS, MINI, VERSIONS
from qformer.files.soundness import checks, digest_weights
from qformer.files.tensors import read_tensors
from qformer.identity import look
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qformer.schema import Config

TOWER_FILES = frozenset((".safetensors", ".bin", ".pth", ".pt", ".json", ".model", ".txt", ".jinja"))


def digest(name: str) -> str | None:
    """Digest of the weights of `mini:NAME` or `real:NAME`, fetched or not; None for any other path or unknown name."""
    scheme, own = name[: len(MINI)], name[len(MINI) :]
    if scheme == real_towers.SCHEME and own in real_towers.REAL_TOWERS:
        return real_towers.REAL_TOWERS[own].digest
    if scheme == MINI:
        try:
            return _hash_weights(pretrained.mini(own))
        except UsageError:
            return None
    return None


@lru_cache
def _hash_weights(folder: Path) -> str:
    return digest_weights(read_tensors(folder))


def digests(config: Config) -> dict[str, str]:
    """Digests of the weights of towers that have names of ours, `mini:NAME` and `real:NAME`; by these names."""
    found = {name: digest(name) for name in _paths(config)}
    return {name: known for name, known in found.items() if known}


def file_digests(config: Config) -> dict[str, str]:
    """Digests of towers that are folders or files here, by their paths: other weights may come to stand there.

    The bytes of weights, configurations and tokenizers count.
    """
    found = {}
    for name in _paths(config):
        place = Path(name)
        files = sorted(one for one in place.glob("*") if one.suffix in TOWER_FILES) if place.is_dir() else [place]
        seen = [(str(one), sizes) for one in files if one.is_file() and (sizes := look(one)) is not None]
        if seen:
            found[name] = _hash_files(tuple(seen))
    return found


@lru_cache(maxsize=64)
def _hash_files(files: tuple[tuple[str, tuple[int, int]], ...]) -> str:
    """Hash files by name and bytes; their sizes and times are there to look again once they change."""
    found = hashlib.sha256()
    for file, _ in files:
        with open(file, "rb") as opened:
            found.update(f"{Path(file).name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def _paths(config: Config) -> list[str]:
    named: list[Any] = [config.text.bert, config.llm and config.llm.path]
    map_towers(config.vision.options, named.append)
    return [name for name in named if isinstance(name, str)]


def with_towers(config: Config, written: dict[str, str], where: str) -> Config:
    """Name the towers that a checkpoint was trained on, of which `written` has the digests, if names now mean others.

    A former version of a mini tower gets its digest behind its name. Otherwise what was trained would fit no tower.

    Raises:
        UsageError: nobody knows the weights of one (unless checks are off: then it stays as it is).
    """
    names = {name: _name(name, written[name], where) for name in _paths(config) if name in written}

    def place(name: Any) -> Any:
        return names.get(name, name) if isinstance(name, str) else name

    return with_paths(config, place)


def _name(name: str, known: str, where: str) -> str:
    here = digest(name)
    if here == known:
        return name
    former = f"{name.partition('@')[0]}@{known[:DIGITS]}"
    if name.startswith(MINI) and (known in VERSIONS.get(name[len(MINI) :], ()) or digest(former) == known):
        return former
    if here is not None and checks():  # of a tower that is not here, its name says enough
        raise UsageError(
            f"the checkpoint '{where}' was trained on '{name}' with other weights (digest {known}) than those of "
            f"this version ({here}); use the version of qformer that wrote it"
        )
    return name


def with_paths(config: Config, place: Callable[[Any], Any]) -> Config:
    """Replace the paths of towers by what `place` makes of them; a section that stays as it is counts as before."""
    options = map_towers(config.vision.options, place)
    update: dict[str, Any] = {}
    if options != config.vision.options:  # what stays as it is must not count as given
        update["vision"] = config.vision.model_copy(update=options)
    if place(config.text.bert) != config.text.bert:
        update["text"] = config.text.model_copy(update={"bert": place(config.text.bert)})
    if config.llm is not None and place(config.llm.path) != config.llm.path:
        update["llm"] = config.llm.model_copy(update={"path": place(config.llm.path)})
    return config.model_copy(update=update)
