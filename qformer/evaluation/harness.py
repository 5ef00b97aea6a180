"""A model for lmms-eval (`--model qformer`), registered by the entry point group `lmms_eval.models`.

It implements the interface of lmms-eval 0.7.3: `lmms_eval.api.model.lmms` and `lmms_eval.models.registry_v2`. Only
lmms-eval imports this module, if both are installed.

    lmms-eval --model qformer --model_args pretrained=runs/stage2,quantize=int8 --tasks TASK --batch_size 8
"""

from __future__ import annotations

import math
import re
import warnings
from bisect import bisect_left
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.model import lmms

from qformer.checkpoints.loading import load_vision_language
from qformer.connectors.base import Prefix
from qformer.evaluation.choice import answer_losses
from qformer.llm.decoding import GenerateConfig
from qformer.llm.prompts import vqa_preset
from qformer.llm.rows import positions
from qformer.lookup import nearest
from qformer.types import BadSample, Tiles, UsageError
from qformer.videos import read_shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NAME = "qformer"
PLACE = "<image>"  # marks the image in the text of a task; here the image always comes first
#: Settings of tasks that have another name here, or no meaning.
RENAMED = {"max_gen_toks": "max_new_tokens"}
WITHOUT_MEANING = ("until", "image_aspect_ratio", "image_sizes", "use_cache", "top_k")
INSTRUCTION = "Answer the question using a single word or phrase."  # the end of most tasks, for chat models
WORDINGS = ("paper", "plain", "caption")
ROOM = 32  # tokens kept free for an answer; a longer context is cut
Request = tuple[str, dict[str, Any], "Callable[[], Any]"]  # context, settings, a function that loads the images


def manifest() -> Any:
    """Make the manifest that the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.{Harness.__name__}")


@dataclass
class Shortfalls:
    """Numbers of requests that could not be handled as given.

    Attributes:
        imageless: documents without a picture or clip that can be read, answered from their text.
        cut: contexts that lost words at their start, since they exceeded the positions of the language model.
        unanswered: requests that are empty or do not fit at all; they get an empty text, or a score of -inf.
    """

    imageless: int = 0
    cut: int = 0
    unanswered: int = 0


class Harness(lmms):
    """A stage-two checkpoint, or a BLIP-2 of another form, under test.

    The text of a task is worded as in BLIP-2 (`prompt=paper`), used unchanged (`plain`), or replaced by the model's own
    caption prompt (`caption`). All pictures and clips of a document are shown in its row; `ignored_images` counts those
    that cannot be read beside others. No document stops a benchmark: problems are counted in `shortfalls` and reported
    in a warning.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        quantize: str | None = None,
        prompt: str = "paper",
        max_batch_size: int | None = None,
        trust: bool = False,
    ) -> None:
        """Load a checkpoint; for `pretrained` and `trust` see `qformer.load`.

        `max_batch_size`, which lmms-eval passes to every model, is ignored.

        Raises:
            UsageError: the checkpoint does not exist or has no language model, or an unknown prompt or batch size.
        """
        super().__init__()
        if prompt not in WORDINGS:
            raise UsageError(f"prompt is '{prompt}'; {nearest(prompt, WORDINGS)}")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise UsageError(f"batch_size is '{batch_size}'; give a number of at least 1")
        self.model = load_vision_language(pretrained, device, quantize, trust)
        self.batch_size = int(batch_size)
        self.prompt = prompt
        self.ignored_images = 0
        self.shortfalls, self._last_reported = Shortfalls(), Shortfalls()

    @property
    def device(self) -> torch.device:
        return self.model.frontend.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Generate the continuation of each request; args are context, settings, doc_to_visual, doc_id, task, split."""
        parsed = []
        for request in requests:
            context, settings, to_images, number, task, split = request.args
            parsed.append((context, settings, self._images_of(to_images, task, split, number)))
        texts = self._generate(parsed)
        self._warn()
        return texts

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """Generate the output of each round; args also have doc_to_text, before doc_id, which makes the next round.

        It is called with the document, `previous_output`, `round_idx` and `previous_round_info`. It returns the images
        (None: those of the previous round), the context, True after the last round, all outputs so far, and the
        `previous_round_info` of the next call.
        """
        rounds = []
        for request in requests:
            context, settings, to_images, to_text, number, task, split = request.args
            document = self.task_dict[task][split][number]
            outputs: list[str] = []
            images, info = self._images_of(to_images, task, split, number)(), None
            while True:
                outputs = [*outputs, self._generate([(context, settings, partial(_flat, images))])[0]]
                newer, context, is_last, outputs, info = to_text(
                    document, previous_output=outputs, round_idx=len(outputs), previous_round_info=info
                )
                images = images if newer is None else newer
                if is_last:
                    break
            rounds.append(list(outputs))
        self._warn()
        return rounds

    @torch.no_grad()
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Compute the log probability of each continuation, and True if greedy search would generate it.

        The args are context, continuation or doc_to_target, doc_to_visual, doc_id, task, split.
        """
        scored: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self.batch_size):
            contexts, targets, images = [], [], []
            for request in requests[start : start + self.batch_size]:
                context, target, to_images, number, task, split = request.args
                contexts.append(context)
                targets.append(
                    (target if isinstance(target, str) else target(self._document(task, split, number))).strip()
                )
                images.append(self._images_of(to_images, task, split, number)())
            scored += self._score(self._visual(images, contexts), contexts, targets)
        self._warn()
        return scored

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def _images_of(self, to_images: Callable[[Any], Any], task: str, split: str, number: int) -> Callable[[], Any]:
        """Make a function that loads the images of a document: all images of a benchmark do not fit in memory."""

        def read() -> Any:
            document = self._document(task, split, number)
            try:
                return to_images(document)
            except (AttributeError, IndexError, KeyError, OSError, TypeError):  # a task that assumes an image
                return None

        return read

    def _score(self, visual: Prefix, contexts: list[str], targets: list[str]) -> list[tuple[float, bool]]:
        """Score each target, one row at a time if the rows do not fit together."""
        llm, longest = self.model.llm, 1 << 30
        limit, prompts = positions(llm.model), []
        for context, target, tokens in zip(contexts, targets, visual.mask.sum(dim=1).tolist(), strict=True):
            needs = llm.count_tokens(target) + 1
            is_too_long = limit is not None and llm.family != "causal" and needs > limit
            room = llm.room(tokens, needs)
            prompts.append(None if is_too_long else self._fitting(context, room))
        scores = [(-math.inf, False)] * len(targets)
        for rows in self._together(visual, prompts, targets):
            answers, before = [targets[row] for row in rows], [prompts[row] or "" for row in rows]
            found = answer_losses(llm, visual.select(rows), answers, before, longest)
            found = found.without_end()  # which is no part of the continuation
            sums: Tensor = -found.losses.sum(dim=1)
            for row, *score in zip(rows, sums.tolist(), found.greedy.all(dim=1).tolist(), strict=True):
                scores[row] = score[0], score[1]
        self.shortfalls.unanswered += prompts.count(None)
        return scores

    def _together(self, visual: Prefix, prompts: list[str | None], targets: list[str]) -> list[list[int]]:
        """Group the rows that are scored at once: all rows, or each one alone if they do not fit together."""
        rows = [row for row, prompt in enumerate(prompts) if prompt is not None]
        llm = self.model.llm
        room = llm.room(visual.embeds.shape[1], 2)
        lengths = [llm.count_tokens(f"{prompts[row]} {targets[row]}") for row in rows]
        fits = room is None or max(lengths, default=0) <= room
        return [rows] if rows and fits else [[row] for row in rows]

    @torch.no_grad()
    def _generate(self, requests: list[Request]) -> list[str]:
        """Generate in batches of adjacent requests with the same settings."""
        texts: list[str] = []
        for _, group in groupby(requests, key=lambda request: repr(request[1])):
            same = list(group)
            options, stops = _options(same[0][1]), same[0][1].get("until")
            for start in range(0, len(same), self.batch_size):
                batch = same[start : start + self.batch_size]
                contexts = [context for context, _, _ in batch]
                visual = self._visual([images() for _, _, images in batch], contexts)
                texts += [_until(text, stops) for text in self._write(visual, contexts, options)]
        return texts

    def _write(self, visual: Prefix, contexts: list[str], options: dict[str, Any]) -> list[str]:
        """Generate a text for each row. Tasks allow thousands of tokens; a row gets as many of them as fit."""
        llm, wanted = self.model.llm, options.get("max_new_tokens", GenerateConfig.max_new_tokens)
        texts, rows_of, prompts = [""] * len(contexts), dict[int, list[int]](), list[str]()
        for row, (context, tokens) in enumerate(zip(contexts, visual.mask.sum(dim=1).tolist(), strict=True)):
            prompt = self._fitting(context, llm.room(tokens, min(wanted, ROOM)))
            prompts.append(prompt or "")
            is_empty = not tokens and not (prompt or "").strip()
            if prompt is None or is_empty:
                self.shortfalls.unanswered += 1
            else:
                rows_of.setdefault(self._new_tokens(wanted, tokens, prompt), []).append(row)
        for new, rows in rows_of.items():
            own = [prompts[row] for row in rows]
            part = visual.select(rows)
            ids = llm.generate(*part, own, **part.placing | options | {"max_new_tokens": new})
            for row, text in zip(rows, llm.decode(ids), strict=True):
                texts[row] = text
        return texts

    def _new_tokens(self, wanted: int, visual: int, prompt: str) -> int:
        """Limit the number of new tokens to the positions that are left."""
        llm = self.model.llm
        limit = positions(llm.model)
        if limit is None:
            return wanted
        # The decoder of an encoder-decoder has separate positions.
        read = visual + llm.chat.length + llm.count_tokens(prompt)
        return min(wanted, limit - (1 if llm.family != "causal" else read))

    def _fitting(self, context: str, room: int | None) -> str | None:
        """Make the prompt of a context, which loses words at its start if it has more than `room` tokens.

        The result is None if not even the empty template fits.
        """
        question, count = self._question(context), self.model.llm.count_tokens
        if room is None or count(self._worded(context)) <= room:
            return self._worded(context)
        text = context.replace(PLACE, "").strip() if self.prompt == "plain" else question
        starts = [*(word.start() for word in re.finditer(r"\S{1,16}", text)), len(text)]  # long words are split
        kept = bisect_left(starts, True, key=lambda start: count(self._worded(text[start:])) <= room)
        if kept == len(starts):
            return None
        self.shortfalls.cut += 1
        return self._worded(text[starts[kept] :])

    def _visual(self, images: list[Any], contexts: list[str]) -> Prefix:
        """Compute the visual prefix of each document, without a token if it has no image."""
        tiles: list[Tiles] = []
        rows = []
        for row, given in enumerate(images):
            own = self._readable(_flat(given))
            try:
                tiles += [self.model.frontend.tiles([own])] if own else []
            except BadSample:
                own = []
            rows += [row] if own else []
        self.shortfalls.imageless += len(images) - len(rows)
        if not rows:
            blank = torch.zeros(len(images), 0, self.model.llm.width, device=self.device)
            return Prefix(blank, torch.zeros(len(images), 0, dtype=torch.bool, device=self.device))
        seen = self.model.prefix(Tiles.join(tiles), [self._question(contexts[row]) for row in rows])
        every = seen.select([rows.index(row) if row in rows else 0 for row in range(len(images))])
        every.mask[[row for row in range(len(images)) if row not in rows]] = False
        return every

    def _readable(self, given: list[Any]) -> list[Any]:
        """The pictures and clips of a document that can be read."""
        found = []
        for one in given:
            with suppress(BadSample):
                found.append(read_shown(one, self.model.frontend.strategy))
        self.ignored_images += len(given) - len(found) if found else 0
        return found

    def _warn(self) -> None:
        """Warn about the shortfalls so far, if there are new ones since the last warning."""
        imageless, cut, unanswered = astuple(self.shortfalls)
        parts = [
            f"{count} {what}"
            for count, what in (
                (imageless, "had no readable image and were answered from their text alone"),
                (cut, "lost words at the start of their context, which exceeded the positions of the language model"),
                (unanswered, "were not answered, since they are empty or do not fit"),
            )
            if count
        ]
        if parts and self.shortfalls != self._last_reported:
            warnings.warn(f"of the requests so far, {'; '.join(parts)}", stacklevel=3)
            self._last_reported = Shortfalls(imageless, cut, unanswered)

    def _question(self, context: str) -> str:
        """Extract the question for a Q-Former that reads questions; others ignore it."""
        if self.prompt == "caption":
            return ""
        return context.replace(PLACE, "").strip().removesuffix(INSTRUCTION).strip()

    def _worded(self, context: str) -> str:
        if self.prompt == "caption":
            return self.model.prompt
        context = self._question(context) if self.prompt == "paper" else context.replace(PLACE, "").strip()
        if self.prompt == "plain" or not context:
            return context
        return vqa_preset("paper", self.model.llm.wording).template.format(context)


def _flat(images: Any) -> list[Any]:
    """Flatten the images of a document, which can be None, a single one, or nested lists with gaps."""
    if isinstance(images, list | tuple):
        return [image for part in images for image in _flat(part)]
    return [] if images is None else [images]


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert the settings of a task to our options; a temperature of 0 means greedy, None means the default.

    Raises:
        UsageError: a setting is unknown.
    """
    given = {RENAMED.get(key, key): value for key, value in settings.items() if key not in WITHOUT_MEANING}
    given = {"num_beams": 1} | {key: value for key, value in given.items() if value is not None}
    if not given.get("do_sample", given.get("temperature", 0) > 0) or not given.get("temperature", 1):
        given = {key: value for key, value in given.items() if key not in ("do_sample", "temperature", "top_p")}
    else:
        given["do_sample"] = True
    if given["num_beams"] == 1:
        given.pop("length_penalty", None)
    GenerateConfig.of(given)
    return given


def _until(text: str, stops: str | list[str] | None) -> str:
    """Cut a text at the first of its stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.partition(stop)[0]
    return text.strip()
