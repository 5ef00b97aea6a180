"""A model for lmms-eval (`--model qformer`), which finds it through the entry point group `lmms_eval.models`.

Written to the interface of lmms-eval 0.7.3: `lmms_eval.api.model.lmms` and `lmms_eval.models.registry_v2`. It imports
this module where both are installed; nothing of ours does.

    lmms-eval --model qformer --model_args pretrained=runs/stage2,quantize=int8 --tasks TASK --batch_size 8
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lmms_eval.api.model import lmms

from qformer.lookup import nearest
from qformer.model.decoding import GenerateConfig
from qformer.model.llm import IGNORE
from qformer.model.loading import load_vision_language
from qformer.model.prompts import vqa_preset
from qformer.types import Tiles, UsageError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "qformer"
PLACE = "<image>"  # where a task puts its image, which is always in front here
#: Settings of tasks that are ours by another name, or that mean nothing here.
RENAMED = {"max_gen_toks": "max_new_tokens"}
WITHOUT_MEANING = ("until", "image_aspect_ratio", "image_sizes", "use_cache", "top_k")
INSTRUCTION = "Answer the question using a single word or phrase."  # that most tasks end with, for chat models
WORDINGS = ("paper", "plain", "caption")
Request = tuple[str, dict[str, Any], list[Any]]  # context, settings, images


def manifest() -> Any:
    """What the entry point gives lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.{Harness.__name__}")


class Harness(lmms):
    """A stage-two checkpoint, or a BLIP-2 of another form, under test.

    What a task asks is worded as BLIP-2 is asked (`prompt=paper`), left as it is (`plain`), or ignored for the prompt
    of the model's own captions (`caption`). Only the first image of a document is seen; `ignored_images` counts others.
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
        """`pretrained` and `trust` are as of `qformer.load`. `max_batch_size`, handed to every model, has no use here.

        Raises:
            UsageError: no such checkpoint, one without a language model, or another prompt or batch size.
        """
        super().__init__()
        if prompt not in WORDINGS:
            raise UsageError(f"prompt is '{prompt}'; {nearest(prompt, WORDINGS)}")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise UsageError(f"batch_size is '{batch_size}'; give a number from 1 on")
        self.model = load_vision_language(pretrained, device, quantize, trust)
        self.batch_size = int(batch_size)
        self.prompt = prompt
        self.ignored_images = 0

    @property
    def device(self) -> torch.device:
        return self.model.frontend.norm.weight.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The continuation of each request, args (context, settings, doc_to_visual, doc_id, task, split)."""
        asked = []
        for request in requests:
            context, settings, to_images, number, task, split = request.args
            asked.append((context, settings, to_images(self.task_dict[task][split][number])))
        return self._generate(asked)

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """What was said in each round; args have doc_to_text, which makes the next round, in front of doc_id.

        It is called with the document, `previous_output`, `round_idx` and `previous_round_info`, and returns images,
        context, whether that is all, what was said so far, and what it wants to be given next time.
        """
        rounds = []
        for request in requests:
            context, settings, to_images, to_text, number, task, split = request.args
            document = self.task_dict[task][split][number]
            said: list[str] = []
            images, info = to_images(document), None
            while True:
                said = [*said, self._generate([(context, settings, images)])[0]]
                images, context, is_last, said, info = to_text(
                    document, previous_output=said, round_idx=len(said), previous_round_info=info
                )
                if is_last:
                    break
            rounds.append(list(said))
        return rounds

    @torch.no_grad()
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log probability of each continuation and whether greedy search would write it.

        Args are (context, continuation or doc_to_target, doc_to_visual, doc_id, task, split).
        """
        scored: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self.batch_size):
            questions, contexts, targets, images = [], [], [], []
            for request in requests[start : start + self.batch_size]:
                context, target, to_images, number, task, split = request.args
                document = self.task_dict[task][split][number]
                questions.append(self._question(context))
                contexts.append(self._worded(context))
                targets.append(target if isinstance(target, str) else target(document))
                images.append(to_images(document))
            scored += self._score(self._first(images), questions, contexts, targets)
        return scored

    def _score(
        self, tiles: Tiles, questions: list[str], contexts: list[str], targets: list[str]
    ) -> list[tuple[float, bool]]:
        llm, longest = self.model.llm, 1 << 30
        visual = self.model.prefix(tiles, questions)
        logits, wanted = llm.predict(*visual, [text.strip() for text in targets], contexts, longest)
        # The end of the text, which is the last target of each row, is no part of the continuation.
        last = wanted.ne(IGNORE).long().cumsum(dim=1).argmax(dim=1, keepdim=True)
        wanted = wanted.scatter(1, last, IGNORE)
        losses = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="none")
        greedy = (logits.argmax(dim=2) == wanted) | wanted.eq(IGNORE)  # (B, T)
        sums: Tensor = -losses.view_as(wanted).sum(dim=1)
        return list(zip(sums.tolist(), greedy.all(dim=1).tolist(), strict=True))

    @torch.no_grad()
    def _generate(self, asked: list[Request]) -> list[str]:
        """In batches of neighbours that ask for the same settings."""
        said: list[str] = []
        for _, group in groupby(asked, key=lambda request: repr(request[1])):
            same = list(group)
            for start in range(0, len(same), self.batch_size):
                batch = same[start : start + self.batch_size]
                settings = batch[0][1]
                tiles = self._first([images for _, _, images in batch])
                visual = self.model.prefix(tiles, [self._question(context) for context, _, _ in batch])
                prompts = [self._worded(context) for context, _, _ in batch]
                options = self._fitting(_options(settings), visual[0].shape[1], prompts)
                texts = self.model.llm.decode(self.model.llm.generate(*visual, prompts, **options))
                said += [_until(text, settings.get("until")) for text in texts]
        return said

    def _fitting(self, options: dict[str, Any], visual: int, prompts: list[str]) -> dict[str, Any]:
        """The options with no more new tokens than fit behind so many visual ones: tasks ask for thousands."""
        llm = self.model.llm
        room = llm.room(visual, new=0)
        if room is None or llm.family != "causal":
            return options
        room -= max(map(llm.count_tokens, prompts))
        asked = options.get("max_new_tokens", GenerateConfig.max_new_tokens)
        return options | {"max_new_tokens": max(1, min(asked, room))}

    def _first(self, images: list[list[Any]]) -> Tiles:
        """The first image of each document.

        Raises:
            UsageError: a document without one.
        """
        if not all(images):
            raise UsageError("a document of this task has no image, and the model answers about images only")
        self.ignored_images += sum(len(own) - 1 for own in images)
        return self.model.frontend.tiles([own[0] for own in images])

    def _question(self, context: str) -> str:
        """What a Q-Former that reads questions is given; others do not look at it."""
        if self.prompt == "caption":
            return ""
        return context.replace(PLACE, "").strip().removesuffix(INSTRUCTION).strip()

    def _worded(self, context: str) -> str:
        if self.prompt == "caption":
            return self.model.prompt
        context = self._question(context) if self.prompt == "paper" else context.replace(PLACE, "").strip()
        if self.prompt == "plain" or not context:
            return context
        return vqa_preset("paper", self.model.llm.family).template.format(context)


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as ours; a temperature of 0 is greedy, and None is the default.

    Raises:
        UsageError: one that is not known.
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
    """The text up to the first of the strings that end it."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.partition(stop)[0]
    return text.strip()
