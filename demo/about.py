"""Facts about the models of a page, in words for its header, and hints of what to type, which fit the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from qformer.demo.backend import Models


@dataclass(frozen=True)
class Hints:
    """Texts that stand in empty boxes."""

    question: str
    context: str
    texts: str

    @property
    def search(self) -> str:
        return self.texts.partition("\n")[0]


PHOTOS = Hints(
    "what is in the picture?", "it was taken in winter.", "a dog on a beach\na street at night\ntwo people at a table"
)
SCENES = Hints(
    "what color is the star?", "the star is red.", "a red square left of a blue circle\na green star\ntwo triangles"
)


def hints(models: Models, examples: list[list[str]]) -> Hints:
    """Hints for a checkpoint: the last example's question and context, if there are examples."""
    usual = SCENES if models.of_scenes else PHOTOS
    _, question, context = examples[-1] if examples else ("", "", "")
    return Hints(question or usual.question, context or usual.context, usual.texts)


def facts(models: Models) -> list[str]:
    """The model, its towers, stages, device, precision and gallery, each in a few words."""
    parts = [one for one in (models.asking, models.matching) if one is not None]
    stages = {(True, True): "stages one and two", (True, False): "stage two"}
    found = [models.name, stages.get((models.asking is not None, models.matching is not None), "stage one")]
    found.append(f"sees with {_tower(parts[0].frontend.encoder)}")
    if models.asking is not None:
        found.append(f"writes with {_tower(models.asking.llm)}")
    some = next(parts[0].parameters())
    weights = models.asking.llm if models.asking is not None else parts[0]
    precision = models.quantized or str(next(weights.parameters()).dtype).removeprefix("torch.")
    found.append(f"{some.device}, {precision}")
    if models.retriever is not None:
        count = len(models.retriever.gallery.store)
        found.append(f"gallery of {count:,} picture{'s' * (count != 1)}")
    return found


def _tower(tower: nn.Module) -> str:
    """Name of a tower and its size: `opt-2.7b, 2.7 B weights`."""
    configs: list[Any] = [module.config for module in tower.modules() if hasattr(module, "config")]
    named = next((config for config in configs if hasattr(config, "model_type")), None)
    path = str(getattr(named, "name_or_path", "") or "")
    name = Path(path).name or str(getattr(named, "model_type", type(tower).__name__))
    count = sum(parameter.numel() for parameter in tower.parameters())
    size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    return f"{name} ({size} weights)"
