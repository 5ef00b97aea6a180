"""Stage two: train the Q-Former of stage one and an FC projection with a frozen LLM (BLIP-2, section 3.3)."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qformer import distributed, resolution
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.weights import load_stage_one, load_text_path, start_from
from qformer.data import sources
from qformer.data.held_out import HeldOut
from qformer.data.loader import Batches
from qformer.data.texts import answers_of, clean_question
from qformer.evaluation.vqa import mean_accuracy
from qformer.figures import curves as drawing
from qformer.llm.abilities import require_training
from qformer.llm.rows import positions, word_spread
from qformer.model.assembly import build_vision_language
from qformer.model.connectors import QFormerConnector
from qformer.progress import console
from qformer.resolution import Limited
from qformer.stages.features import StoredGroups, prepare, validation_data
from qformer.stages.inherit import inherit, text_path, with_text_sizes
from qformer.stages.loop import fit
from qformer.stages.stage1 import keep_tokens, mean_losses
from qformer.stages.warm_projection import start_at_words
from qformer.template import AUTO, NONE
from qformer.types import BadSample, Tiles, UsageError
from qformer.videos.rows import glance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from qformer.checkpoints.folder import Checkpoint
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.resolution.base import ResolutionStrategy
    from qformer.schema import Config

SHOWN = 5
PICTURE = (640, 480)  # image size for which a text must fit after the visual tokens


def train(config: Config, trust: bool = False) -> Path:
    """Run or resume stage two and return the last checkpoint.

    The settings of the bridge (image encoder, Q-Former sizes, whether it reads questions) come from `init`, and so does
    the resolution unless it is set. `image_size` and `precision` of the image encoder may change. A `module:Class` in
    `init` needs `trust`, unless the configuration names it too.

    Raises:
        UsageError: the data, the towers or `init` cannot be used, the language model passes no gradients to a bridge,
            or it is quantized and `train.fsdp` is set.
    """
    if config.train.fsdp and config.llm is not None and config.llm.quantize != "none":
        raise UsageError(
            f"train.fsdp cannot shard a language model in {config.llm.quantize}; leave train.fsdp or llm.quantize out"
        )
    start = None if config.init is None else checkpoint.read(config.init, trust)
    if start is not None:
        config = inherit(config, start.config)
        if config.start == "warm" and start.config.stage == "stage2":
            raise UsageError(
                f"start: warm would replace the projection that init '{config.init}' has trained; leave start out, or "
                "give init a run of stage1"
            )
    source = sources.for_run(config.data.train, config.run)
    strategy = resolution.chosen(config.resolution, config.limits)
    held = validation_data(config)
    on_gpu = torch.cuda.is_available() and not config.train.fsdp  # FSDP moves layers one by one
    device = f"cuda:{distributed.local_rank()}" if on_gpu else "cpu"
    encoder, store, held = prepare(config, source, strategy, held)
    text = None if config.question is None else text_path(config.question, start)
    if text is not None:
        config = with_text_sizes(config, text.config)
    config = remembered(config)
    model, config = build_vision_language(config, device, encoder, tokenizer_of=None if text is None else text.path)
    require_training(model.llm)
    require_room(model)
    if checkpoint.newest(Path(config.run)) is None:
        if start is not None:
            begin(model, start, config)
        if text is not None and text is not start:
            load_text_path(model, text)
        if config.start == "warm" and store is not None:
            start_at_words(model, source, store)
            config = with_scale(config, 1.0)  # the words' own
        config = measured(model, config, start)
    batches = Batches(source, within_room(model, strategy), config.data, config.seed, store)
    evaluate = None if held is None else Validation(readable(held, model, config), Path(config.run))
    words = model.connector.tokenizer
    return fit(model, batches, config, evaluate, None if words is None else words.save_pretrained)


def require_room(model: VisionLanguageModel) -> None:
    """Check that `llm.max_tokens` leaves room for a word, and that a text of this length fits after an image.

    Raises:
        UsageError: it is too small or too large.
    """
    llm, most, around = model.llm, model.max_tokens, model.llm.chat.length
    if most < (least := len(llm.start) + 2):
        raise UsageError(
            f"llm.max_tokens {most} leaves no room for a word of this language model; give {least} or more"
        )
    visual = model.count_tokens(model.frontend.strategy.plan(*PICTURE)) + around
    limit = positions(llm.model)
    if limit is not None and most > (room := max(limit - visual, 0)):
        raise UsageError(
            f"llm.max_tokens is {most}, but after {visual} visual tokens{' and those of llm.template' * bool(around)} "
            f"this {llm.model.config.model_type} model has "
            f"{room} of its {limit} positions left; lower llm.max_tokens"
            + ("" if room >= least else ", or use fewer queries or tiles")
        )


def within_room(model: VisionLanguageModel, strategy: ResolutionStrategy) -> ResolutionStrategy:
    """Let a strategy refuse what leaves no room for a text of `llm.max_tokens`, within the limits that it has."""
    room = model.room(model.max_tokens)
    if room.most is None:
        return strategy
    if room.reduced_by and distributed.rank() == 0:  # a strategy whose plans may exceed it
        own = "; your limits hold as well" if isinstance(strategy, Limited) else ""
        console.print(
            f"rows of more than {room.most:,} visual tokens are skipped, for this {room.model} model has no positions "
            f"for more in front of llm.max_tokens {room.text}{own}",
            soft_wrap=True,
        )
    return Limited(strategy, check=room)


def readable(held: HeldOut, model: VisionLanguageModel, config: Config) -> HeldOut:
    """Leave out held-out samples that the language model has no positions for, and tell how many.

    Raises:
        UsageError: it has none for any of them.
    """
    bad: dict[int, BadSample] = {}
    room_before = cache(model.room)
    plans = [plan for tiles in held.groups for plan in tiles.plans]
    for number, (sample, plan) in enumerate(zip(held.samples, plans, strict=True)):
        question = clean_question(sample.question or "") if held.asks else None
        try:
            room_before(model.longest_text(question))(plan)
        except BadSample as refusal:
            bad[number] = refusal
    if not bad:
        return held
    first = next(iter(bad.values()))
    if len(bad) == len(held):
        raise UsageError(f"none of the {len(held)} validation samples fits the language model: {first.detail}")
    if distributed.rank() == 0:
        told = f"{len(bad)} of {len(held)} validation samples are left out, the first of them: {first.detail}"
        console.print(told, soft_wrap=True, markup=False)
    return without(held, bad, config.data.batch)


def without(held: HeldOut, bad: Mapping[int, BadSample], batch: int) -> HeldOut:
    """Leave out samples by their numbers; the others are put into groups of `batch` again."""
    kept = [number for number in range(len(held)) if number not in bad]
    samples = [held.samples[number] for number in kept]
    captions = [held.captions[number] for number in kept]
    skipped = [{"index": held.samples[n].key, "kind": one.kind, "detail": one.detail} for n, one in bad.items()]
    groups: Sequence[Tiles]
    if isinstance(held.groups, StoredGroups):
        groups = dataclasses.replace(held.groups, samples=samples, numbers=[held.groups.numbers[n] for n in kept])
    else:
        rows = [tiles[row : row + 1] for tiles in held.groups for row in range(len(tiles))]
        groups = [Tiles.join([rows[n] for n in kept[at : at + batch]]) for at in range(0, len(kept), batch)]
    return HeldOut(groups, captions, samples, held.skipped + skipped)


def begin(model: VisionLanguageModel, start: Checkpoint, config: Config) -> None:
    """Load the weights of a run of either stage; print a warning if its bridge was trained for another language model.

    Raises:
        UsageError: its tensors do not fit, or its language model has adapters and the configuration has none.
    """
    if start.config.stage == "stage1":
        load_stage_one(model, start)
        return
    assert start.config.llm is not None
    assert config.llm is not None
    theirs, mine = start.config.llm.path, config.llm.path
    if start.config.llm.lora is not None and config.llm.lora is None:
        raise UsageError(
            f"init '{config.init}' was trained with adapters in its language model (llm.lora of rank "
            f"{start.config.llm.lora.rank}), but this configuration has none; copy llm.lora from there, or merge the "
            "adapters with qformer convert and set llm.path to the converted language model"
        )
    warning = ""
    if theirs != mine and not (Path(theirs).exists() and Path(mine).exists() and Path(theirs).samefile(mine)):
        what = f"'{theirs}'"
        if merged := start.meta.get(checkpoint.MERGED):
            what += f", which is '{merged}' with its adapters merged"
        warning = f"init '{config.init}' was trained with the language model {what}, but this run uses '{mine}'"
        if distributed.rank() == 0:
            console.print(f"{warning}; if they differ, the bridge must adapt", soft_wrap=True, markup=False)
    try:
        start_from(model, start)
    except UsageError as error:
        raise UsageError(f"{error}; {warning}" if warning else str(error)) from error


def remembered(config: Config) -> Config:
    """Take what `auto` meant when the run began from its newest checkpoint: a template can depend on the date."""
    assert config.llm is not None
    for folder in reversed(checkpoint.complete(Path(config.run))):
        try:
            saved = checkpoint.read_config(folder).llm
        except checkpoint.Damaged:
            continue
        changes: dict[str, Any] = {}
        if saved is not None and config.llm.template == AUTO and saved.template != NONE:
            changes["template"] = saved.template
        if saved is not None and config.llm.visual_scale == AUTO:
            changes["visual_scale"] = saved.visual_scale
        return config.model_copy(update={"llm": config.llm.model_copy(update=changes)})
    return config


def measured(model: VisionLanguageModel, config: Config, start: Checkpoint | None) -> Config:
    """Make new visual tokens as large as words where `llm.visual_scale` is `auto`, and write the factor down.

    A projection that was trained before stays as it is.
    """
    llm, connector = config.llm, model.connector
    assert llm is not None
    if distributed.rank() == 0 and model.llm.chat:
        console.print(f"llm.template: {llm.template!r}", soft_wrap=True, markup=False)
    elif distributed.rank() == 0 and model.llm.tokenizer.chat_template:
        console.print(f"the tokenizer of '{llm.path}' has a chat template; llm.template={AUTO} would use it")
    if llm.visual_scale != AUTO or not isinstance(connector, QFormerConnector):
        return config
    if start is not None and start.config.llm is not None:
        scale = cast("float", start.config.llm.visual_scale)
    else:
        words, visual = word_spread(model.llm.model, len(model.llm.tokenizer)), connector.spread()
        scale = float(f"{words / visual:.4g}")
        connector.rescale(scale)
        if distributed.rank() == 0:
            console.print(f"llm.visual_scale: {scale:g} (words are {words:.3g}, visual tokens were {visual:.3g})")
    return with_scale(config, scale)


def with_scale(config: Config, scale: float) -> Config:
    """Write down the factor by which the projection was made larger when the run began."""
    assert config.llm is not None
    return config.model_copy(update={"llm": config.llm.model_copy(update={"visual_scale": scale})})


class Validation:
    """Held-out loss; with questions also the accuracy of all answers (`qformer.evaluation.vqa.mean_accuracy`).

    Captions or answers of the first images are written to `captions.jsonl` and `captions.png` of the run.
    """

    def __init__(self, held: HeldOut, folder: Path) -> None:
        """Take the data and the folder of the run."""
        self.held = held
        self.folder = folder
        self.shown = [glance(sample.image) for sample in held.samples[: min(SHOWN, len(held.groups[0]))]]

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        bridge = cast("VisionLanguageModel", model)
        self.held = keep_tokens(self.held, bridge.frontend)
        tiles, measured = self.held.groups[0][:SHOWN], {}
        if self.held.asks:
            texts = self._answers(bridge)
            truth = [answers_of(sample) for sample in self.held.samples]
            measured["accuracy"] = mean_accuracy(texts, truth)
            texts = [" ".join(pair) for pair in zip(self.held.questions(0, SHOWN), texts, strict=False)]
        else:
            texts = bridge.generate(tiles)
        shown = [
            {"step": step, "key": sample.key, "caption": caption, "truth": captions[0]}
            for sample, caption, captions in zip(
                self.held.samples[: len(tiles)], texts, self.held.captions, strict=False
            )
        ]
        if distributed.rank() == 0:
            with (self.folder / "captions.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in shown)
            drawing.captions(self.folder / "captions.png", self.shown, shown)
        return mean_losses(bridge, self.held) | measured

    def _answers(self, bridge: VisionLanguageModel) -> list[str]:
        answers: list[str] = []
        for tiles in self.held.groups:
            answers += bridge.answer(tiles, self.held.questions(len(answers), len(answers) + len(tiles)))
        return answers
