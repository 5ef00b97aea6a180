"""Image encoders from scratch: their sizes, their first weights, and the folders that they are saved as."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, ViTModel

from qformer.files import pretrained
from qformer.stages.towers.build import build_vit
from qformer.types import UsageError
from qformer.vision.hf import HALF, HFVisionEncoder
from qformer.vision.options import Qwen2VLConfig

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.config import BackboneConfig
    from qformer.vision.base import VisionEncoder
    from qformer.vision.qwen2vl import Qwen2VLViT

#: Parts of a ViT's layers as transformers has named them since 5.0, behind their names before.
RENAMED = (
    ("encoder.layer.", "layers."),
    *((f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value")),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
#: Parts of a block, and their names in a layer of a ViT; queries, keys and values are apart there.
PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def build_encoder(config: BackboneConfig) -> VisionEncoder:
    """Build an image encoder with random weights: a ViT, or, for the kind `rope`, a tower of Qwen2-VL's form."""
    if config.kind != "rope":
        return HFVisionEncoder(build_vit(config), -1, *HALF)
    return Qwen2VLConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.width,
        depth=config.layers,
        heads=config.heads,
        mlp_hidden=config.intermediate or 4 * config.width,
    ).build()


@torch.no_grad()
def start_encoder(encoder: VisionEncoder, path: str) -> None:
    """Give an encoder of `build_encoder` the weights of a ViT of the same sizes.

    One without a table of positions takes what it has a place for: patches and blocks, but no final norm.

    Args:
        path: folder, or name of a tower.

    Raises:
        UsageError: it is no ViT, or one of other sizes.
    """
    sentence = "backbone.start '{path}' is no ViT ({reason}); give a folder or hub id of one"
    former: Any = pretrained.read(ViTModel, path, sentence, dtype=torch.float32, add_pooling_layer=False)
    state = former.state_dict()
    target: nn.Module = encoder.tower if isinstance(encoder, HFVisionEncoder) else encoder
    if not isinstance(encoder, HFVisionEncoder):
        state = _as_rope(state, cast("Qwen2VLViT", encoder).temporal_patch)
    own = {name: list(tensor.shape) for name, tensor in target.state_dict().items() if name in state}
    for name, tensor in state.items():
        if own.get(name) != list(tensor.shape):
            raise UsageError(
                f"backbone.start '{path}' has other sizes: its weight '{name}' has the shape {list(tensor.shape)}, and "
                f"{own.get(name)} is needed; give backbone the sizes of that tower"
            )
    target.load_state_dict(state, strict=False)


def _as_rope(state: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """Rename the weights of a ViT as those of a tower of Qwen2-VL's form, whose patches have several frames."""
    for former, name in RENAMED:
        state = {key.replace(former, name): tensor for key, tensor in state.items()}
    patches = state["embeddings.patch_embeddings.projection.weight"]
    found = {"patch_embed.proj.weight": (patches / frames)[:, :, None].repeat(1, 1, frames, 1, 1)}
    for layer in range(sum(key.endswith("layernorm_before.weight") for key in state)):
        for end in ("weight", "bias"):
            heads = [state[f"layers.{layer}.attention.{name}_proj.{end}"] for name in "qkv"]
            found[f"blocks.{layer}.attn.qkv.{end}"] = torch.cat(heads)
            for own, given in PARTS.items():
                found[f"blocks.{layer}.{own}.{end}"] = state[f"layers.{layer}.{given}.{end}"]
    return found


def save_vit(vit: Any, image_size: int, folder: Path) -> None:
    """Write a ViT as an ordinary folder of transformers."""
    vit.save_pretrained(folder)
    statistics = {"image_mean": HALF[0], "image_std": HALF[1], "size": image_size}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics, indent=1), encoding="utf-8")


def save_rope(tower: Qwen2VLViT, folder: Path) -> None:
    """Write a tower under the names that it has in a Qwen2-VL of transformers, with its sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    width = tower.patch_embed.proj.out_channels
    hidden = tower.get_submodule("blocks.0.mlp.fc1").get_parameter("weight").shape[0]
    sizes = {
        "depth": len(tower.blocks),
        "embed_dim": width,
        "num_heads": width // tower.head_width,
        "mlp_ratio": hidden / width,
        "patch_size": tower.patch_size,
        "temporal_patch_size": tower.temporal_patch,
        "spatial_merge_size": tower.merge,
    }
    dtype = str(tower.patch_embed.proj.weight.dtype).removeprefix("torch.")
    config = {"model_type": "qwen2_vl", "dtype": dtype, "vision_config": {"model_type": "qwen2_vl", **sizes}}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    state = {f"visual.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def ship_encoder(kind: str, source: Path, target: Path) -> None:
    """Copy an image encoder of this `backbone.kind` with fp16 weights, and what says how pictures are read."""
    target.mkdir(parents=True, exist_ok=True)
    if kind == "rope":
        halves = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
        save_file(halves, target / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").write_text(json.dumps({**config, "dtype": "float16"}, indent=1), encoding="utf-8")
    elif kind == "clip":
        pretrained.read(CLIPModel, source, dtype=torch.float16).save_pretrained(target)
        pretrained.read(AutoTokenizer, source).save_pretrained(target)
    else:
        vit = pretrained.read(ViTModel, source, add_pooling_layer=False, dtype=torch.float16)
        vit.save_pretrained(target)
    if kind != "rope":
        shutil.copy(source / "preprocessor_config.json", target)
