"""`qformer convert`: checkpoints written as a file of LAVIS, a folder of transformers or one of ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.hugging_face import write_transformers
from qformer.checkpoints.lavis import write_lavis
from qformer.checkpoints.loading import open_foreign, pushed
from qformer.checkpoints.ours import open_ours, write_ours
from qformer.checkpoints.parts import LoadOptions
from qformer.files import pretrained
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
    found = str(pushed(source)) if checkpoint.is_foreign(source) else source
    opened = open_foreign(found, given) if checkpoint.is_foreign(found) else open_ours(found, trust)
    partial = target.with_name(f"{target.name}.partial")
    _remove(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pretrained.quiet():
            {"qformer": write_ours, "lavis": write_lavis, "transformers": write_transformers}[form](opened, partial)
        partial.rename(target)
    finally:
        _remove(partial)
    return target


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
