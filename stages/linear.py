"""The linear map of the frozen towers beside the numbers of a bridge: in `qformer eval`, and at the start of a run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qformer import distributed
from qformer.alignment import pooled
from qformer.checkpoints import folder as checkpoint
from qformer.data import sources
from qformer.data.features import MANIFEST, FeatureStore
from qformer.evaluation.linear import LINEAR, SentenceTower, collect, read_sentences, solve
from qformer.files.records import LINEAR_MAP, LinearMapNumbers, read_object, replace_text
from qformer.progress import console
from qformer.stages.features import describe_contents
from qformer.stages.loop import shards
from qformer.stages.warm_start import check_warm_start, warm_start
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.data.base import Source
    from qformer.data.held_out import HeldOut
    from qformer.evaluation.linear import LinearMap
    from qformer.model.image_text import ImageTextModel
    from qformer.schema import Config
    from qformer.stages.run import Run

NONE = "No linear map of the frozen towers stands beside these numbers"


def of_checkpoint(path: str, model: ImageTextModel, trust: bool = False, show: bool = False) -> LinearMap:
    """Solve the linear map for a checkpoint of ours whose training features are at hand.

    Args:
        path, trust: of the checkpoint, as in `qformer.load`, which gave `model`.
        show: draw progress bars.

    Raises:
        UsageError: they are not, with the reason.
    """
    if checkpoint.is_foreign(path):
        raise UsageError("the checkpoint is not a run of ours, whose data.features would hold its training photos")
    config = checkpoint.read_config(path, trust)
    if config.data.features is None:
        raise UsageError("it needs a store of image tokens; train with data.features to have one")
    folder = Path(config.data.features.path)
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"the store of training features '{folder}' is not here; run from where it is")
    source = sources.for_run(config.data.train, config.run if Path(config.run).is_dir() else None)
    store = FeatureStore.read_manifest(folder)
    store.check(describe_contents(config, len(source), model.frontend.strategy, model.frontend.encoder))
    if missing := store.missing():
        raise UsageError(
            f"{len(missing)} of {len(store)} shards of the store '{folder}' are not filled; fill them with qformer "
            "features"
        )
    return solve(SentenceTower.read(model, config.text.bert), store, source, config.loss.embed_width, show=show)


def start_warm(model: ImageTextModel, source: Source, store: FeatureStore) -> None:
    """Begin stage one at the linear maps between its frozen towers (`qformer.stages.warm_start`).

    Raises:
        UsageError: the sizes of the Q-Former do not allow it, or the store is damaged.
    """
    check_warm_start(model)
    training = model.training
    model.eval()
    pairs = collect(model.frontend, store, source, adapted=True, show=distributed.rank() == 0)
    read = partial(read_sentences, model, model.read_texts, model.qformer.config.hidden_size)
    warm_start(model, pairs.pools, pairs.mean(read), pairs.first)
    model.train(training)
    console.print(f"the bridge starts at the linear map of its towers, solved on {len(pairs.captions):,} photos")


def announce(run: Run, held: HeldOut, source: Source, store: FeatureStore) -> None:
    """Print what the linear map reaches on the held-out data of a run, once solved and kept in its folder.

    Nothing depends on it: where it cannot be solved, a sentence says why, and training goes on.
    """
    if distributed.rank() > 0:
        return
    config, file = run.config, run.folder / LINEAR_MAP
    made = _made(config, store)
    try:
        if shards(config):
            raise UsageError("the image encoder is shared out over the processes; qformer eval measures it")
        found = _kept(file, made)
        if found is None:
            found = _measure(cast("ImageTextModel", run.inner), config, held, source, store) | {"made": made}
            replace_text(file, json.dumps(found, indent=1))
    except UsageError as error:
        console.print(f"{NONE}: {error}", soft_wrap=True)
        return
    except OSError as error:
        console.print(f"'{file}' could not be written ({error})", soft_wrap=True)
        return
    first, tenth = (" / ".join(f"{100 * found[LINEAR][f'{way}_r{n}']:.1f}" for way in ("i2t", "t2i")) for n in (1, 10))
    console.print(
        f"a linear map of the frozen towers, solved on {found['photos']:,} training photos, reaches R@1 {first} and "
        f"R@10 {tenth} on the {len(held):,} held-out ones (image to text / text to image)",
        soft_wrap=True,
    )


def _made(config: Config, store: FeatureStore) -> dict[str, Any]:
    """Collect what the numbers depend on, in the form in which it is read back."""
    made = {
        "store": store.about["made"],
        "text": config.text.model_dump(),
        "width": config.loss.embed_width,
        "train": config.data.train.model_dump(),
        "validation": [config.data.validation and config.data.validation.model_dump(), config.data.validation_size],
    }
    return json.loads(json.dumps(made, default=str))


def _kept(file: Path, made: dict[str, Any]) -> dict[str, Any] | None:
    """Read the numbers of an earlier start; None if there are none, or they are of something else."""
    if not file.is_file():
        return None
    try:
        found = read_object(file, LinearMapNumbers)
    except UsageError:
        return None
    return found if found["made"] == made else None


def _measure(
    model: ImageTextModel, config: Config, held: HeldOut, source: Source, store: FeatureStore
) -> dict[str, Any]:
    solved = solve(SentenceTower.read(model, config.text.bert), store, source, config.loss.embed_width)
    with torch.no_grad():
        images = torch.cat([pooled(model.frontend.encode_tiles(tiles)).cpu() for tiles in held.groups])
    return {"photos": solved.photos, "texts": solved.texts} | solved.measure(images, held.captions)
