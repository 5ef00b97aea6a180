"""A gallery: a folder with `gallery.json`, and a store of entries in that folder or on a server.

An entry is one content: files with the same bytes are one entry with several places, embedded once and found once. Its
`id` is the hash of these bytes, by which a moved file is recognized.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from pydantic import ValidationError

from qformer import lookup
from qformer.data import sources
from qformer.fields import Choice, Packing
from qformer.files.records import replace_text
from qformer.retrieval.entries import Entry, Place, Store
from qformer.trust import CALLED, judge, reading
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qformer.data.base import Source

__all__ = ["Entry", "Gallery", "Place", "open_store"]

LARGEST = 1 << 20  # upper limit of rows per image and of their width, far above any model
MANIFEST = "gallery.json"
FIELDS: dict[str, Callable[[Any], bool]] = {  # keys of the manifest, and checks of their values
    **dict.fromkeys(("name", "store", "fingerprint", "checkpoint"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("queries", "width"), lambda value: type(value) is int and 0 < value < LARGEST),
    "features": lambda value: value in (None, *get_args(Packing)),
    "sources": lambda _: True,  # opening one reports what is wrong with it
}


@dataclass
class Gallery:
    """An open gallery.

    Attributes:
        about: contents of `gallery.json`.
        trusted: whether code and addresses that it names can be used; always true for a gallery created here.
    """

    folder: Path
    about: dict[str, Any]
    store: Store
    trusted: bool = False

    @classmethod
    def open(cls, folder: str | Path, trust: bool = False, store: str | None = None) -> Gallery:
        """Open the gallery in a folder.

        Args:
            trust: connect to the server that the gallery names, and when images are read again, run what its sources
                name: `module:Class`, `pipe:`, addresses. Its author can then do on this machine what you can.
            store: address of a store that the caller trusts; a gallery that names it is opened without `trust`.

        Raises:
            UsageError: no gallery, a damaged manifest, or a store that cannot be reached; `Untrusted` if the store is
                a server and `trust` is not given.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            fields = {key: about[key] for key in FIELDS}
            odd = [key for key, fits in FIELDS.items() if not fits(fields[key])]
        except OSError as error:
            if address := lookup.address(folder):
                raise UsageError(f"'{address}'{lookup.NOT_FETCHED} and give the folder") from error
            raise UsageError(
                f"no gallery at '{folder}' ({error.strerror}: {MANIFEST}); give the folder that 'qformer index' wrote"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UsageError(
                f"'{folder / MANIFEST}' is damaged ({reason}); index the images into another folder"
            ) from error
        if odd:
            raise UsageError(
                f"'{folder / MANIFEST}' is damaged ({odd[0]} is {fields[odd[0]]!r}); index the images into another "
                "folder"
            )
        with reading("" if trust or store == fields["store"] else _named(folder)):
            return cls(folder, about, open_store(folder, fields), trust)

    @classmethod
    def create(cls, folder: Path, store: str, **about: Any) -> Gallery:
        """Create an empty gallery; `store` is `lance`, or `qdrant://host:port`."""
        name = f"gallery-{uuid.uuid4().hex[:12]}"
        about = {"name": name, "store": store, "sources": [], "features": None, **about}
        made = cls(folder, about, cast("Store", None), trusted=True)
        made.save()  # first: without a manifest nobody could tell whose store the folder holds
        try:
            made.store = open_store(folder, about)
        except UsageError:
            (folder / MANIFEST).unlink()
            raise
        return made

    def save(self) -> None:
        """Write `gallery.json`; a kill leaves the previous one."""
        replace_text(self.folder / MANIFEST, json.dumps(self.about, indent=1))

    def source(self, number: int) -> Source:
        """Open the source of that number again.

        Raises:
            UsageError: it has changed or does not exist; `Untrusted` if opening it would run what it names.
        """
        try:
            choice = Choice.model_validate(self.about["sources"][number])
        except (IndexError, KeyError, TypeError, ValidationError, RecursionError) as error:
            raise UsageError(f"'{self.folder / MANIFEST}' has no source {number} that can be opened") from error
        return sources.for_run(choice if self.trusted else choice.read_from(_named(self.folder)))

    def sources(self) -> list[dict[str, Any]]:
        """Configurations of all sources.

        Raises:
            UsageError: the manifest holds something else.
        """
        found = self.about["sources"]
        if not isinstance(found, list) or not all(isinstance(one, dict) and "name" in one for one in found):
            raise UsageError(
                f"'{self.folder / MANIFEST}' is damaged (sources is {found!r}); index the images into another folder"
            )
        return found

    def check(self, fingerprint: str, model: str, sizes: Mapping[str, int] | None = None) -> None:
        """Check that this model made the gallery.

        Raises:
            UsageError: another model made it, or its manifest has other `queries` or `width`.
        """
        if self.about["fingerprint"] != fingerprint:
            raise UsageError(
                f"the gallery '{self.folder}' was embedded by another model ('{self.about['checkpoint']}') than "
                f"'{model}'; search it with the first, or index the images into another folder"
            )
        for key, value in (sizes or {}).items():
            if self.about[key] != value:
                raise UsageError(
                    f"'{self.folder / MANIFEST}' is damaged ({key} is {self.about[key]}, but {value} in the model that "
                    f"made it); set it to {value}, or index the images into another folder"
                )


def _named(folder: Path) -> str:
    return f"the gallery '{folder}'"


def open_store(folder: Path, about: dict[str, Any]) -> Store:
    """Open the store of a gallery.

    Raises:
        UsageError: unknown kind, a package that is not installed, or an unreachable server; see also `Gallery.open`.
    """
    kind = str(about["store"])
    try:
        if kind == "lance":
            from qformer.retrieval.lance import LanceStore

            return LanceStore(folder, int(about["queries"]), int(about["width"]), new=not about["sources"])
        if kind.startswith("qdrant://"):
            judge(kind, CALLED)
            from qformer.retrieval.qdrant import QdrantStore

            if about.get("features"):
                raise UsageError(
                    "image tokens are too large for a Qdrant server (0.4 to 0.7 MB per image with ViT-g); omit "
                    "--features, or use --store lance"
                )
            return QdrantStore(kind, str(about["name"]), int(about["width"]), new=not about["sources"])
    except ModuleNotFoundError as error:
        raise UsageError(
            f"a gallery needs the package '{error.name}', which is not installed; pip install -e '.[search]'"
        ) from error
    raise UsageError(f"unknown store '{kind}' of the gallery '{folder}'; give lance, or qdrant://host:port")
