"""State dicts of LAVIS taken apart and put together again, to the bit; and what is no such state dict."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from torch import Tensor

from qformer import vision
from qformer.checkpoints import hugging_face
from qformer.checkpoints.lavis import from_lavis, to_lavis, tower
from qformer.checkpoints.names import POSITION_IDS, REPEATED, bridge_rows
from qformer.types import UsageError
from qformer.vision.clip import clip_names
from qformer.vision.eva import eva_rows
from tests.golden.golden import HERE, read

MODELS = ("stage1_a", "stage1_b", "opt_a", "opt_b", "t5_a", "t5_b")
TOWERS = ("visual_encoder.", "opt_model.", "t5_model.")
CLIP = {"image_size": 28, "patch_size": 14, "width": 24, "depth": 2, "heads": 3, "mlp_hidden": 40}


def weights(name: str) -> dict[str, Tensor]:
    return read(name).weight


def without_towers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(TOWERS)}


def with_tower(name: str, encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {key: tensor for key, tensor in weights(name).items() if not key.startswith("visual_encoder.")}
    return kept | {f"visual_encoder.{key}": tensor for key, tensor in encoder.items()}


def eva(blocks: int) -> dict[str, Tensor]:
    """An encoder, the same for every number of blocks as far as both have them."""
    sizes = {"image_size": 28, "patch_size": 14, "width": 4, "heads": 2, "mlp_hidden": 6, "precision": "fp32"}
    state = vision.build("eva", depth=blocks, **sizes).state_dict()
    return {name: torch.full_like(tensor, index / 7) for index, (name, tensor) in enumerate(state.items())}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


def refused(tensors: dict[str, Tensor], *expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_lavis(tensors)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("towers", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_lavis_comes_back_to_the_bit(name: str, towers: bool) -> None:
    tensors = weights(name) if towers else without_towers(weights(name))
    parts = from_lavis(tensors)
    assert parts.family == {"stage1": None}.get(name[:-2], name[:-2])
    assert parts.stage == ("stage1" if name.startswith("stage1") else "stage2")
    assert (parts.tower, bool(parts.vision)) == ("eva" if towers else None, towers)
    assert bool(parts.llm) == (towers and parts.stage == "stage2")
    same(to_lavis(parts), tensors)


@pytest.mark.parametrize(
    ("name", "dtype"), [("stage1_a", torch.float16), ("opt_a", torch.half), ("t5_b", torch.bfloat16)]
)
def test_every_tensor_keeps_its_dtype(name: str, dtype: torch.dtype) -> None:
    """As in the releases: the weights of the image encoder in half, those of the language model in 16 bits."""
    tensors = {
        key: tensor.to(dtype) if key.startswith(TOWERS) and key.endswith(".weight") else tensor
        for key, tensor in weights(name).items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {dtype, torch.float32, torch.int64}
    same(to_lavis(from_lavis(tensors)), tensors)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_read_from_the_tensors(name: str) -> None:
    about = read(name).about
    sizes = from_lavis(weights(name), heads=about["qformer"]["heads"]).sizes
    known = about["qformer"] | {"queries": about["queries"], "encoder_width": about["vision"]["width"]}
    if name.startswith("stage1"):
        known["vocab_size"] = len(weights(name)["Qformer.bert.embeddings.word_embeddings.weight"])
    known["cross_attention_every"] = about.get("cross_attention_every", 2)
    assert {key: getattr(sizes, key) for key in known} == known
    without = without_towers(weights(name))
    assert from_lavis(without, heads=about["qformer"]["heads"]).sizes == sizes
    if sizes.hidden_size == 32:
        assert from_lavis(without).sizes.heads == 1  # as BERT's, 64 numbers wide, or one


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^qformer\.hidden_size 32 does not divide into 5 heads"):
        from_lavis(weights("stage1_a"), heads=5)


def test_position_ids_may_be_missing() -> None:
    """Later transformers do not store them; a file of ours has them again."""
    for name in ("stage1_b", "opt_b"):
        tensors = weights(name)
        kept = {key: tensor for key, tensor in tensors.items() if key != POSITION_IDS}
        made = to_lavis(from_lavis(kept))
        assert made.keys() == tensors.keys()
    assert made[POSITION_IDS].shape == (1, 512)  # of no use in stage two


def test_what_is_missing_and_left_over_is_listed_at_once() -> None:
    for name, prefix in (("stage1_a", None), ("opt_b", "opt_proj"), ("t5_a", "t5_proj")):
        tensors = weights(name)
        gone = ["Qformer.bert.encoder.layer.1.attention.self.key.bias", "ln_vision.weight", "visual_encoder.cls_token"]
        gone += [f"{prefix}.bias"] if prefix else ["Qformer.cls.predictions.transform.LayerNorm.bias", "temp"]
        for key in gone:
            del tensors[key]
        more = ["Qformer.bert.pooler.dense.weight", "visual_encoder.blocks.0.attn.k_bias", "momentum.queue"]
        tensors |= dict.fromkeys(more, torch.zeros(1))
        missing, left = ", ".join(sorted(gone)), ", ".join(sorted(more))
        refused(tensors, f"missing {missing}; left over {left};")


def test_long_lists_are_cut() -> None:
    tensors = weights("opt_a") | {f"other.{index:02}": torch.zeros(1) for index in range(33)}
    refused(tensors, "missing nothing; left over other.00, ", "other.19 and 13 more;")


@pytest.mark.parametrize("name", REPEATED)
def test_a_repeated_tensor_that_differs_is_refused(name: str) -> None:
    tensors = weights("stage1_a")
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] += 1e-3
    refused(tensors, f"'{name}' differs from '{REPEATED[name]}'")
    del tensors[name]
    assert from_lavis(tensors).bridge.keys() == from_lavis(weights("stage1_a")).bridge.keys()


def test_a_repeated_tensor_does_not_stand_in_for_the_first() -> None:
    tensors = weights("stage1_a")
    del tensors["Qformer.bert.embeddings.word_embeddings.weight"]
    refused(
        tensors,
        "missing Qformer.bert.embeddings.word_embeddings.weight;",
        "left over Qformer.cls.predictions.decoder.weight;",
    )


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(2)},
        {"query_tokens": torch.zeros(1, 2, 4)},
        {"itm_head.weight": torch.zeros(2, 4)},
        {"query_tokens": torch.zeros(1, 2, 4), "llama_proj.weight": torch.zeros(2, 4)},
    ],
)
def test_what_is_no_blip2_is_said_to_be_none(tensors: dict[str, Tensor]) -> None:
    refused(tensors, "these tensors are no BLIP-2 of LAVIS")


def test_a_qformer_without_cross_attention_is_refused() -> None:
    tensors = {name: tensor for name, tensor in weights("opt_a").items() if ".layer.0.crossattention." not in name}
    refused(tensors, "no Q-Former whose first layer has cross-attention")


def test_the_last_block_of_eva_is_dropped_but_no_other() -> None:
    """BLIP-2 does not run the released 40th; an encoder of fewer is taken as it is."""
    whole = eva(40)
    parts = from_lavis(with_tower("stage1_a", whole))
    same(parts.vision, {name: tensor for name, tensor in whole.items() if not name.startswith("blocks.39.")})
    assert parts.vision.keys() == {name for name, _ in eva_rows(39)}
    same(tower(whole), parts.vision)
    same(from_lavis(with_tower("stage1_a", eva(38))).vision, eva(38))
    refused(with_tower("stage1_a", eva(41)), "missing nothing; left over visual_encoder.blocks.40.attn.proj.bias, ")
    gap = {name: tensor for name, tensor in eva(4).items() if not name.startswith("blocks.2.")}
    refused(with_tower("stage1_a", gap), "missing visual_encoder.blocks.2.attn.proj.bias, ", "left over nothing;")


def test_eva_may_bring_its_head_and_nothing_else() -> None:
    norm = {f"visual_encoder.{name}": torch.ones(4) for name in ("norm.weight", "norm.bias", "fc_norm.weight")}
    tensors = with_tower("stage1_a", eva(2))
    same(from_lavis(tensors | norm).vision, eva(2))
    refused(tensors | {"visual_encoder.norm2.weight": torch.ones(4)}, "left over visual_encoder.norm2.weight;")


@pytest.mark.parametrize("name", ["stage1_a", "opt_a", "t5_a"])
def test_lavis_with_a_clip_comes_back_to_the_bit(name: str) -> None:
    encoder = vision.build("clip", **CLIP).state_dict()
    assert {tensor.dtype for tensor in encoder.values()} == {torch.float16, torch.float32}
    tensors = with_tower(name, encoder)
    parts = from_lavis(tensors)
    assert parts.tower == "clip"
    same(parts.vision, encoder)
    same(to_lavis(parts), tensors)
    with pytest.raises(UsageError, match="has a CLIP, for which it has no place"):
        hugging_face.to_transformers(parts)
    refused(tensors | {"visual_encoder.proj": torch.ones(4)}, "left over visual_encoder.proj;")


def test_towers_of_their_own_files() -> None:
    sizes = CLIP | {"depth": 24, "width": 4, "heads": 2, "mlp_hidden": 6}
    clip = vision.build("clip", **sizes).state_dict()
    end = {"ln_post.weight": torch.ones(4), "ln_post.bias": torch.zeros(4), "proj": torch.ones(4, 3)}
    taken = tower(clip | end)
    assert [*taken] == clip_names(23)
    with pytest.raises(
        UsageError, match=r"the image encoder does not fit .* left over visual_encoder.text_projection;"
    ):
        tower(clip | {"text_projection": torch.ones(4)})
    with pytest.raises(UsageError, match=r"missing visual_encoder\.blocks\.0"):
        tower({name: tensor for name, tensor in eva(2).items() if not name.startswith("blocks.0")})
    with pytest.raises(UsageError, match=r"missing visual_encoder\.cls_token, .* left over visual_encoder\.weight;"):
        tower({"weight": torch.ones(2)})


@pytest.mark.parametrize(
    ("name", "family", "count"), [("stage1", None, 857), ("opt2.7b", "opt", 1288), ("flant5xl", "t5", 1331)]
)
def test_names_are_those_of_the_original_at_full_size(name: str, family: str | None, count: int) -> None:
    """Taken apart and put together, on tensors without memory, every name of the original comes back."""
    keys = json.loads(gzip.decompress((HERE / "keys.json.gz").read_bytes()))[name]
    tensors = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (dtype, shape, _) in keys.items()
    }
    for repeated in REPEATED:  # the meta device has no values to compare
        tensors.pop(repeated, None)
    parts = from_lavis(tensors)
    assert parts.family == family
    sizes = parts.sizes
    assert (sizes.layers, sizes.heads, sizes.queries, sizes.encoder_width) == (12, 12, 32, 1408)
    names = {lavis for _, lavis, _ in bridge_rows(sizes, parts.stage, family)}
    assert parts.bridge.keys() == {ours for ours, _, _ in bridge_rows(sizes, parts.stage, family)}
    assert names | {f"visual_encoder.{ours}" for ours, _ in eva_rows(39)} <= keys.keys()
    made = to_lavis(parts)
    assert len(made) == count
    assert {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in made.items()} == {
        key: value[:2] for key, value in keys.items()
    }
