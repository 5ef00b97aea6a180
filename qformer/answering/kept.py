"""Answers that are kept on disk as they come, so that a run that was broken off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qformer.files.records import append_record, read_records, writing

if TYPE_CHECKING:
    from pathlib import Path

Asked = Callable[[list[Any], list[str]], Sequence[str]]
Shown = Any  # a picture, or several, or none


class KeptAnswers:
    """Whoever answers, with a memory: what it has answered before to the same picture and question is not asked again.

    An answer belongs to the pixels, the question and `identity`; answers of others may lie in the same file.

    Attributes:
        new, known: answers that were given now, and that were there already.
        on_answers: is told how many have come, those from the file too; it may be changed.
    """

    def __init__(
        self,
        ask: Asked,
        file: Path,
        identity: Mapping[str, Any],
        batch: int = 16,
        on_answers: Callable[[int], None] = lambda _number: None,
    ) -> None:
        """Read the answers that exist; damaged lines are ignored.

        Args:
            ask: answers B questions, each about its own picture.
            file: lines of JSON; made with the first answer.
            identity: all that answers depend on besides picture and question, such as the model and its weights.
            batch: questions that are asked, and written, at once.
            on_answers: see the attribute.
        """
        self._ask, self._file, self._batch, self.on_answers = ask, file, batch, on_answers
        self._whose = json.dumps(dict(identity), sort_keys=True)
        self._answers: dict[str, str] = {}
        if file.is_file():
            self._read()
        self.new = self.known = 0

    def _read(self) -> None:
        with self._file.open("r+b") as opened:
            opened.truncate(opened.read().rfind(b"\n") + 1)  # a line that was cut off by a kill
        for record in read_records(self._file):
            if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("id", "answer")):
                self._answers[record["id"]] = record["answer"]

    def __call__(self, images: Sequence[Shown], questions: Sequence[str]) -> list[str]:
        """Answers to B questions, each about its image, or about several, or none.

        Raises:
            UsageError: an answer cannot be written, or what `ask` raises.
        """
        ids = [self._id(image, question) for image, question in zip(images, questions, strict=True)]
        places = {id_: place for place, id_ in enumerate(ids) if id_ not in self._answers}
        self.known += sum(id_ in self._answers for id_ in ids)
        self.on_answers(len(ids) - len(places))
        todo = list(places.items())
        for start in range(0, len(todo), self._batch):
            part = todo[start : start + self._batch]
            told = self._ask([images[place] for _, place in part], [questions[place] for _, place in part])
            for (id_, place), answer in zip(part, told, strict=True):
                with writing(self._file):
                    append_record(self._file, {"id": id_, "question": questions[place], "answer": answer})
                self._answers[id_] = answer
            self.new += len(part)
            self.on_answers(len(part))
        return [self._answers[id_] for id_ in ids]

    def _id(self, image: Shown, question: str) -> str:
        digest = hashlib.blake2b(digest_size=16)
        shown = [one.convert("RGB") for one in (image if isinstance(image, Sequence) else [image])]
        sizes = "".join(repr(one.size) for one in shown)
        for part in (self._whose.encode(), sizes.encode(), question.encode(), *(one.tobytes() for one in shown)):
            digest.update(hashlib.blake2b(part).digest())
        return digest.hexdigest()
