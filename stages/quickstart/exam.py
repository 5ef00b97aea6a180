"""The exam of the quickstart: stage two with each language model, its blind twin, and what both answer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer import load, stages
from qformer.config import load_config, shipped
from qformer.evaluation import zero_shot
from qformer.evaluation.zero_shot import NEW, SIZE, UNSEEN, BlindScenes
from qformer.llm.prompts import vqa_preset
from qformer.model.vision_language import VisionLanguageModel
from qformer.scenes.scenes import Scenes

if TYPE_CHECKING:
    from qformer.schema import Config


LANGUAGE_MODELS = ("opt", "t5")


#: What a model is given over the configuration of stage two: the T5 needs longer to speak.
OWN = {"opt": (), "t5": ("train.steps=800", "train.lr=1.4e-3", "llm.visual_scale=8")}


#: What the blind twin is given over the configuration of stage two: one grey patch of the shipped ViT.
BLIND = ("data.train.name=qformer.evaluation.zero_shot:BlindScenes", "resolution.name=fixed", "resolution.size=20")


@dataclass
class ExamResults:
    """Answers and captions of each language model for unseen scenes and for new ones, and its blind twin's answers."""

    replies: dict[str, dict[str, list[zero_shot.Reply]]] = field(default_factory=dict)
    blind: dict[str, list[zero_shot.Reply]] = field(default_factory=dict)
    told: dict[str, dict[str, list[zero_shot.Captioned]]] = field(default_factory=dict)
    prompts: dict[str, tuple[str, str]] = field(default_factory=dict)  # of captions, of questions

    def join(self, other: ExamResults) -> ExamResults:
        """Of both, in the order of `LANGUAGE_MODELS`."""
        parts = [{**getattr(self, part.name), **getattr(other, part.name)} for part in fields(self)]
        return ExamResults(*({name: part[name] for name in LANGUAGE_MODELS} for part in parts))

    def vqa(self, name: str) -> dict[str, Any]:
        share, by_kind = zero_shot.accuracy(self.replies[name][UNSEEN])
        return {
            "accuracy": share,
            "blind": zero_shot.accuracy(self.blind[name])[0],
            "majority": zero_shot.majority(self.replies[name][UNSEEN]),
            "by_kind": by_kind,
            "new_combinations": zero_shot.accuracy(self.replies[name][NEW])[0],
        }

    def captions(self) -> dict[str, Any]:
        by_model = {name: zero_shot.named(told[UNSEEN]) for name, told in self.told.items()}
        new = {name: zero_shot.named(told[NEW]) for name, told in self.told.items()}
        return {"named": min(by_model.values()), "by_model": by_model, "new_combinations": new}


@dataclass
class Exam:
    """Stage two of one quickstart: where it stands, and how much is asked; `trust` where stage one has a class of
    the user's own.
    """

    folder: Path
    overrides: list[str]
    questions: int
    captions: int
    trust: bool = False

    def take(self, tasks: tuple[tuple[str, str], ...]) -> ExamResults:
        """Train and ask the models of some tasks: `see` with its eyes open, `guess` is the blind twin."""
        seen = ExamResults()
        for what, name in tasks:
            {"see": self._see, "guess": self._guess}[what](name, seen)
        return seen

    def _see(self, name: str, seen: ExamResults) -> None:
        """Train the bridge to one language model, question it, and let it tell what it sees."""
        model = self._train(name, self.folder / name)
        seen.replies[name], seen.told[name] = {}, {}
        family = model.llm.family
        seen.prompts[name] = zero_shot.CAPTION_PROMPTS[family], vqa_preset("paper", family).template
        for split in (UNSEEN, NEW):
            asked = Scenes(split, SIZE, count=self.questions, questions=True)
            seen.replies[name][split] = zero_shot.answer_all(model, asked)
            alone = Scenes(split, SIZE, count=self.captions, objects=(1, 1), seed=1)
            seen.told[name][split] = zero_shot.caption_all(model, alone)

    def _guess(self, name: str, seen: ExamResults) -> None:
        """Train the blind twin of `_see`, whose picture is one grey patch, and ask it the same."""
        model = self._train(name, self.folder / f"{name}-blind", *BLIND)
        seen.blind[name] = zero_shot.answer_all(model, BlindScenes(UNSEEN, SIZE, count=self.questions, questions=True))

    def config(self, name: str, run: Path, *changes: str) -> Config:
        """Of the run that trains the bridge to one language model."""
        common = [f"run={run}", f"init={self.folder / 'stage1'}", f"llm.path=mini:{name}", *OWN[name]]
        return load_config(shipped()["quickstart/stage2.yaml"], [*common, *self.overrides, *changes])

    def _train(self, name: str, run: Path, *changes: str) -> VisionLanguageModel:
        config = self.config(name, run, *changes)
        stages.train(config, self.trust)
        model = load(run, trust=self.trust or names_own_class(config))
        assert isinstance(model, VisionLanguageModel)
        return model


def names_own_class(config: Config) -> bool:
    """Whether the user has typed a class of the own, which what is trained here will then name, too."""
    return any(":" in choice.name for choice in (config.vision, config.resolution))
