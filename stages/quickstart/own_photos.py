"""The user's own photos at the end of a quickstart: captioned, and indexed into a gallery to search."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qformer.data import sources
from qformer.images import read_image
from qformer.progress import track
from qformer.resolution.base import cut_all
from qformer.retrieval.embedders import as_embedder
from qformer.retrieval.gallery import MANIFEST, Gallery
from qformer.retrieval.index import update
from qformer.stages.quickstart.real_exam import GREEDY, GROUP
from qformer.types import BadSample, UsageError
from qformer.videos.rows import only_picture

if TYPE_CHECKING:
    from torch import Tensor

    from qformer.data.base import Source
    from qformer.model.image_text import ImageTextModel
    from qformer.model.vision_language import VisionLanguageModel


@dataclass(frozen=True)
class OwnPhotos:
    """A folder of photos. `options` name it as a source, absolute, so that the gallery finds it from anywhere."""

    folder: Path
    source: Source

    @classmethod
    def open(cls, folder: Path) -> OwnPhotos:
        """List the photos, before hours of work.

        Raises:
            UsageError: no folder, no photos in it, or nothing that can keep a gallery is installed.
        """
        if find_spec("lancedb") is None:
            raise UsageError(
                "photos are made searchable by lancedb, which is not installed; run: pip install -e '.[search]', or "
                "leave --photos out"
            )
        if not folder.is_dir():
            raise UsageError(f"no folder at '{folder}'; give --photos a folder of photos")
        folder = folder.resolve()
        return cls(folder, sources.build("folder", path=str(folder)))

    def caption(self, model: VisionLanguageModel, output: Path) -> list[tuple[Path, str]]:
        """Caption all photos that can be read, and write `image` and `caption` of each as JSON lines."""
        said: list[tuple[Path, str]] = []
        for start in track(range(0, len(self.source), GROUP), "captions of your photos"):
            read = list(filter(None, map(self._read, range(start, min(start + GROUP, len(self.source))))))
            if read:
                tiles = cut_all([pixels for _, pixels in read], model.frontend.strategy)
                texts = model.generate(tiles, **GREEDY)
                said += [(path, text) for (path, _), text in zip(read, texts, strict=True)]
        lines = (json.dumps({"image": str(path), "caption": text}) + "\n" for path, text in said)
        output.write_text("".join(lines), encoding="utf-8")
        return said

    def _read(self, index: int) -> tuple[Path, Tensor] | None:
        try:
            image = only_picture(self.source[index])
            return Path(str(image)), read_image(image)
        except BadSample:
            return None

    def index(self, model: ImageTextModel, checkpoint: Path, gallery: Path) -> int:
        """Index the photos into a gallery, or bring it up to date; returns how many it holds.

        Raises:
            UsageError: the gallery was made by another model, or it cannot be written.
        """
        embedder = as_embedder(model)
        made = embedder.fingerprint()
        if (gallery / MANIFEST).exists():
            opened = Gallery.open(gallery)
            opened.check(made, str(checkpoint))
        else:
            gallery.mkdir(parents=True, exist_ok=True)
            sizes = {"queries": embedder.rows, "width": embedder.width}
            opened = Gallery.create(
                gallery, "lance", fingerprint=made, checkpoint=str(checkpoint.resolve()), features=None, **sizes
            )
        choice = {"name": "folder", "path": str(self.folder)}
        known = opened.sources()
        if choice not in known:
            opened.about["sources"].append(choice)
            opened.save()
        update(opened, model, self.source, opened.sources().index(choice))
        return len(opened.store)
