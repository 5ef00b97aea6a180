"""`qformer caption` and `qformer ask`: what a stage-two model says of images and videos, as lines of text or of JSON.

Answers go to standard output as they come; what was skipped or cut, and a bar where the work is long, to standard
error.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qformer import lookup
from qformer.checkpoints import loading
from qformer.commands.image_files import FORMATS, ImageFiles, open_file
from qformer.data.texts import clean_question
from qformer.files.records import to_json
from qformer.formats import SUFFIXES, UNREAD, VIDEOS
from qformer.images import shown
from qformer.llm.decoding import GenerateConfig
from qformer.llm.prompts import compose, wording
from qformer.types import BadSample, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.commands.image_files import Images
    from qformer.model.vision_language import VisionLanguageModel

    Row = tuple[list[Path], list[Any]]  # files, and what is read of them


#: Tasks whose questions are cleaned as those that models were trained on; others keep their stops and capitals.
CLEANED = ("vqa", "context", "dialogue")
EMPTY = "the question is empty; write it in quotes behind the image"


def options(sample: bool, captions: int = 1, **given: Any) -> dict[str, Any]:
    """Fields of `GenerateConfig` from the command line, where None is what the task or the paper has.

    Raises:
        UsageError: options that act on samples only, without `sample`, or beams with it.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if not sample:
        for name, is_given in (("captions", captions > 1), *((n, n in chosen) for n in ("top_p", "temperature"))):
            if is_given:
                raise UsageError(f"--{name.replace('_', '-')} is for texts that are drawn; add --sample")
        return chosen
    if "num_beams" in chosen:
        raise UsageError("--beams is for texts that are searched for; leave it or --sample out")
    return {**chosen, "do_sample": True, "num_return_sequences": captions}


def caption(
    path: str,
    given: list[str],
    *,
    prompt: str | None,
    decoding: dict[str, Any],
    batch: int,
    seed: int | None,
    as_json: bool,
    device: str | None,
    quantize: str | None = None,
    trust: bool = False,
    together: bool = False,
) -> None:
    """Write the captions of images, videos and folders of images, in their order; or one of all of them `together`.

    Raises:
        UsageError: an only image that cannot be read, or a checkpoint or options that cannot be used.
        SystemExit: 1, none of several files is an image.
    """
    new = GenerateConfig.of(decoding).max_new_tokens
    _check_text(prompt=prompt)
    files = _paths(given)
    reader = ImageFiles(files, None if together else batch)
    _require_readable(files)
    groups = reader.groups()  # the first of which is read before the model
    model = loading.load_vision_language(path, device, quantize, trust)
    _seed(seed)
    for group in reader.track("captioning", groups, model, None if together else new):
        rows = _rows(group, together)
        texts = model.generate(_tiles(model, rows), prompt, **decoding)
        each = len(texts) // len(rows)
        for number, (files, _) in enumerate(rows):
            own = texts[number * each : (number + 1) * each]
            if as_json:
                _print_json(**_record(files), captions=own)
            else:
                print(*(f"{_name(files)}\t{text}" for text in own), sep="\n", flush=True)
    reader.tell_skipped()


@dataclass(frozen=True)
class Asking:
    """Options of `qformer ask`; its `--help` explains each."""

    context: str | None = None
    preset: str = "paper"
    task: str = "vqa"
    self_ask: bool = False
    show_prompt: bool = False
    as_json: bool = False
    together: bool = False

    def prompt(self, question: str, family: str, history: list[tuple[str, str]] | None = None) -> str:
        """Before anything of it is cut."""
        task = "ask" if self.self_ask else self.task
        return compose(question, task, self.preset, family, self.context, history).text


def ask(
    path: str,
    words: list[str],
    questions: list[str],
    asking: Asking,
    *,
    decoding: dict[str, Any],
    batch: int,
    seed: int | None,
    device: str | None,
    quantize: str | None = None,
    trust: bool = False,
) -> None:
    """Answer questions about images; without any, ask for them one after the other.

    Args:
        words: images, and behind them perhaps the question, or `-` for questions from standard input.

    Raises:
        UsageError: no question, an only image that cannot be read, or a checkpoint or options that cannot be used.
        SystemExit: 1, none of several files is an image.
    """
    worded = wording(asking.task, asking.preset, "causal")
    _check_text(context=asking.context)
    asks = worded.asks and not asking.self_ask
    if questions and not asks:
        raise UsageError("with --self-ask, --task caption and --task ask no question is put; leave -q out")
    files, asked = divide(words, questions) if asks else (_paths(words), [""])
    if asked is not None and asks:
        asked = [_cleaned(question, asking.task) for question in asked]
    new = GenerateConfig.of({**worded.generate, **decoding}).max_new_tokens
    reader = ImageFiles(files, None if asking.together else max(batch // len(asked or [""]), 1))
    _require_readable(files)
    groups = reader.groups()
    model = loading.load_vision_language(path, device, quantize, trust)
    _seed(seed)
    with _told():
        groups = reader.track("asking", groups, model, None if asking.together else new)
        if asked is None:
            converse(model, list(chain.from_iterable(groups)), asking, decoding)
            return
        if asking.show_prompt and not asking.as_json:
            for question in asked:
                print(f"prompt: {asking.prompt(question, model.llm.wording)}", file=sys.stderr)
        for group in groups:
            rows = _rows(group, asking.together)
            tiles = _tiles(model, rows)
            if asking.self_ask:
                turns = [[turn] for turn in model.self_ask(tiles, asking.context, asking.preset, **decoding)]
            else:
                answers = _answers(model, tiles, [asked] * len(rows), asking, decoding)
                turns = [list(zip(asked, own, strict=True)) for own in answers]
            several = len(reader.files) > 1 and not asking.together
            for (files_shown, _), own_turns in zip(rows, turns, strict=True):
                for turn in own_turns:
                    _print_answer(files_shown, turn, asking, model.llm.wording, several, len(asked) > 1)
    reader.tell_skipped()


def _require_readable(files: list[Path]) -> None:
    """Refuse an only file that is no image and no video, before a model is loaded for it."""
    if len(files) > 1 or files[0].is_dir():
        return
    (file,) = files
    try:
        open_file(file)
    except BadSample as bad:
        if isinstance(bad, UsageError):  # says what to do already
            raise
        raise UsageError(f"'{file}' cannot be read as an image ({bad}); {FORMATS}") from bad


def divide(words: list[str], questions: list[str]) -> tuple[list[Path], list[str] | None]:
    """Images and questions of the command line; None where they are to be asked for.

    Raises:
        UsageError: no question, and nobody to ask for one.
    """
    if questions:
        return _paths(words), questions
    *front, last = words
    if front and last == "-":
        return _paths(front), _questions()
    if front and not _names_file(last):
        return _paths(front), [last]
    files = _paths(words)
    if sys.stdin.isatty():
        return files, None
    raise UsageError(
        "there is no question; write it in quotes behind the images, after -q, or on standard input behind a -"
    )


def _questions() -> list[str]:
    """The lines of standard input."""
    try:
        lines = [line.strip().removeprefix("\ufeff") for line in sys.stdin]
        "".join(lines).encode()  # what could not be decoded may stand there as half a character
    except UnicodeError as error:
        raise UsageError(f"standard input is not text in UTF-8 ({error}); convert it, such as by iconv") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UsageError("standard input holds no question; give one on each line")
    if any("\0" in line for line in lines):
        raise UsageError("standard input holds zero bytes, as UTF-16 does; convert it to UTF-8, such as by iconv")
    return lines


def _paths(words: list[str]) -> list[Path]:
    if "" in words:
        raise UsageError("one of the images is an empty name; give files or folders")
    if address := next((word for word in words if lookup.address(word)), None):
        raise UsageError(f"'{shown(address)}'{lookup.NOT_FETCHED} and give the file")
    return [Path(word) for word in words]


def _check_text(**texts: str | None) -> None:
    """Refuse what is no UTF-8, of which the command line keeps the bytes as halves of characters."""
    for name, text in texts.items():
        try:
            (text or "").encode()
        except UnicodeError as error:
            raise UsageError(f"the {name} is not text in UTF-8 ({error}); write it in UTF-8") from error


def _names_file(word: str) -> bool:
    """Return True if a word names an image file, even a missing one, and is not a question."""
    if not word.strip():
        return False
    if (lookup.address(word) or Path(word).suffix.lower() in SUFFIXES | UNREAD | VIDEOS) and not any(
        map(str.isspace, word)
    ):
        return True
    try:
        return Path(word).exists()
    except OSError:  # longer than names are
        return False


def converse(model: VisionLanguageModel, images: Images, asking: Asking, decoding: dict[str, Any]) -> None:
    """Ask for questions and answer them, each behind the turns before it; the images are encoded once."""
    rows = _rows(images, asking.together)
    tiles = _remembered(model, _tiles(model, rows))
    history: list[list[tuple[str, str]]] = [[] for _ in rows]
    print("qformer: ask about the picture; an empty line forgets what was said, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            question = input("? " if sys.stdout.isatty() else "")
        except EOFError:
            return
        except UnicodeError as error:
            print(f"qformer: that is not text in UTF-8 ({error}); ask again", file=sys.stderr)
            continue
        if not question.strip():
            history = [[] for _ in rows]
            continue
        try:
            asked = _cleaned(question, asking.task)
            answers = _answers(model, tiles, [[asked]] * len(rows), asking, decoding, history)
        except UsageError as error:
            print(f"qformer: {error}", file=sys.stderr)
            continue
        for (files, _), turns, (answer,) in zip(rows, history, answers, strict=True):
            if asking.show_prompt and not asking.as_json:
                print(f"prompt: {asking.prompt(asked, model.llm.wording, turns)}", file=sys.stderr)
            _print_answer(files, (asked, answer), asking, model.llm.wording, len(rows) > 1, False, turns)
            turns.append((asked, answer))


def _cleaned(question: str, task: str) -> str:
    _check_text(question=question)
    asked = clean_question(question) if task in CLEANED else question.strip()
    if not asked:
        raise UsageError(EMPTY)
    return asked


def _answers(
    model: VisionLanguageModel,
    tiles: Tiles,
    questions: list[list[str]],
    asking: Asking,
    decoding: dict[str, Any],
    history: list[list[tuple[str, str]]] | None = None,
) -> list[list[str]]:
    return model.answer(tiles, questions, asking.context, history, asking.preset, asking.task, **decoding)


def _print_answer(
    files: list[Path],
    turn: tuple[str, str],
    asking: Asking,
    family: str,
    name_image: bool,
    name_question: bool,
    history: list[tuple[str, str]] | None = None,
) -> None:
    """A line holds what tells it from the others: the image where there are several, and the question likewise."""
    question, answer = turn
    if asking.as_json:
        asked = "" if asking.self_ask else question
        shown = {"prompt": asking.prompt(asked, family, history)} if asking.show_prompt else {}
        _print_json(**_record(files), question=question, answer=answer, **shown)
        return
    columns = [_name(files)] if name_image else []
    columns += [question] if name_question or asking.self_ask else []
    print(*columns, answer, sep="\t", flush=True)


def _print_json(**record: Any) -> None:
    print(to_json(record), flush=True)


def _name(files: list[Path]) -> str:
    """The names of a row as they can be printed; bytes of them that are no UTF-8 as numbers."""
    return ", ".join(map(str, files)).encode("utf-8", "backslashreplace").decode()


def _record(files: list[Path]) -> dict[str, Any]:
    """The names of a row in a line of JSON: `image`, or `images` where it shows several."""
    return {"image": str(files[0])} if len(files) == 1 else {"images": list(map(str, files))}


def _rows(images: Images, together: bool) -> list[Row]:
    """Rows that the model sees at once, with their files: each image, or all of them `together`."""
    if together:
        return [([file for file, _ in images], [shown for _, shown in images])]
    return [([file], [shown]) for file, shown in images]


def _tiles(model: VisionLanguageModel, rows: list[Row]) -> Tiles:
    return model.frontend.tiles([shown for _, shown in rows])


@torch.no_grad()
def _remembered(model: VisionLanguageModel, tiles: Tiles) -> Tiles:
    """The same images as what the encoder sees in them: asked again, it need not look again."""
    seen = model.frontend.encode_tiles(tiles)
    return Tiles([], tiles.plans, seen.rows)


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)


@contextmanager
def _told() -> Iterator[None]:
    """Print warnings of a model, such as cut text, as one line each on standard error."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"qformer: {message}", file=sys.stderr)
        yield
