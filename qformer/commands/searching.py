"""`qformer index` and `qformer search`: a gallery from a checkpoint and images, and what it finds, to look at."""

from __future__ import annotations

import os
import sys
import textwrap
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qformer import devices, distributed, load, lookup
from qformer.data import sources
from qformer.data.arguments import choose_data
from qformer.figures import page as sheet
from qformer.files.claims import claim
from qformer.files.logs import printable
from qformer.files.records import to_json, writing
from qformer.images import read_image
from qformer.images import shown as shortened
from qformer.model.image_text import ImageTextModel
from qformer.progress import Bar, console
from qformer.retrieval.embedders import ClipEmbedder, Embedder, as_embedder, model_type_of
from qformer.retrieval.gallery import MANIFEST, Gallery
from qformer.retrieval.index import SKIPPED, update
from qformer.retrieval.places import in_words
from qformer.retrieval.reading import probes
from qformer.retrieval.search import SHORTLIST, Hit, Retriever
from qformer.trust import Untrusted
from qformer.types import BadSample, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.data.base import Source
    from qformer.retrieval.index import Tally

LOCAL = ("path", "images")  # options of a source that name files


def index(
    path: str,
    data: list[str],
    folder: Path,
    *,
    store: str | None = None,
    features: str | None = None,
    batch: int = 64,
    device: str | None = None,
    trust: bool = False,
    remove: bool = False,
) -> None:
    """Make a gallery of images, or bring it in step with them. Of several processes each embeds a share.

    With `trust` checkpoint and gallery may run the code and ask the server that they name. With `remove` images that
    are not there are taken out, however many, and though nobody could look for them.

    Raises:
        UsageError: data or a checkpoint that cannot be used, a gallery of another model, one that is damaged or being
            indexed, or a full disk.
    """
    with ExitStack() as stack:
        stack.enter_context(distributed.joined())
        model = _load(path, device, trust, features)
        choice = choose_data(data).model_dump()
        named = {"store": store, "features": features, "path": path, "trust": trust}
        gallery, tally = fill(stack, model, choice, data[0], folder, named, batch, remove)
        if distributed.rank() == 0:
            _report(gallery, model, tally)


def fill(
    stack: ExitStack,
    model: Embedder,
    choice: dict[str, Any],
    data: str,
    folder: Path,
    named: dict[str, Any],
    batch: int,
    remove: bool = False,
) -> tuple[Gallery, Tally]:
    """Bring the gallery in a folder, which is made if there is none, in step with a source.

    Args:
        stack: keeps others from the gallery until it is closed. choice: the source. data: as its user named it.
        named: `store`, `features`, `path` of the model and `trust`, for the gallery.

    Raises:
        UsageError: see `index`.
    """
    choice = absolute(choice)
    source, closed = _open(choice)
    gallery, number, fault = None, -1, ""
    if distributed.rank() == 0:
        try:
            if closed and not (folder / MANIFEST).exists():
                raise UsageError(closed)
            gallery = _claim(stack, folder, model=model, **named)
            number = _number(gallery, choice, data if closed else "")
            if number < 0:
                raise UsageError(closed)
        except UsageError as error:
            fault = str(error)
        except OSError as error:
            fault = f"'{folder}' cannot be written ({error.strerror}); make room, or give another folder with -o"
    fault, number, about = distributed.gather_objects((fault, number, gallery and gallery.about))[0]
    if fault:
        raise UsageError(fault)
    if gallery is None:
        gallery = Gallery(folder, about, cast("Any", None))
    elif closed:
        _tell_closed(data, closed, remove)
    stack.enter_context(writing(folder))
    with Bar("{task.fields[added]} embedded", console=console, disable=distributed.rank() != 0) as bar:
        task = bar.add_task("indexing", total=len(source), added=0)
        return gallery, update(
            gallery, model, source, number, batch, lambda t: bar.update(task, completed=t.seen, added=t.added), remove
        )


def _open(choice: dict[str, Any]) -> tuple[Source, str]:
    """A source; one of nothing, and the reason, where a process cannot open it: a disk that is not mounted, say."""
    source, reason = cast("Source", []), ""
    try:
        source = sources.build(**choice)
    except Untrusted:
        raise
    except UsageError as error:
        reason = str(error)
    reason = next(filter(None, distributed.gather_objects(reason)), "")
    return cast("Source", []) if reason else source, reason


def _number(gallery: Gallery, choice: dict[str, Any], closed: str) -> int:
    """Which of its sources this is, -1 if none; a path that is `closed` today no longer says what was there."""
    known = gallery.sources()
    if choice in known:
        return int(known.index(choice))
    if closed:
        path = os.path.abspath(closed)
        same = [one.keys() <= {"name", "path"} and one.get("path") in (path, f"{path}/*.tar") for one in known]
        return same.index(True) if True in same else -1
    gallery.about["sources"].append(choice)
    gallery.save()
    return len(known) - 1


def _claim(
    stack: ExitStack,
    folder: Path,
    store: str | None,
    features: str | None,
    path: str,
    model: Embedder,
    trust: bool,
) -> Gallery:
    """Open or make the gallery, and keep others from indexing into it meanwhile."""
    partial = {f"{MANIFEST}.partial"}
    claim(stack, folder, lambda names: MANIFEST in names or names <= partial, "a gallery", "indexes")
    made = model.fingerprint()
    if (folder / MANIFEST).exists():
        gallery = Gallery.open(folder, trust, store)
        gallery.check(made, path)
        for name, given, held in (
            ("--features", features, gallery.about.get("features")),
            ("--store", store, gallery.about["store"]),
        ):
            if given not in (None, held):
                raise UsageError(
                    f"'{folder}' was made with {name} {held or 'none'}, not {given}; leave it out, or give a new folder"
                )
        return gallery
    sizes = {"queries": model.rows, "width": model.width}
    local = Path(path).exists()
    checkpoint = str(Path(path).resolve()) if local else path
    return Gallery.create(folder, store or "lance", fingerprint=made, checkpoint=checkpoint, features=features, **sizes)


def _load(path: str, device: str | None, trust: bool, features: str | None = None) -> Embedder:
    if device is None and torch.cuda.is_available() and distributed.world() > 1:
        device = f"cuda:{distributed.local_rank()}"
    if Path(path).is_dir() and model_type_of(path) not in (None, "blip-2"):
        if features:
            raise UsageError(f"'{path}' has no ITM, which alone reads --features; leave it out")
        return ClipEmbedder(path, devices.choose(device))
    model = load(path, device, trust=trust)
    if not isinstance(model, ImageTextModel):
        raise UsageError(f"'{path}' is a checkpoint of stage two; a gallery needs one of stage one")
    return as_embedder(model.eval())


def absolute(choice: dict[str, Any]) -> dict[str, Any]:
    """Options of a source with the paths of files that exist made absolute, so that it opens from anywhere."""

    def place(value: Any) -> Any:
        if isinstance(value, list):
            return [place(one) for one in value]
        known = isinstance(value, str) and "://" not in value and not value.startswith("pipe:")
        return os.path.abspath(value) if known and Path(value).parent.exists() else value

    return {key: place(value) if key in LOCAL else value for key, value in choice.items()}


def _report(gallery: Gallery, model: Embedder, tally: Tally) -> None:
    copies = f"; {tally.copies:,} further files are copies of these" if tally.copies else ""
    console.print(
        f"{gallery.folder}: {len(gallery.store):,} images ({tally.added:,} embedded now, {tally.changed:,} changed, "
        f"{tally.removed:,} removed{copies})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if tally.skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in tally.skipped.most_common())
        console.print(
            f"skipped {sum(tally.skipped.values()):,} ({kinds}); see {gallery.folder / SKIPPED}", markup=False
        )
    _tell_kept(tally)
    if not len(gallery.store):
        if tally.removed:
            return
        raise UsageError(f"no image could be indexed; see {gallery.folder / SKIPPED}")
    with console.status("tidying up"):
        built = gallery.store.refresh(probes(gallery, model))
    if built is not None:
        console.print(
            f"index: {built['kind']} over {built['queries']} of {gallery.about['queries']} queries, "
            f"{built['partitions']} partitions ({built['searched']} searched), {built['candidates']} candidates, "
            f"{built['seconds']:.0f} s; recall@100 against reading everything: {built['recall']:.3f}",
            markup=False,
        )


def _tell_closed(path: str, reason: str, remove: bool) -> None:
    """Report a source that cannot be opened today."""
    kept = "" if remove else "; what the gallery has of it is kept"
    gone = f"there is nothing at '{path}' today; is its disk mounted?"
    print(f"qformer: {reason if Path(path).exists() else gone}{kept}", file=sys.stderr)


def _tell_kept(tally: Tally) -> None:
    """Report entries that were not found and are kept."""
    if tally.away:
        console.print(
            f"kept {tally.away:,} images that could not be looked at (is their disk mounted?), such as "
            f"{printable(tally.kept)}; --remove takes out those that are not there",
            markup=False,
            soft_wrap=True,
        )
    if tally.missing:
        console.print(
            f"kept {tally.missing:,} images that are gone, more than a fifth of the gallery at once; --remove takes "
            "them out",
            markup=False,
            soft_wrap=True,
        )


def search(
    path: str,
    folder: Path,
    text: str | None = None,
    image: Path | None = None,
    *,
    k: int = 10,
    shortlist: int = SHORTLIST,
    where: Sequence[str] = (),
    exact: bool = False,
    html: Path | None = None,
    as_json: bool = False,
    device: str | None = None,
    trust: bool = False,
) -> None:
    """Search a gallery and show what was found, as a table, as JSON, or also as a sheet of thumbnails.

    With `trust` checkpoint and gallery may run the code, and call the addresses, that they name.

    Raises:
        UsageError: nothing to search for, an image that cannot be read, or a gallery that cannot be used.
    """
    if text is None and image is None:
        raise UsageError("there is nothing to search for; give a text in quotes, --image FILE, or both")
    gallery = Gallery.open(folder, trust)
    if not len(gallery.store):
        raise UsageError(f"the gallery '{folder}' holds no image; index some with 'qformer index'")
    picture = None
    if image is not None:
        try:
            picture = read_image(image)
        except BadSample as bad:
            if address := lookup.address(image):
                raise UsageError(f"'{shortened(address)}'{lookup.NOT_FETCHED} and give the file") from bad
            raise UsageError(f"'{image}' cannot be read as an image ({bad}); give a JPEG, PNG or WebP file") from bad
    retriever = Retriever(gallery, _load(path, device, trust), path)
    hits = retriever.search(text, picture, k, shortlist, where, exact)
    if html is not None:
        shown = None if picture is None else Image.fromarray(picture.permute(1, 2, 0).numpy())
        try:
            html.write_text(_sheet(retriever, text, shown, hits), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"'{html}' cannot be written ({error.strerror}); give another file with --html") from error
    if retriever.model is None and text is not None and shortlist > 0:
        print(f"qformer: '{path}' has no ITM to re-rank with, so cosines alone order the images", file=sys.stderr)
    _notes(retriever, text, k, where, hits)
    if as_json:
        print(to_json([asdict(hit) for hit in hits], indent=1))
    else:
        Console(soft_wrap=False).print(_table(hits, text, len(gallery.store)))


def _notes(retriever: Retriever, text: str | None, k: int, where: Sequence[str], hits: Sequence[Hit]) -> None:
    """Print notes about a search on standard error."""
    for note in retriever.gallery.store.notes:
        print(f"qformer: {note}", file=sys.stderr)
    if text is not None and retriever.is_unknown(text):
        print(f"qformer: the model knows no letter of {text!r}; what was found means nothing", file=sys.stderr)
    count = len(retriever.gallery.store)
    read = None if text is None else retriever.words_read(text)
    if text is not None and read is not None:
        print(f"qformer: the text has {len(text.split()):,} words; the first {read} were read", file=sys.stderr)
    if k > count and not where:
        print(f"qformer: the gallery holds {count:,} images, fewer than -k {k:,}; all are shown", file=sys.stderr)
    if retriever.unread:
        print(
            "qformer: images that are not where they were indexed, or are others by now, could not be re-ranked and "
            f"stand last: {len(retriever.unread):,}, such as {printable(str(retriever.unread[0]))}; index them "
            "where they are now",
            file=sys.stderr,
        )
    elif faulty := [hit for hit in hits if hit.fault]:
        print(
            f"qformer: images that are no longer as they were indexed: {len(faulty):,}, such as "
            f"{printable(faulty[0].path)} ({in_words(faulty[0].fault)}); index them again",
            file=sys.stderr,
        )


def _table(hits: Sequence[Hit], text: str | None, count: int) -> Table:
    matched, both = (any(getattr(hit, name) is not None for hit in hits) for name in ("itm", "similarity"))
    table = Table(title=f"{len(hits)} of {count:,} images", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    last = ("similarity",) if text is None else ("cosine", "similarity") if both else ("cosine",)
    for name in ("", "score", *(("match", "logit") if matched else ()), *last):
        table.add_column(name, justify="right")
    table.add_column("image", overflow="fold")
    for place, hit in enumerate(hits, start=1):
        itm = ("-", "-") if hit.itm is None else (f"{hit.probability:.1%}", f"{hit.itm:.2f}")
        path = printable(_near(hit.path)) + (f" ({in_words(hit.fault)})" if hit.fault else "")
        shown = Text("\n".join([path, *map(printable, hit.captions[:1])]))
        shown.stylize("dim", len(path))
        alike = (f"{hit.similarity:.3f}",) if both else ()
        table.add_row(str(place), f"{hit.score:.3f}", *(itm if matched else ()), f"{hit.itc:.3f}", *alike, shown)
    return table


def _near(path: str) -> str:
    """A path as it is read from here."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _sheet(retriever: Retriever, text: str | None, picture: Image.Image | None, hits: Sequence[Hit]) -> str:
    cards = []
    for hit in hits:
        scores: dict[str, float | str] = {"cosine": hit.itc}
        if hit.itm is not None:
            scores |= {"match": f"{hit.probability:.1%}", "logit": hit.itm}
        if hit.similarity is not None:
            scores |= {"similarity": hit.similarity}
        image, gone = None, ""
        try:
            image = Image.fromarray(retriever.open_image(hit).permute(1, 2, 0).numpy())
        except BadSample as bad:
            gone = in_words(bad.kind)
        cards.append(sheet.Card(image, [Path(hit.path).name, *hit.captions[:2]], scores, gone=gone))
    title = "Images like this one" if text is None else textwrap.shorten(text, 200, placeholder=" …")
    note = f"{len(hits)} of {len(retriever.gallery.store):,} images in {retriever.gallery.folder}"
    return sheet.contact_sheet(title, sheet.Card(picture), cards, note)
