"""Sizes of the models of a run, read from configurations alone: no weights are opened, and only `init` imports torch.

A tower's configuration comes from its folder, from the local hub cache, or from the table of well-known towers
(`qformer.stages.plan.sizes`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qformer import lookup, vision
from qformer.files import pretrained
from qformer.files.real_towers import NotFetched
from qformer.model.sizes import BERT_SIZES
from qformer.schema import QFormerConfig
from qformer.stages.plan.sizes import KNOWN
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.schema import Config

WIDTHS = ("word_embed_proj_dim", "d_model", "hidden_size", "n_embd")  # names of the embedding width; the first counts


def with_sizes(config: Config) -> tuple[Config, list[str]]:
    """Fill in the sizes of the Q-Former.

    Returns:
        The configuration with these sizes, and one line per tower: its width, or why the width is not known.
    """
    if config.stage not in ("stage1", "stage2"):
        return config, []
    lines: list[str] = []
    try:
        config = _with_start(config)
    except UsageError as error:
        return config, [f"the sizes come from init, which cannot be read: {error}"]
    sizes: dict[str, Any] = {}
    if config.stage == "stage1" or (config.init is None and config.question is not None):
        if (bert := described(config.text.bert)) is None:
            lines.append(f"text.bert '{config.text.bert}' is not downloaded yet: the Q-Former will take its sizes")
        else:
            usual = QFormerConfig()  # sizes of BERT-base, which are also the defaults of BertConfig
            sizes = {ours: bert.get(theirs, getattr(usual, ours)) for ours, theirs in BERT_SIZES.items()}
            sizes["vocab_size"] = _words(config.text.bert, int(bert.get("vocab_size", usual.vocab_size - 1)))
    if (width := _encoder_width(config)) is None:
        lines.append(f"the width of the image encoder '{config.vision.name}' is not known yet")
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
    """Apply the settings that stage two inherits from the run it starts from."""
    if config.stage != "stage2" or config.init is None:
        return config
    from qformer.checkpoints import folder as checkpoint
    from qformer.stages.inherit import inherit

    return inherit(config, checkpoint.read_config(config.init))


def described(path: str) -> dict[str, Any] | None:
    """Read the `config.json` of a tower; None if it is not on this machine and the tower is not a well-known one."""
    try:
        folder = Path(pretrained.tower(path))
    except NotFetched:
        return KNOWN[path]
    file: Any = folder / "config.json"
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            file = try_to_load_from_cache(path, "config.json")
        except ValueError:  # not a valid repository name
            return None
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8")) if isinstance(file, str | Path) else KNOWN.get(path)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _words(path: str, least: int) -> int:
    """Count the words of a BERT tokenizer plus `[DEC]`, or the rows of its embedding table if there are more."""
    try:
        folder = Path(pretrained.tower(path))
        options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        known = {*words["model"]["vocab"], *(token["content"] for token in words["added_tokens"])}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, NotFetched):
        return least + 1
    return max(least, len(known) + (options.get("bos_token") is None))


def _encoder_width(config: Config) -> int | None:
    try:
        options = vision.options_of(config.vision)
    except UsageError:
        return None
    widths = [_width_of(part) for part in getattr(options, "parts", (options,))]  # a mixture has two
    return None if None in widths else max(width for width in widths if width is not None)


def _width_of(options: Any) -> int | None:
    """Width of the tokens of an image encoder with these options; None if it is not known yet."""
    width = getattr(options, "width", None)
    if width is None and (found := described(str(getattr(options, "path", "")))) is not None:
        width = (found.get("vision_config") or found).get("hidden_size")
    layers = getattr(options, "layers", None)  # whose tokens are concatenated
    return width * len(layers or (None,)) if isinstance(width, int) else None


def _of_language_model(path: str) -> str:
    found = described(path)
    found = None if found is None else found.get("text_config") or found
    width = None if found is None else next((found[name] for name in WIDTHS if found.get(name)), None)
    if found is None or width is None:
        return f"llm.path '{path}' is not downloaded yet: the projection will take its width"
    return f"llm.path '{path}': {found.get('model_type', 'a model')} with embeddings of width {width}"
