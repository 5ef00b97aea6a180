"""Logic of the page as plain functions, independent of Gradio.

Pictures arrive as files that a visitor sent, texts and numbers as arbitrary values: everything is checked here, by
`qformer.demo.limits`, and unusable input raises a `UsageError` of one sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.loading import load
from qformer.data.texts import clean_question
from qformer.demo.limits import MAX_CONTEXT, MAX_QUESTION, check_number, check_text, kind
from qformer.demo.shown import places, row_of
from qformer.images import photos
from qformer.llm.decoding import GenerateConfig
from qformer.llm.prompts import compose, wording
from qformer.lookup import find
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.retrieval import places as kept
from qformer.retrieval.search import Retriever
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Generator

    from qformer.types import Tiles

    Turn = tuple[str, str]  # a question and its answer

MOST_TURNS = 50  # turns that are read; of these, the ones that do not fit the model are dropped
#: Presets of the page: label, and row of `qformer.llm.prompts.TASKS`.
PRESETS = {
    "Short answer": "vqa",
    "Whole sentences": "dialogue",
    "Knowledge": "knowledge",
    "Reasoning, step by step": "reasoning",
    "Long text": "writing",
}
#: Tasks whose questions are cleaned as in training; others keep their punctuation and capitals.
CLEANED = ("vqa", "dialogue")
METHODS = ("beams", "greedy", "nucleus")
NO_ASKING = (
    "This page runs a checkpoint of stage one, which has no language model; start it with one of stage two, such as "
    "'qformer demo runs/quickstart/opt', to ask questions and to write captions."
)
NO_MATCHING = (
    "Matching needs the heads of stage one, which a checkpoint of stage two does not contain; start the page with "
    "--stage1 and the run that it was trained from."
)
NO_GALLERY = (
    "There is no gallery to search yet; make one with 'qformer index CKPT IMAGES -o gallery', and start the page with "
    "--index gallery."
)


@dataclass
class Models:
    """Models of a page: one of each stage, if available, and a gallery.

    Attributes:
        name: displayed name of the checkpoint. quantized: bits of the language model, if not as it was trained.
        of_scenes: it was trained on drawn scenes.
    """

    name: str
    asking: VisionLanguageModel | None = None
    matching: ImageTextModel | None = None
    retriever: Retriever | None = None
    quantized: str = ""
    of_scenes: bool = False

    @property
    def looking(self) -> VisionLanguageModel | ImageTextModel:
        """Model whose queries the tab Look shows: that of stage two, if there is one."""
        found = self.asking or self.matching
        assert found is not None, "a page has at least one model"
        return found


def load_models(
    path: str,
    stage1: str | None = None,
    index: Path | str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    trust: bool = False,
) -> Models:
    """Load the models of a page.

    Args:
        path: checkpoint of either stage, as `qformer.load` takes it.
        stage1: checkpoint of stage one to use with one of stage two; by default the run that its configuration names
            as `init`, if that exists.
        trust: let checkpoints and the gallery run the code, and call the addresses, that they name.

    Raises:
        UsageError: a checkpoint that cannot be loaded or is of the wrong stage, or a gallery of another model.
    """
    name = "/".join(Path(path).parts[-2:]) if Path(path).exists() else path  # visitors need not know the full path
    first = load(path, device, quantize=quantize, trust=trust)
    if isinstance(first, ImageTextModel):
        if stage1 is not None:
            raise UsageError(f"'{path}' is a checkpoint of stage one; omit --stage1, or give a checkpoint of stage two")
        models, source = Models(name, matching=first), path
    else:
        source = stage1 or _started_from(path) or ""
        models = Models(name, asking=first)
        if source:
            second = load(source, device, trust=trust)
            if not isinstance(second, ImageTextModel):
                raise UsageError(f"'{source}' is a checkpoint of stage two; --stage1 needs one of stage one")
            models.matching = second
    models.quantized, models.of_scenes = quantize or "", of_scenes(path)
    if index is not None:
        if models.matching is None:
            raise UsageError(f"the gallery '{index}' needs the model of stage one that made it; give it with --stage1")
        models.retriever = Retriever(index, models.matching, source, trust)
        if not len(models.retriever.gallery.store):
            raise UsageError(f"the gallery '{index}' has no images; add some with 'qformer index'")
    return models


def _started_from(path: str) -> str | None:
    """Stage-one run from which a checkpoint of ours was trained, if it still exists."""
    if checkpoint.is_foreign(path):
        return None
    start = checkpoint.read(path).config.init
    try:
        return start if start and checkpoint.read(start).config.stage == "stage1" else None
    except UsageError:
        return None


def of_scenes(path: str) -> bool:
    """Check whether a checkpoint was trained on drawn scenes, so that these are good examples for it."""
    return not checkpoint.is_foreign(path) and checkpoint.read(path).config.data.train.name == "scenes"


#: Smallest and largest value of each option of `Decoding`, and whether it is a whole number.
LIMITS = {
    "beams": (1, 10, True),
    "top_p": (0.01, 1, False),
    "temperature": (0.05, 5, False),
    "max_new_tokens": (1, 256, True),
    "min_new_tokens": (0, 256, True),
    "length_penalty": (-5, 5, False),
    "repetition_penalty": (0.1, 5, False),
}


@dataclass(frozen=True)
class Decoding:
    """Decoding options of a text; None stands for the default of its task (`qformer.llm.prompts`)."""

    method: str = "beams"
    beams: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    length_penalty: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def of(cls, given: Any) -> Decoding:
        """Read a mapping from an untrusted visitor.

        Raises:
            UsageError: an unknown name, or an invalid value.
        """
        if given is None:
            return cls()
        if not isinstance(given, dict):
            raise UsageError(f"decoding is {kind(given)}; give a mapping such as {{'method': 'greedy'}}")
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name == "method":
                if value not in METHODS:
                    raise UsageError(f"decoding.method is {value!r:.40}; give one of {', '.join(METHODS)}")
                values[name] = value
                continue
            low, high, whole = find(LIMITS, str(name)[:40], "option of decoding")
            if value is not None:
                number = check_number(str(name), value, low, high, whole)
                values[name] = int(number) if whole else float(number)
        return cls(**values)

    def options(self, task: str, family: str) -> dict[str, Any]:
        """Fields of `GenerateConfig` for `model.answer`.

        Raises:
            UsageError: the shortest length exceeds the longest.
        """
        usual = wording(task, "paper", family).generate
        sizes = {"max_new_tokens": self.max_new_tokens, "min_new_tokens": self.min_new_tokens}
        chosen: dict[str, Any] = sizes | {"repetition_penalty": self.repetition_penalty}
        if self.method == "beams":
            chosen |= {"num_beams": self.beams, "length_penalty": self.length_penalty}
        elif self.method == "greedy":
            chosen |= {"num_beams": 1}
        else:
            chosen |= {"num_beams": 1, "do_sample": True, "top_p": self.top_p, "temperature": self.temperature}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        GenerateConfig.of(usual | chosen)
        return chosen


@dataclass(frozen=True)
class PreparedQuestion:
    """A question that is checked and ready to be answered.

    Attributes:
        tiles: what the question is about, as one row. question: text as the model reads it.
        prompt: exact text after the image. cut: part of the context or of the earlier turns was dropped to fit.
        places: text for what stands in front of the prompt (`qformer.demo.shown.places`).
    """

    tiles: Tiles
    question: str
    context: str | None
    history: tuple[Turn, ...]
    task: str
    options: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    cut: bool = False
    places: str = ""


def prepare(
    model: VisionLanguageModel,
    image: str | None,
    question: Any,
    context: Any = "",
    history: Any = None,
    task: Any = "vqa",
    decoding: Decoding | None = None,
    more: Any = None,
) -> PreparedQuestion:
    """Check the input of a visitor, and compose the prompt.

    Args:
        image, more: files that the question is about, see `qformer.demo.shown.row_of`.
        question: as a person types it; empty for a caption. context: text before the question.
        history: earlier (question, answer) pairs about this image. task: one of the values of `PRESETS`.

    Raises:
        UsageError: no image, or other unusable input.
    """
    row = row_of(model, image, more)
    if task not in PRESETS.values():
        raise UsageError(f"the task is {task!r:.40}; give one of {', '.join(PRESETS.values())}")
    asked = check_text("question", question, MAX_QUESTION)
    asked = clean_question(" ".join(asked.split())) if task in CLEANED else asked.strip()
    told = check_text("context", context, MAX_CONTEXT).strip() or None
    turns = _turns(history)
    tiles = model.frontend.tiles([row])
    before = places(model, row, tiles.plans[0])
    if not asked:
        options = (decoding or Decoding()).options("caption", model.llm.wording)
        return PreparedQuestion(tiles, "", None, (), "caption", options, model.prompt, places=before)
    if told and task == "vqa":
        task = "context"  # states it as a fact, and answers as briefly
    options = (decoding or Decoding()).options(task, model.llm.wording)
    prompt = model.prompt_for(tiles.plans[0], asked, told, turns, task=task, **options)
    whole = compose(asked, task, family=model.llm.wording, context=told, history=turns).text
    return PreparedQuestion(tiles, asked, told, turns, task, options, prompt, prompt != whole, before)


def _turns(history: Any) -> tuple[Turn, ...]:
    """Check earlier turns from an untrusted visitor; raises `UsageError` if they are no pairs of texts."""
    if history in (None, "", []):
        return ()
    if not isinstance(history, list | tuple) or not all(isinstance(t, list | tuple) and len(t) == 2 for t in history):
        raise UsageError("the history is not a list of [question, answer] pairs; give such a list, or omit it")
    return tuple(
        (
            check_text("question of the history", q, MAX_QUESTION),
            check_text("answer of the history", a, MAX_CONTEXT),
        )
        for q, a in history[-MOST_TURNS:]
    )


def answer(model: VisionLanguageModel, asked: PreparedQuestion) -> Generator[str, None, None]:
    """Yield the growing answer until it is complete (at once with several beams); without a question, a caption.

    Closing the generator stops the model.
    """
    tiles = asked.tiles
    streamed = asked.options.get("num_beams") == 1
    if not asked.question:
        pieces = model.stream(tiles, **asked.options) if streamed else iter(model.generate(tiles, **asked.options))
    elif streamed:
        pieces = model.stream_answer(
            tiles, asked.question, asked.context, asked.history, task=asked.task, **asked.options
        )
    else:
        history = [asked.history] if asked.history else None
        pieces = iter(model.answer(tiles, [asked.question], asked.context, history, task=asked.task, **asked.options))
    text = ""
    for piece in pieces:
        text += piece
        yield text
    if not text:  # the first token was the end
        yield ""


def answer_to(model: VisionLanguageModel, image: str | None, question: Any, *args: Any, **options: Any) -> str:
    """Complete answer; takes the arguments of `prepare`."""
    return [*answer(model, prepare(model, image, question, *args, **options))][-1]


def suggest(model: VisionLanguageModel, image: str | None, context: Any = "", more: Any = None) -> Turn:
    """Draw a question of the model's own about the picture, and its own answer; arguments as of `prepare`."""
    told = check_text("context", context, MAX_CONTEXT).strip() or None
    tiles = model.frontend.tiles([row_of(model, image, more)])
    return model.self_ask(tiles, told, num_beams=1, do_sample=True, top_p=0.9)[0]


def draw_photos(folder: Path, models: Models) -> list[list[str]]:
    """Write free photos, or some of the gallery's, into `folder`: rows as those of `draw_examples`."""
    own: list[str] = []
    if models.retriever:
        store = models.retriever.gallery.store
        entries = store.get([known.id for known in islice(store.known(), 2 * photos.COUNT)]).values()
        found = (kept.find(entry, lambda place: b"") for entry in entries)  # records of tars count as changed
        own = [name for name, fault in found if not fault]
    return photos.draw_photos(folder, own)
