"""The sizes that a run will train with, as far as configurations tell them: without weights, and torch only for `init`.

Those of a tower in a folder, in the local cache of the hub or among the well-known ones (`qformer.stages.plan.sizes`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qformer import lookup, vision
from qformer.files import pretrained
from qformer.model.bert import BERT_SIZES
from qformer.schema import QFormerConfig
from qformer.stages.plan.sizes import KNOWN
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.schema import Config

WIDTHS = ("word_embed_proj_dim", "d_model", "hidden_size", "n_embd")  # of input embeddings; the first that is there


def with_sizes(config: Config) -> tuple[Config, list[str]]:
    """A configuration with the sizes of its Q-Former, and lines about towers: widths, or why they are not known."""
    if config.stage not in ("stage1", "stage2"):
        return config, []
    lines: list[str] = []
    try:
        config = _with_start(config)
    except UsageError as error:
        return config, [f"sizes are those of init: {error}"]
    sizes: dict[str, Any] = {}
    if config.stage == "stage1" or (config.init is None and config.question is not None):
        if (bert := described(config.text.bert)) is None:
            lines.append(f"text.bert '{config.text.bert}' is not here: the Q-Former will have its sizes")
        else:
            usual = QFormerConfig()  # BERT-base's, as the defaults of a BERT's configuration are
            sizes = {ours: bert.get(theirs, getattr(usual, ours)) for ours, theirs in BERT_SIZES.items()}
            sizes["vocab_size"] = _words(config.text.bert, int(bert.get("vocab_size", usual.vocab_size - 1)))
    if (width := _encoder_width(config)) is None:
        lines.append(f"the width of the image encoder '{config.vision.name}' is not known here")
    else:
        sizes["encoder_width"] = width
    if config.llm is not None:
        lines.append(_of_language_model(config.llm.path))
    given = {name: getattr(config.qformer, name) for name in config.qformer.model_fields_set}
    try:
        qformer = QFormerConfig(**(sizes | given))
    except ValidationError as error:
        raise UsageError(lookup.explain(error, sizes | given, "qformer")) from error
    return config.model_copy(update={"qformer": qformer}), lines


def _with_start(config: Config) -> Config:
    """The configuration with what stage two takes from the run that it starts from."""
    if config.stage != "stage2" or config.init is None:
        return config
    from qformer.checkpoints import folder as checkpoint
    from qformer.stages.inherit import inherit

    return inherit(config, checkpoint.read_config(config.init))


def described(path: str) -> dict[str, Any] | None:
    """The `config.json` of a tower; None where it is not here and the tower is not a well-known one."""
    folder = Path(pretrained.tower(path))
    file: Any = folder / "config.json"
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            file = try_to_load_from_cache(path, "config.json")
        except ValueError:  # no name of a repository
            return None
    try:
        said = json.loads(Path(file).read_text(encoding="utf-8")) if isinstance(file, str | Path) else KNOWN.get(path)
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _words(path: str, least: int) -> int:
    """Words of a BERT's tokenizer with `[DEC]`, or of its table if that has more."""
    folder = Path(pretrained.tower(path))
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        known = {*words["model"]["vocab"], *(token["content"] for token in words["added_tokens"])}
    except (OSError, ValueError, KeyError, TypeError):
        return least + 1
    return max(least, len(known) + (said.get("bos_token") is None))


def _encoder_width(config: Config) -> int | None:
    try:
        options = vision.options_of(config.vision)
    except UsageError:
        return None
    width = getattr(options, "width", None)
    if width is None and (said := described(str(getattr(options, "path", "")))) is not None:
        width = (said.get("vision_config") or said).get("hidden_size")
    return width if isinstance(width, int) else None


def _of_language_model(path: str) -> str:
    said = described(path)
    said = None if said is None else said.get("text_config") or said
    width = None if said is None else next((said[name] for name in WIDTHS if said.get(name)), None)
    if said is None or width is None:
        return f"llm.path '{path}' is not here: the projection will have its width"
    return f"llm.path '{path}': {said.get('model_type', 'a model')} that reads embeddings {width} wide"
