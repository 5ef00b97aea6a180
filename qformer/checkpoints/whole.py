"""Whole systems of transformers (`systems.py`) opened as a checkpoint, and written back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel, AutoTokenizer

from qformer.checkpoints.parts import (
    LLM_FOLDER,
    VISION_FILE,
    VISION_FOLDER,
    LoadOptions,
    OpenCheckpoint,
    Parts,
    Seen,
    check_words,
    load_tokenizer,
    take,
)
from qformer.checkpoints.systems import SYSTEMS, System, check, system_of
from qformer.config import parse_config
from qformer.files import pretrained
from qformer.files.tensors import listed, refuse
from qformer.llm import chat
from qformer.llm.loading import put_in
from qformer.llm.plain_text import adds_bos, single_token
from qformer.schema import QFormerConfig
from qformer.template import AUTO
from qformer.types import UsageError
from qformer.vision.hf import pixel_statistics

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from qformer.schema import Config

NO_SYSTEM = "no whole model can be read from {where} ({reason}); give a folder that save_pretrained has written"
OLDER_IMAGE = "<image>"  # in chat templates of the first folders of InternVL, in place of its own word
MARKERS = "markers."  # begins the names of vectors that were trained for markers
PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def open_system(path_or_id: str, theirs: Any, given: LoadOptions) -> OpenCheckpoint:
    """A folder that a system of the table was saved to, or its hub id.

    Args:
        theirs: its configuration in transformers.

    Raises:
        UsageError: tensors are missing or left over, or it is not the system as published.
    """
    system = SYSTEMS[theirs.model_type]
    check(system, theirs, path_or_id)
    values = system.values(theirs)
    folder = pretrained.local_folder(path_or_id)
    values["resolution"] = _agreed(values["resolution"], system.read_processor(folder), path_or_id)
    tokenizer = given.tokenizer or str(folder)
    template, between = _template(system, tokenizer, theirs)
    values["resolution"] |= {"between": between} if between else {}
    how = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = pretrained.read(system.model, folder, NO_SYSTEM, **how)
    if sized := sorted(name for name, *_ in report["mismatched_keys"]):
        raise UsageError(NO_SYSTEM.format(where=f"'{path_or_id}'", reason=f"of another size: {listed(sized, 3)}"))
    if odd := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise UsageError(
            f"'{path_or_id}' is no whole {system.title}: {listed(odd)} missing or left over; save it again"
        )
    left = dict(model.state_dict())
    bridge, missing = take(left, [(name, ours) for ours, name in system.connector])
    bridge |= {name: torch.zeros(theirs.text_config.hidden_size) for name in system.unused}
    seen = _begun(left, system.tower, "")
    llm: dict[str, Tensor] = {}
    for start, ours in system.language:
        llm |= _begun(left, start, ours)
    refuse(missing, list(left), f"'{path_or_id}'", system.title)
    vision, connector, resolution = (
        {"name": name, **values[key]}
        for name, key in zip(system.sections, ("vision", "connector", "resolution"), strict=True)
    )
    precision = PRECISIONS.get(next(iter(seen.values())).dtype, "fp32")
    place = {"path": VISION_FOLDER} if vision["name"] == "hf" else {"weights": VISION_FILE}
    config = parse_config(
        {
            "stage": "stage2",
            "run": path_or_id,
            "vision": {**vision, **place, "precision": precision},
            "connector": connector,
            "resolution": resolution,
            "llm": {"path": LLM_FOLDER, "template": template},
            "data": {"train": {"name": "none"}},  # it was trained elsewhere
            "train": {"steps": 1, "warmup": 0},
        }
    )
    parts = Parts("stage2", bridge, seen, llm, QFormerConfig())
    if system.is_whole:
        return OpenCheckpoint(path_or_id, parts, config, tokenizer, theirs)
    text = theirs.text_config
    text.tie_word_embeddings = theirs.tie_word_embeddings  # the whole model's word counts, not that of the part
    eye = Seen(theirs.vision_config, *pixel_statistics(str(folder), theirs.vision_config.model_type))
    return OpenCheckpoint(path_or_id, parts, config, tokenizer, text, seen=eye)


def _begun(left: dict[str, Tensor], start: str, ours: str) -> dict[str, Tensor]:
    """Move the tensors whose names begin with `start` out of `left`, with another beginning."""
    names = [name for name in left if name.startswith(start)]
    return {ours + name.removeprefix(start): left.pop(name) for name in names}


def _agreed(values: dict[str, Any], processed: dict[str, Any], source: str) -> dict[str, Any]:
    """Options of `resolution` by a model's configuration and by its processor together.

    Raises:
        UsageError: they contradict each other.
    """
    for key in sorted(values.keys() & processed.keys()):
        if values[key] != processed[key]:
            raise UsageError(
                f"the processor and the model in '{source}' are not of one system: resolution.{key} is "
                f"{processed[key]} and {values[key]}; save both again"
            )
    return values | processed


def _template(system: System, tokenizer_of: str, theirs: Any) -> tuple[str, str]:
    """The turns of a system's chat, with the tokens of this tokenizer, and the text between pictures.

    Raises:
        UsageError: the tokenizer lacks a word, or its template fails.
    """
    tokenizer = pretrained.read(AutoTokenizer, tokenizer_of)
    for word in system.markers:
        if single_token(tokenizer, word) is None:
            raise UsageError(
                f"the tokenizer in '{tokenizer_of}' has no token {word}, which stands around the pictures of "
                f"{system.title}; give its own"
            )
    if system.template == AUTO:
        return chat.resolve(AUTO, tokenizer, tokenizer_of), ""
    if system.shows:
        key, usual = system.words[0]
        word = tokenizer.convert_ids_to_tokens(getattr(theirs, key)) or usual
        if found := chat.shown(tokenizer, tokenizer_of, (word, OLDER_IMAGE)):
            return found
    marks = {"{bos}": tokenizer.bos_token if adds_bos(tokenizer) else "", "{eos}": tokenizer.eos_token}
    text = system.template
    for place, token in marks.items():
        text = text.replace(place, token or "")
    return text, "\n" if system.shows else ""


def write_system(opened: OpenCheckpoint, folder: Path) -> None:
    """A folder for the class of transformers that a checkpoint's system has, and its tokenizer.

    Raises:
        UsageError: transformers has no such system, or not with this language model, or a tower of the checkpoint
            cannot be had.
    """
    system = require(opened.config, opened.source)
    hold_towers(opened)
    require_decoder(opened, system)
    parts, eye = opened.parts, opened.seen
    if any(name.startswith(MARKERS) for name in parts.bridge):
        raise UsageError(
            f"the markers of '{opened.source}' are no words of its language model, but vectors of their own, for which "
            f"{system.title} in transformers has no place; use the checkpoint as it is"
        )
    made, missing = take(dict(parts.bridge), list(system.connector))
    homes = {ours for ours, _ in system.connector} | set(system.unused)
    refuse(missing, [n for n in parts.bridge if n not in homes], f"'{opened.source}'", system.title)
    made |= {f"{system.tower}{name}": tensor for name, tensor in parts.vision.items()}
    for start, ours in system.language:
        made |= {start + n.removeprefix(ours): tensor for n, tensor in parts.llm.items() if n.startswith(ours)}
    tokenizer = load_tokenizer(opened)
    check_words(opened, tokenizer)
    config = system.theirs(opened.config, eye and eye.config, opened.llm)
    for key, word in system.words:
        if tokenizer.convert_tokens_to_ids(word) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([word], special_tokens=True)
        setattr(config, key, tokenizer.convert_tokens_to_ids(word))
    config.dtype = next(iter(parts.llm.values())).dtype
    with torch.device("meta"):
        model = system.model(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if odd := [name for name in made if name in shapes and shapes[name] != made[name].shape]:
        raise UsageError(f"{system.title} in transformers has no place for tensors of these sizes: {listed(odd)}")
    put_in(model, made, f"'{opened.source}' as {system.title} in transformers")
    rows = model.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):  # the word is only a place: the mean of all words is never the likeliest
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight.data[rows:] = table.weight.data[:rows].float().mean(dim=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    system.write_processor(opened, folder)


def require(config: Config, source: str) -> System:
    """The system of the table that a configuration is made of.

    Raises:
        UsageError: there is none.
    """
    if (system := system_of(config)) is None:
        raise UsageError(
            f"transformers has no place for the connector of '{source}', '{config.connector.name}', with the image "
            f"encoder '{config.vision.name}' and the resolution '{config.resolution.name}'; use the checkpoint as it is"
        )
    return system


def require_decoder(opened: OpenCheckpoint, system: System) -> None:
    """Check that the language model has its layers where the classes of systems look for them, as a Llama has.

    Raises:
        UsageError: it has not, such as OPT or T5.
    """
    if not any(f"{ours}embed_tokens.weight" in opened.parts.llm for _, ours in system.language):
        kind = "" if opened.llm is None else f" '{opened.llm.model_type}'"
        raise UsageError(
            f"{system.title} in transformers takes a language model like Llama or Qwen2, and that of "
            f"'{opened.source}' is of another kind{kind}; use the checkpoint as it is"
        )


def hold_towers(opened: OpenCheckpoint) -> None:
    """Fetch the towers that a checkpoint of a system leaves out, whole.

    Raises:
        UsageError: they cannot be had.
    """
    if opened.config.vision.name != "hf":
        opened.hold_towers()
        return
    if opened.seen is None:
        if opened.parts.vision:
            raise UsageError(
                f"'{opened.source}' has trained its image encoder and holds a part of it; use the checkpoint as it is"
            )
        path = pretrained.tower(opened.config.vision.options["path"])
        tower = pretrained.read(AutoModel, path, NO_SYSTEM, dtype="auto")
        tower_config = getattr(tower.config, "vision_config", tower.config)
        opened.parts.vision = getattr(tower, "vision_model", tower).state_dict()
        opened.seen = Seen(tower_config, *pixel_statistics(path, tower_config.model_type))
    opened.hold_language_model()
