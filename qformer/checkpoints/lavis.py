"""Files of LAVIS: one state dict (BLIP-2, arXiv 2301.12597, and its release 1.0.2), read and written.

What a file leaves out (its frozen towers) and what tensors cannot tell (heads) is given by the caller, or is what the
releases were made with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qformer.checkpoints.names import POSITION_IDS, REPEATED, SPARE, Stage, bridge_rows
from qformer.checkpoints.parts import (
    FAMILIES,
    LLM_FOLDER,
    LoadOptions,
    OpenCheckpoint,
    Parts,
    bare,
    common_values,
    count,
    drop_numbers,
    read_sizes,
    take,
    tower_choice,
)
from qformer.config import parse_config
from qformer.files import releases
from qformer.files.pretrained import configuration
from qformer.files.tensors import read_tensors, refuse
from qformer.types import UsageError
from qformer.vision.clip import CLIP_RELEASED_DEPTH, clip_names, clip_unused
from qformer.vision.eva import EVA_RELEASED_DEPTH, eva_rows, eva_unused

if TYPE_CHECKING:
    from collections.abc import Mapping


def from_lavis(tensors: Mapping[str, Tensor], heads: int | None = None) -> Parts:
    """The parts of a state dict of LAVIS: `Blip2Qformer`, `Blip2OPT` or `Blip2T5`, with its towers or without.

    Args:
        tensors: as under `model` in a `.pth` file.
        heads: of the Q-Former; by default one for 64 numbers of its width, as in BERT.

    Raises:
        UsageError: it is none of them, or tensors are missing, left over or of unequal sizes.
    """
    tensors = bare(tensors, "query_tokens")
    family = next((known for known in FAMILIES if f"{known}_proj.weight" in tensors), None)
    if "query_tokens" not in tensors or (family is None and "itm_head.weight" not in tensors):
        raise UsageError("these tensors are no BLIP-2 of LAVIS: no query_tokens, or neither itm_head nor a projection")
    left = dict(tensors)
    positions = _drop_repeated(left)
    drop_numbers(left)
    sizes = read_sizes(left, "lavis", heads, positions)
    stage: Stage = "stage2" if family else "stage1"
    bridge, missing = take(left, [(lavis, ours) for ours, lavis, _ in bridge_rows(sizes, stage, family) if lavis])
    vision, lacking = _vision_from_lavis(left)
    prefix = f"{family}_model."
    llm = {name.removeprefix(prefix): left.pop(name) for name in list(left) if family and name.startswith(prefix)}
    if all(name.endswith(SPARE) for name in llm):
        llm = {}
    refuse(missing + lacking, list(left), "the LAVIS checkpoint")
    return Parts(stage, bridge, vision, llm, sizes, family)


def _drop_repeated(left: dict[str, Tensor]) -> int | None:
    """Remove what a LAVIS file says twice; the number of positions if it says so.

    Raises:
        UsageError: it does not say the same both times.
    """
    for name, first in REPEATED.items():
        if name in left and first in left and not torch.equal(left.pop(name), left[first]):
            raise UsageError(f"'{name}' differs from '{first}', to which it is tied in BLIP-2; this is another model")
    numbers = left.pop(POSITION_IDS, None)
    return None if numbers is None else numbers.shape[-1]


def _vision_from_lavis(left: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The image encoder of a LAVIS file by our names, and names that are missing; nothing where there is none."""
    start = "visual_encoder."
    names = [name.removeprefix(start) for name in left if name.startswith(start)]
    if "class_embedding" in names:
        depth = count(names, r"transformer\.resblocks\.(\d+)\.")
        return take(left, [(start + name, name) for name in clip_names(depth)])
    if not names:
        return {}, []
    depth = min(count(names, r"blocks\.(\d+)\."), EVA_RELEASED_DEPTH - 1)
    for name in eva_unused(depth):
        left.pop(start + name, None)
    return take(left, [(start + name, name) for name, _ in eva_rows(depth)])


def tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an image encoder's own file that BLIP-2 uses, to stand as `Parts.vision`.

    Raises:
        UsageError: they are no EVA and no CLIP.
    """
    tensors = bare(tensors, "cls_token", "class_embedding")
    left = {f"visual_encoder.{name}": tensor for name, tensor in tensors.items()}
    if "visual_encoder.class_embedding" in left:
        depth = min(count(list(tensors), r"transformer\.resblocks\.(\d+)\."), CLIP_RELEASED_DEPTH - 1)
        for name in clip_unused(depth):
            left.pop(f"visual_encoder.{name}", None)
    taken, missing = _vision_from_lavis(left)
    refuse(missing, list(left), "the image encoder")
    return taken


def to_lavis(parts: Parts) -> dict[str, Tensor]:
    """The state dict of LAVIS, with what it repeats; the inverse of `from_lavis`.

    Raises:
        UsageError: the parts come from a form that lacks tensors which LAVIS has.
    """
    left = dict(parts.bridge)
    rows = bridge_rows(parts.sizes, parts.stage, parts.family)
    made, missing = take(left, [(ours, lavis) for ours, lavis, _ in rows if lavis])
    refuse(missing, list(left), "the bridge")
    made |= {name: made[first] for name, first in REPEATED.items() if first in made}
    made[POSITION_IDS] = torch.arange(parts.sizes.max_positions)[None]
    made |= {f"visual_encoder.{name}": tensor for name, tensor in parts.vision.items()}
    return made | {f"{parts.family}_model.{name}": tensor for name, tensor in parts.llm.items()}


BERT = "bert-base-uncased"
#: Language models by family and width, for files of LAVIS that leave theirs out.
USUAL = {
    ("opt", 2560): "facebook/opt-2.7b",
    ("opt", 4096): "facebook/opt-6.7b",
    ("t5", 2048): "google/flan-t5-xl",
    ("t5", 4096): "google/flan-t5-xxl",
}
TOWERS = {1408: {"name": "eva", "weights": "eva_vit_g"}, 1024: {"name": "clip", "weights": "clip_vit_L"}}  # by width


def open_lavis(path: Path, given: LoadOptions) -> OpenCheckpoint:
    """A `.pth` file of LAVIS.

    Raises:
        UsageError: no BLIP-2 is in it, or what it leaves open is not known.
    """
    parts = from_lavis(read_tensors(path), given.heads)
    source = str(path)
    if not parts.vision and given.vision is not None:
        parts.vision = tower(read_tensors(releases.local(given.vision)))
    if parts.vision:
        choice = tower_choice(parts, given.vision_heads, given.patch_size)
    elif (width := parts.sizes.encoder_width) in TOWERS:
        choice = TOWERS[width]
    else:
        raise UsageError(f"'{source}' comes without its image encoder; give the encoder's file with vision")
    values = common_values(parts, source, choice)
    if parts.stage == "stage1":
        return OpenCheckpoint(source, parts, parse_config(values), given.tokenizer or BERT)
    release, width = releases.of_file(path), len(parts.bridge["connector.projection.weight"])
    llm = given.llm or (release.llm if release else None) or USUAL.get((parts.family or "", width))
    if llm is None:
        raise UsageError(f"'{source}' was made for a language model of width {width}; say which one with llm")
    values["llm"] = {"path": LLM_FOLDER if parts.llm else llm, "prompt": release.prompt if release else ""}
    opened = OpenCheckpoint(source, parts, parse_config(values), given.tokenizer or llm)
    if parts.llm:
        opened.llm = configuration(llm)
    return opened


def write_lavis(opened: OpenCheckpoint, path: Path) -> None:
    """A `.pth` file of LAVIS.

    Raises:
        UsageError: LAVIS has no place for this language model or image encoder.
    """
    config, parts = opened.config, opened.parts
    if parts.stage == "stage2" and parts.family is None:
        raise UsageError("BLIP-2 in LAVIS has an OPT or a T5, and this checkpoint another language model")
    if config.vision.name not in ("eva", "clip"):
        raise UsageError(f"BLIP-2 in LAVIS sees with EVA or CLIP, and this checkpoint with '{config.vision.name}'")
    torch.save({"model": to_lavis(parts)}, path)
