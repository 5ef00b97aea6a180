"""Converters of what packages hold to folders of transformers. Their libraries are the extra `real`.

Each takes the folder of the extracted members and the folder to write, whose `model.safetensors` has the same bytes on
every machine.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, GgufConfig

from qformer.files import pretrained
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEAD = 64  # width of a head in every DINOv2
BACKBONE = "backbone."
FRONT, PLACES = "onnx::Concat", "onnx::Reshape"  # of the position table, split by the exporter
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@dataclass(frozen=True)
class Converter:
    """A function of the source and target folder, and the packages of the extra `real` that it imports."""

    run: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


def copy_folder(source: Path, target: Path) -> None:
    """Take a folder of transformers as it is."""
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)


def convert_dinov2(source: Path, target: Path) -> None:
    """Turn a graph that holds DINOv2 under `backbone.` into a folder of `Dinov2Model`, in fp32 and bit by bit.

    Raises:
        UsageError: the graph names files beside it, or holds no such backbone.
    """
    import onnx
    from onnx import numpy_helper

    (file,) = source.glob("*.onnx")
    graph = onnx.load(str(file), load_external_data=False).graph
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer):
        raise UsageError(f"'{file.name}' keeps tensors in other files, which are not read; fetch another package")
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inputs = [(node.name, node.input[1]) for node in graph.node if node.op_type == "MatMul" and len(node.input) > 1]
    weights = name_weights(held, inputs)
    config = Dinov2Config(**describe_dinov2(weights), architectures=["Dinov2Model"], dtype="float32")
    config.save_pretrained(target)
    (target / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2), encoding="utf-8")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def name_weights(held: dict[str, np.ndarray], products: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Name the constants of an exported graph as the hub's files of DINOv2 do.

    The exporter transposes the matrix of a linear layer and gives it a number for a name, but the node that multiplies
    by it is named after the layer. It splits the position table in two. The mask token, which no encoding of images
    uses, is not exported, and becomes zeros.

    Args:
        held: constants by name.
        products: name of each matrix product, and of its second factor.
    """
    weights = {name.removeprefix(BACKBONE): array for name, array in held.items() if name.startswith(BACKBONE)}
    for node, factor in products:
        if factor in held and node.startswith("/backbone/"):
            layer = node.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = np.ascontiguousarray(held[factor].T)
    parts = [[array for name, array in held.items() if name.startswith(start)] for start in (FRONT, PLACES)]
    if [len(part) for part in parts] != [1, 1] or "embeddings.cls_token" not in weights:
        raise UsageError("the graph is not a DINOv2 as PyTorch exports it; fetch another package")
    weights["embeddings.position_embeddings"] = np.concatenate([parts[0][0], parts[1][0]], axis=1)
    weights["embeddings.mask_token"] = np.zeros_like(weights["embeddings.cls_token"][0])
    return weights


def describe_dinov2(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Read the sizes of a DINOv2 from its tensors."""
    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    places = weights["embeddings.position_embeddings"].shape[1] - 1
    return {
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in weights),
        "num_attention_heads": width // HEAD,
        "patch_size": patch,
        "image_size": math.isqrt(places) * patch,
    }


def convert_gguf(source: Path, target: Path) -> None:
    """Turn a GGUF into a folder of transformers in fp16, with its tokenizer and chat template, by transformers itself.

    Few bits times a scale are exact in fp32, so that all machines round to the same fp16.
    """
    (file,) = source.glob("*.gguf")
    given = {"gguf_file": file.name, "local_files_only": True}
    plain = {"dtype": torch.float16, "quantization_config": GgufConfig(dequantize=True)}
    with pretrained.quiet(), redirect_stderr(io.StringIO()):  # one of its bars heeds nothing else
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **given)
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **given, **plain)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


CONVERTERS: dict[str, Converter] = {
    "folder": Converter(copy_folder),
    "dinov2 in onnx": Converter(convert_dinov2, ("onnx",)),
    "gguf": Converter(convert_gguf, ("gguf",)),
}
