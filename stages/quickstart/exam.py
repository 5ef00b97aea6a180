"""The exam of the quickstart: stage two with each language model and with its blind twin, and their answers."""

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


#: Overrides of the stage-two configuration for each language model; the T5 needs more steps.
OWN = {"opt": (), "t5": ("train.steps=800", "train.lr=1.4e-3", "llm.visual_scale=8")}


#: Overrides of the stage-two configuration for the blind twin: images are one gray patch of the shipped ViT.
BLIND = ("data.train.name=qformer.evaluation.zero_shot:BlindScenes", "resolution.name=fixed", "resolution.size=20")


@dataclass
class ExamResults:
    """Answers and captions by each language model for unseen scenes and for new combinations; blind answers."""

    replies: dict[str, dict[str, list[zero_shot.Reply]]] = field(default_factory=dict)
    blind: dict[str, list[zero_shot.Reply]] = field(default_factory=dict)
    captioned: dict[str, dict[str, list[zero_shot.Captioned]]] = field(default_factory=dict)
    prompts: dict[str, tuple[str, str]] = field(default_factory=dict)  # of captions, of questions

    def join(self, other: ExamResults) -> ExamResults:
        """Merge two results, in the order of `LANGUAGE_MODELS`."""
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
        by_model = {name: zero_shot.named(by_split[UNSEEN]) for name, by_split in self.captioned.items()}
        new = {name: zero_shot.named(by_split[NEW]) for name, by_split in self.captioned.items()}
        return {"named": min(by_model.values()), "by_model": by_model, "new_combinations": new}


@dataclass
class Exam:
    """Stage two of a quickstart: its folder, and the size of the exam; `trust` allows classes of the user."""

    folder: Path
    overrides: list[str]
    questions: int
    captions: int
    trust: bool = False

    def take(self, tasks: tuple[tuple[str, str], ...]) -> ExamResults:
        """Train and question the models of some tasks: `see` for the real model, `guess` for its blind twin."""
        seen = ExamResults()
        for what, name in tasks:
            {"see": self._see, "guess": self._guess}[what](name, seen)
        return seen

    def _see(self, name: str, seen: ExamResults) -> None:
        """Train the bridge to one language model, question it, and let it write captions."""
        model = self._train(name, self.folder / name)
        seen.replies[name], seen.captioned[name] = {}, {}
        family = model.llm.family
        seen.prompts[name] = zero_shot.CAPTION_PROMPTS[family], vqa_preset("paper", family).template
        for split in (UNSEEN, NEW):
            scenes = Scenes(split, SIZE, count=self.questions, questions=True)
            seen.replies[name][split] = zero_shot.answer_all(model, scenes)
            alone = Scenes(split, SIZE, count=self.captions, objects=(1, 1), seed=1)
            seen.captioned[name][split] = zero_shot.caption_all(model, alone)

    def _guess(self, name: str, seen: ExamResults) -> None:
        """Train the blind twin, whose images are one gray patch, and ask it the same questions."""
        model = self._train(name, self.folder / f"{name}-blind", *BLIND)
        seen.blind[name] = zero_shot.answer_all(model, BlindScenes(UNSEEN, SIZE, count=self.questions, questions=True))

    def config(self, name: str, run: Path, *changes: str) -> Config:
        """Load the configuration of the run that trains the bridge to one language model."""
        common = [f"run={run}", f"init={self.folder / 'stage1'}", f"llm.path=mini:{name}", *OWN[name]]
        return load_config(shipped()["quickstart/stage2.yaml"], [*common, *self.overrides, *changes])

    def _train(self, name: str, run: Path, *changes: str) -> VisionLanguageModel:
        config = self.config(name, run, *changes)
        stages.train(config, self.trust)
        model = load(run, trust=self.trust or names_own_class(config))
        assert isinstance(model, VisionLanguageModel)
        return model


def names_own_class(config: Config) -> bool:
    """Return True if the configuration names a class of the user, which its checkpoints will then name too."""
    return any(":" in choice.name for choice in (config.vision, config.resolution))
