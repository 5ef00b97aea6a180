"""`qformer convert`: checkpoints written as a file of LAVIS, a folder of transformers or one of ours."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from qformer.checkpoints.hugging_face import write_transformers
from qformer.checkpoints.lavis import write_lavis
from qformer.checkpoints.loading import open_checkpoint
from qformer.checkpoints.ours import take_apart, write_ours
from qformer.checkpoints.parts import LoadOptions
from qformer.checkpoints.whole import require
from qformer.files import pretrained
from qformer.files.records import replacing
from qformer.template import NONE
from qformer.types import UsageError

Form = Literal["qformer", "lavis", "transformers"]


def convert_checkpoint(source: str, target: Path, form: Form, given: LoadOptions, trust: bool = False) -> Path:
    """Write the checkpoint at `source`, of whatever form, to `target` in the given form; tensors keep their bits.

    Towers that a checkpoint leaves out stay out, except in the form of transformers, which needs them. `trust` is as
    of `qformer.load`.

    Raises:
        UsageError: the source is no checkpoint, has no home in that form, or the target exists.
    """
    if target.exists():
        raise UsageError(f"'{target}' exists; give another path with -o, or remove it")
    sizes = {name: value for name, value in asdict(given).items() if value is not None}
    opened = open_checkpoint(source, sizes, trust)
    llm = opened.config.llm
    if form == "transformers" and not opened.config.has_qformer:
        require(opened.config, source)
    elif form != "qformer" and llm is not None and llm.template != NONE:
        raise UsageError(
            f"the language model of '{source}' reads the image inside a turn of a chat (llm.template), for which LAVIS "
            "and transformers have no place, since images come first there; use the checkpoint as it is"
        )
    if form != "qformer" and opened.config.stage == "stage1" and opened.config.text.pooling != "class":
        raise UsageError(
            f"'{source}' compares the mean of a text's rows (text.pooling), and LAVIS and transformers its [CLS] row; "
            "it would retrieve wrongly there, so use the checkpoint as it is"
        )
    if form != "qformer" and opened.config.vision.options.get("layers") is not None:
        raise UsageError(
            f"'{source}' reads several layers of its image encoder (vision.layers), for which LAVIS and transformers "
            "have no place in BLIP-2; use the checkpoint as it is"
        )
    if opened.folder is not None:
        take_apart(opened, form)
    if form == "lavis" and not opened.config.has_qformer:
        raise UsageError(f"LAVIS has no place for '{source}', which has no Q-Former; use the checkpoint as it is")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial, pretrained.quiet():
        {"qformer": write_ours, "lavis": write_lavis, "transformers": write_transformers}[form](opened, partial)
    return target
