"""Folders of our own checkpoints, opened, taken apart for other forms, and written from parts of any form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from transformers import AutoTokenizer

from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.parts import (
    FAMILIES,
    LLM_FOLDER,
    VISION_FILE,
    VISION_FOLDER,
    OpenCheckpoint,
    Parts,
    check_words,
    load_tokenizer,
    save_tower,
)
from qformer.checkpoints.weights import ENCODER, LLM, load_trained
from qformer.config import Choice, dump_config
from qformer.files import pretrained
from qformer.files.digests import digests
from qformer.files.pretrained import configuration
from qformer.files.tensors import read_tensors
from qformer.language_schema import LLMConfig
from qformer.llm import lora
from qformer.llm.loading import language_model, load_language_model
from qformer.types import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def open_ours(path: str | Path, trust: bool = False, verify: bool = True) -> OpenCheckpoint:
    """A checkpoint of ours; towers stay where its configuration names them. `trust`, `verify`: see `qformer.load`.

    Raises:
        UsageError: none is there, or it is a run without a bridge.
    """
    saved = checkpoint.read(path, trust, verify)
    config = saved.config
    if config.stage not in ("stage1", "stage2"):
        raise UsageError(f"'{path}' is a run of stage '{config.stage}'; give one of stage1 or stage2")
    parts = Parts(config.stage, saved.tensors, {}, {}, config.qformer)
    tokenizer = str(saved.path) if config.llm is None else config.llm.path
    return OpenCheckpoint(str(path), parts, config, tokenizer, folder=saved.path)


def take_apart(opened: OpenCheckpoint, form: str) -> None:
    """Move what a checkpoint of ours holds of its towers out of its bridge, and adapters into their language model.

    Other forms have whole towers, and no place for parts of them.

    Raises:
        UsageError: its connector or its text path has no place in that form.
    """
    config, parts, inside = opened.config, opened.parts, str(opened.folder)
    if not config.has_qformer and form == "lavis":
        raise UsageError(
            f"LAVIS and transformers have no place for the connector of '{opened.source}', '{config.connector.name}'; "
            "use the checkpoint as it is"
        )
    if config.links != "none" and form != "qformer":
        raise UsageError(
            f"the Q-Former of '{opened.source}' has links between slices (connector.links), for which LAVIS and "
            "transformers have no place; use the checkpoint as it is"
        )
    if config.question is not None:
        raise UsageError(
            f"the Q-Former of '{opened.source}' reads questions, for which stage two of BLIP-2 has no place in LAVIS "
            "or in transformers; use the checkpoint as it is"
        )
    parts.vision = {n.removeprefix(ENCODER): tensor for n, tensor in parts.bridge.items() if n.startswith(ENCODER)}
    adapters = {n.removeprefix(LLM): tensor for n, tensor in parts.bridge.items() if n.startswith(LLM)}
    parts.bridge = {name: tensor for name, tensor in parts.bridge.items() if not name.startswith((ENCODER, LLM))}
    if not parts.vision and str(config.vision.options.get("weights", "")).startswith(inside):
        parts.vision = read_tensors(config.vision.options["weights"])
    if config.llm is None:
        return
    opened.llm = configuration(config.llm.path)
    parts.family = next((known for known in FAMILIES if known == opened.llm.model_type), None)
    if config.llm.lora is not None:
        parts.llm, opened.merged = _merged(config.llm, adapters, inside), config.llm.path
        opened.config = config.model_copy(update={"llm": config.llm.model_copy(update={"lora": None})})
    elif config.llm.path.startswith(inside):
        tensors = read_tensors(config.llm.path)
        parts.llm = language_model(opened.llm, tensors, config.llm.path).state_dict()


def _merged(config: LLMConfig, adapters: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of the language model with a checkpoint's adapters added to its weights."""
    assert config.lora is not None
    llm = load_language_model(config.path, dtype=None, tried=False)
    lora.add(llm, config.lora)
    load_trained(llm, adapters, source)
    lora.merge(llm)
    return llm.model.state_dict()


def write_ours(opened: OpenCheckpoint, folder: Path) -> None:
    """A checkpoint folder; towers that the parts hold are kept in it."""
    parts, config = opened.parts, opened.config
    folder.mkdir()
    _save(parts.bridge, folder / checkpoint.WEIGHTS)
    if parts.vision:
        if opened.seen is None:
            options = {**config.vision.options, "weights": VISION_FILE}
            _save(parts.vision, folder / VISION_FILE.removeprefix(checkpoint.INSIDE))
        else:
            options = {**config.vision.options, "path": VISION_FOLDER}
            save_tower(opened.seen, parts.vision, folder / VISION_FOLDER.removeprefix(checkpoint.INSIDE))
        kept = {"vision": Choice(name=config.vision.name, **options), "freeze_vision": True}  # beside what is trained
        config = config.model_copy(update=kept)
    if parts.llm:
        inside = folder / LLM_FOLDER.removeprefix(checkpoint.INSIDE)
        tokenizer = pretrained.read(AutoTokenizer, opened.tokenizer)
        check_words(opened, tokenizer)
        language_model(opened.llm, parts.llm, opened.source).save_pretrained(inside)
        tokenizer.save_pretrained(inside)
        llm = (config.llm or LLMConfig(path=LLM_FOLDER)).model_copy(update={"path": LLM_FOLDER})
        config = config.model_copy(update={"llm": llm})
    if parts.stage == "stage1":
        tokenizer = load_tokenizer(opened)
        check_words(opened, tokenizer)
        tokenizer.save_pretrained(folder)
    (folder / checkpoint.CONFIG).write_text(dump_config(config), encoding="utf-8")
    meta = {
        "step": 0,
        **checkpoint.provenance(),
        checkpoint.TOWERS: digests(config),
        "converted_from": opened.source,
    }
    checkpoint.write_meta(folder, meta | ({checkpoint.MERGED: opened.merged} if opened.merged else {}))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
