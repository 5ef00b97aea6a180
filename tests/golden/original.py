"""LAVIS 1.0.2 made importable without its twenty unrelated dependencies, and its models at any size, offline.

Read by `make_golden.py` in the environment of the original only. Whatever would be fetched from the network is built
from sizes instead, and every such replacement is one of the functions below; the arithmetic stays LAVIS's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import vocabulary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import BertTokenizer, GPT2Tokenizer, T5TokenizerFast

PACKAGES = ("lavis", "lavis.models", "lavis.processors")
ABSENT = ("cv2", "decord", "webdataset", "spacy")  # video, augmentation, lemmas: nothing that is compared here


def load() -> SimpleNamespace:
    """The modules of LAVIS that are compared, by short names.

    Its packages import every model and every data set they know, so empty ones stand in their place.
    """
    _torchvision_without_kernels()
    found = importlib.util.find_spec("lavis")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("lavis is not here; run this in its own environment, see the top of make_golden.py")
    root = Path(next(iter(found.submodule_search_locations)))
    for name in ABSENT:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    # The registry checks its entries against these, and looks for them on the packages.
    sys.modules["lavis.models"].BaseModel = importlib.import_module("lavis.models.base_model").BaseModel
    base = importlib.import_module("lavis.processors.base_processor")
    sys.modules["lavis.processors"].BaseProcessor = base.BaseProcessor
    wanted = {
        "base": "models.blip2_models.blip2",
        "bert": "models.blip2_models.Qformer",
        "stage1": "models.blip2_models.blip2_qformer",
        "scores": "models.blip2_models.blip2_image_text_matching",
        "opt": "models.blip2_models.blip2_opt",
        "t5": "models.blip2_models.blip2_t5",
        "eva": "models.eva_vit",
        "text": "processors.blip_processors",
        "schedule": "common.optims",
        "vqa": "common.vqa_tools.vqa_eval",
    }
    return SimpleNamespace(**{short: importlib.import_module(f"lavis.{name}") for short, name in wanted.items()})


def _torchvision_without_kernels() -> None:
    """A CUDA build of torchvision beside a CPU build of torch lacks its operators, and only two are asked for."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        load.operators = torch.library.Library("torchvision", "DEF")  # type: ignore[attr-defined]  # kept alive
        for name in ("nms", "qnms"):
            load.operators.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")  # type: ignore[attr-defined]


def start_process_group() -> None:
    """A group of one: the first stage asks for its rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def set_vision(lavis: SimpleNamespace, sizes: dict[str, Any]) -> None:
    """`create_eva_vit_g` with these sizes instead of ViT-g's, and without its download."""

    def create(img_size: int, drop_path_rate: float, use_checkpoint: bool, precision: str) -> nn.Module:
        encoder = lavis.eva.VisionTransformer(
            img_size=img_size,
            patch_size=sizes["patch_size"],
            embed_dim=sizes["width"],
            depth=sizes["depth"],
            num_heads=sizes["heads"],
            mlp_ratio=sizes["mlp_ratio"],
            use_mean_pooling=False,
            qkv_bias=True,
            drop_path_rate=drop_path_rate,
            use_checkpoint=use_checkpoint,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        if precision == "fp16":
            lavis.eva.convert_weights_to_fp16(encoder)
        return encoder

    lavis.base.create_eva_vit_g = create


def set_bert(lavis: SimpleNamespace, sizes: dict[str, Any], tokens: list[str]) -> None:
    """A random BERT of these sizes over this vocabulary where "bert-base-uncased" is asked for."""
    config = {
        "hidden_size": sizes["hidden_size"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["intermediate_size"],
        "max_position_embeddings": sizes["max_positions"],
        "vocab_size": len(tokens),
    }
    written = Path(tempfile.mkdtemp()) / "vocab.txt"
    written.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    lavis.base.BertTokenizer = SimpleNamespace(from_pretrained=lambda name: BertTokenizer(str(written)))
    kind = lavis.bert.BertLMHeadModel
    kind.from_pretrained = staticmethod(lambda name, config: kind(config))
    lavis.bert.BertConfig.from_pretrained = staticmethod(lambda name: lavis.bert.BertConfig(**config))


def set_opt(lavis: SimpleNamespace, sizes: dict[str, Any], tokenizer: Any) -> None:
    """A random OPT of these sizes, and its tokeniser."""
    kind = lavis.opt.OPTForCausalLM
    kind.from_pretrained = staticmethod(lambda name, torch_dtype: kind(lavis.opt.OPTConfig(**sizes)).to(torch_dtype))
    lavis.opt.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name, use_fast: tokenizer)


def set_t5(lavis: SimpleNamespace, sizes: dict[str, Any], tokenizer: Any) -> None:
    """A random gated T5 of these sizes, and its tokeniser."""
    config, kind = lavis.t5.T5Config, lavis.t5.T5ForConditionalGeneration
    config.from_pretrained = staticmethod(lambda name: config(feed_forward_proj="gated-gelu", **sizes))
    kind.from_pretrained = staticmethod(lambda name, config: kind(config))
    lavis.t5.T5TokenizerFast = SimpleNamespace(from_pretrained=lambda name: tokenizer)


def opt_tokenizer(variant: str) -> GPT2Tokenizer:
    """The slow tokeniser that LAVIS asks for (`use_fast=False`): `</s>` in front of every text."""
    folder = Path(tempfile.mkdtemp())
    tokens, merges = vocabulary.byte_level(variant)
    (folder / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return GPT2Tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token="</s>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )


def t5_tokenizer(variant: str) -> T5TokenizerFast:
    """`</s>` behind every text."""
    made = Tokenizer(models.Unigram(vocabulary.unigram(variant), unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    file = Path(tempfile.mkdtemp()) / "tokenizer.json"
    made.save(str(file))
    return T5TokenizerFast(tokenizer_file=str(file), extra_ids=0)


@torch.no_grad()
def fill(model: nn.Module, seed: int, gain: float = 1.6) -> None:
    """Random values that matter, in every parameter: no bias is zero, no norm is one, no two layers are alike.

    Linear weights keep the scale of what flows through them times `gain`; embeddings are large beside them, so that
    another image or another word makes another text. Tied parameters are one parameter and are filled once.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "temp":
            value = torch.tensor(0.09)
        elif parameter.ndim == 1:
            is_scale = name.endswith("weight")  # of a norm: no other weight has one dimension
            value = 0.15 * noise + is_scale
        elif "position" in name or "relative_attention_bias" in name:
            value = noise  # small ones would let a random model repeat one token for ever
        elif any(part in name for part in ("embed", "query_tokens", "cls_token", "shared")):
            value = 0.5 * noise
        else:
            value = gain * noise / parameter[0].numel() ** 0.5
        parameter.copy_(value.to(parameter.dtype))


def fill_telling(
    model: nn.Module, output: nn.Linear, end: int, write: Callable[[], list[torch.Tensor]], gain: float = 1.6
) -> None:
    """`fill` with the first seed for which the texts that the model writes tell right from wrong.

    Whatever the way of writing, some text must end by itself, and not all may be equally long; `end` is favoured, being
    otherwise one token of hundreds. Two ways at least must differ, of which one is greedy.
    """
    for seed in range(1, 1000):
        fill(model, seed, gain)
        with torch.no_grad():
            output.weight[end] *= 2
        written = [ids.tolist() for ids in write()]
        ways = [[row[: row.index(end)] if end in row else row for row in rows] for rows in written]
        some_end = all(any(end in row for row in rows) for rows in written)
        lengths = [{len(row) for row in rows} for rows in ways]
        if some_end and all(len(found) > 1 for found in lengths) and ways[0] != ways[1]:
            print(f"seed {seed}")
            return
    raise SystemExit("no seed makes the model write texts of different lengths")
