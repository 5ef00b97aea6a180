"""Golden tensors of the original: LAVIS 1.0.2, run on tiny random models whose every weight matters.

From a clean checkout, in an environment of its own (Python 3.11; LAVIS needs a transformers of 2023):

    python3.11 -m venv .venv/lavis && .venv/lavis/bin/pip install -U pip &&
    .venv/lavis/bin/pip install --group lavis && .venv/lavis/bin/pip install --no-deps --group lavis-bare &&
    .venv/lavis/bin/python tests/golden/make_golden.py

It takes half a minute on a CPU and writes beside itself:

    stage1_*.safetensors  a model each: `weight/` LAVIS's state dict, `in/` what it was given, `out/` what it computed,
    opt_*.safetensors     `grad/` gradients; sizes and texts as JSON in the metadata
    t5_*.safetensors
    plain.json            what needs no model: learning rates, cleaned texts, VQA answers
    positions.safetensors resized position tables
    keys.json.gz          names, dtypes and shapes of the full-size state dicts, and which of them are trained

`tests/test_against_lavis*.py` hold our code against them, without LAVIS. Everything is float32 on one CPU thread and
in eval mode (no dropout), so that the numbers hold for other machines.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # not the repository: the wheel of LAVIS installs a package called `tests`, too

import golden_plain  # noqa: E402
import original  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import vocabulary  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

TEXTS = [
    "a photo of a cat",
    "two people riding a red bus in the rain",
    "a man is holding a small umbrella",
    "the old train stands at the station",
]
GALLERY = [*TEXTS, "red cat", "a dog on the beach", "on a bus"]
VISION = {
    "a": {"image_size": 28, "patch_size": 14, "width": 24, "depth": 2, "heads": 3, "mlp_ratio": 2.5},
    "b": {"image_size": 48, "patch_size": 16, "width": 30, "depth": 3, "heads": 5, "mlp_ratio": 4.3637},
}
BERT = {
    "a": {"hidden_size": 32, "layers": 4, "heads": 4, "intermediate_size": 48, "max_positions": 40},
    "b": {"hidden_size": 36, "layers": 5, "heads": 6, "intermediate_size": 56, "max_positions": 64},
}
STAGE1 = {
    "a": {"queries": 5, "cross_attention_every": 2, "embed_width": 12, "max_tokens": 16, "batch": 4},
    "b": {"queries": 7, "cross_attention_every": 3, "embed_width": 20, "max_tokens": 9, "batch": 3},
}
OPT = {
    "a": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 36},
    "b": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 44},
}
T5 = {
    "a": {"d_model": 24, "d_kv": 8, "d_ff": 36, "num_layers": 2, "num_heads": 3},
    "b": {"d_model": 32, "d_kv": 6, "d_ff": 44, "num_layers": 3, "num_heads": 4, "num_decoder_layers": 2},
}
SPARE = {"a": 3, "b": 5}  # rows of the language model's vocabulary that its tokeniser does not use
WRITTEN = ("out/greedy", "out/beam", "out/beam_flat", "out/answer")


def save(name: str, model: nn.Module, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One golden file; tied weights are written under each of their names, as LAVIS's checkpoints do."""
    weights = {f"weight/{key}": tensor for key, tensor in model.state_dict().items()}
    grads = {f"grad/{key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
    everything = {key: tensor.detach().clone().contiguous() for key, tensor in (weights | grads | tensors).items()}
    save_file(everything, HERE / f"{name}.safetensors", {"json": json.dumps(metadata)})
    print(f"{name}: {len(everything)} tensors")


def images(variant: str, count: int) -> Tensor:
    """Pixels float[count, 3, side, side] in [0, 1]: LAVIS gets them normalised, ours does that inside."""
    side = VISION[variant]["image_size"]
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(ord(variant)))


def normalised(lavis: SimpleNamespace, pixels: Tensor) -> Tensor:
    return torch.stack([lavis.text.BlipImageBaseProcessor().normalize(image) for image in pixels])


def vision_options(lavis: SimpleNamespace, variant: str) -> dict[str, Any]:
    """Arguments that every model of LAVIS takes; its encoder and BERT become those of the variant."""
    original.set_vision(lavis, VISION[variant])
    original.set_bert(lavis, BERT[variant], vocabulary.bert(variant))
    return {"img_size": VISION[variant]["image_size"], "vit_precision": "fp32"}


# ---- stage one


def stage1(lavis: SimpleNamespace, variant: str) -> None:
    """Losses and gradients with known negatives, scores, features, captions, retrieval."""
    sizes = STAGE1[variant]
    torch.manual_seed(0)
    model = lavis.scores.Blip2ITM(
        num_query_token=sizes["queries"],
        cross_attention_freq=sizes["cross_attention_every"],
        embed_dim=sizes["embed_width"],
        max_txt_len=sizes["max_tokens"],
        **vision_options(lavis, variant),
    ).eval()
    batch = sizes["batch"]
    pixels, texts = images(variant, batch), TEXTS[:batch]
    image, output = normalised(lavis, pixels), model.Qformer.cls.predictions.decoder

    def write() -> list[Tensor]:
        *ids, _ = captions(model, image).values()
        return ids

    original.fill_telling(model, output, model.tokenizer.sep_token_id, write)
    out = stage1_losses(lavis, model, pixels, texts)
    with torch.no_grad():
        out |= stage1_inference(lavis, model, pixels, texts)
        out |= captions(model, image)
        out |= retrieval(lavis, model, images(variant, 5), GALLERY, k=3)
    metadata = {"vision": VISION[variant], "qformer": BERT[variant], **sizes, "texts": texts}
    metadata |= {"gallery": GALLERY, "k": 3, "variant": variant}
    save(f"stage1_{variant}", model, metadata, {"in/pixels": pixels, "in/gallery": images(variant, 5)} | out)


def stage1_losses(lavis: SimpleNamespace, model: Any, pixels: Tensor, texts: list[str]) -> dict[str, Tensor]:
    """One training step with its gradients.

    The draws are replaced: text b gets image b - 1, image b gets text b + 1. What they would have been drawn by is
    kept, since it tells the similarity matrix.
    """
    batch, weights = len(texts), []
    forced = [*((b - 1) % batch for b in range(batch)), *((b + 1) % batch for b in range(batch))]
    kept = torch.multinomial

    def draw(row: Tensor, count: int) -> Tensor:
        weights.append(row.clone())
        return torch.tensor([forced[len(weights) - 1]])

    watched = (model.visual_encoder, model.ln_vision, model.itm_head, model.vision_proj, model.text_proj)
    torch.multinomial = draw
    with Watch(*watched) as seen:
        # Blip2ITM is the first-stage model with another forward.
        losses = lavis.stage1.Blip2Qformer.forward(model, {"image": normalised(lavis, pixels), "text_input": texts})
    torch.multinomial = kept
    vit, embeds, matched, image_rows, text_rows = (rows[0] for rows in seen)
    losses.loss.backward()
    tokens = model.tokenizer(
        texts, padding="max_length", truncation=True, max_length=model.max_txt_len, return_tensors="pt"
    )
    return {
        "in/ids": tokens.input_ids,
        "in/mask": tokens.attention_mask,
        "in/negative_images": torch.tensor(forced[:batch]),
        "in/negative_texts": torch.tensor(forced[batch:]),
        "out/draws_t2i": torch.stack(weights[:batch]),
        "out/draws_i2t": torch.stack(weights[batch:]),
        "out/vit": vit,
        "out/image_embeds": embeds,
        "out/image_feats": F.normalize(image_rows, dim=-1),
        "out/text_feats": F.normalize(text_rows, dim=-1),
        "out/itm_logits": matched.mean(dim=1),
        "out/losses": torch.stack([losses.loss, losses.loss_itc, losses.loss_itm, losses.loss_lm]),
    }


def stage1_inference(lavis: SimpleNamespace, model: Any, pixels: Tensor, texts: list[str]) -> dict[str, Tensor]:
    """Scores of every image with every text, and the three feature modes."""
    image = normalised(lavis, pixels)
    both = {"image": image, "text_input": texts}
    scores: dict[str, list[Tensor]] = {"itm": [], "itc": []}
    for i in range(len(image)):
        for text in texts:  # one by one: LAVIS does not pad here
            for head, rows in scores.items():
                rows.append(model({"image": image[i : i + 1], "text_input": [text]}, match_head=head).flatten())
    modes = {mode: model.extract_features(both, mode=mode) for mode in ("image", "text", "multimodal")}
    shape = (len(image), len(texts), -1)
    return {
        "out/itm_scores": torch.cat(scores["itm"]).view(shape),
        "out/itc_scores": torch.cat(scores["itc"]).view(shape[:2]),
        "out/features_image": modes["image"].image_embeds,
        "out/features_image_projected": modes["image"].image_embeds_proj,
        "out/features_text": modes["text"].text_embeds,
        "out/features_text_projected": modes["text"].text_embeds_proj,
        "out/features_multimodal": modes["multimodal"].multimodal_embeds,
    }


def captions(model: Any, image: Tensor) -> dict[str, Tensor]:
    """Ids that the first stage writes itself, greedily and with beams, and at the edge of the least length.

    `free` may end at once; `exact` asks for the length of its shortest text, `over` for one token more.
    """

    def write(**options: int) -> Tensor:
        return written(model.tokenizer, lambda: model.generate({"image": image}, **options))

    end = model.tokenizer.sep_token_id
    free = write(num_beams=1, min_length=1)
    least = min(row.index(end) if end in row else len(row) for row in free.tolist())
    made = {"greedy": write(num_beams=1), "beam": write(), "short": write(max_length=9, min_length=3), "free": free}
    made |= {"exact": write(num_beams=1, min_length=least), "over": write(num_beams=1, min_length=min(least + 1, 30))}
    return {f"out/caption_{name}": ids for name, ids in made.items()} | {"in/least": torch.tensor(least)}


def retrieval(lavis: SimpleNamespace, model: Any, pixels: Tensor, texts: list[str], k: int) -> dict[str, Tensor]:
    """Score matrices of a gallery, as LAVIS's evaluation makes them."""
    image = normalised(lavis, pixels)

    class Loader(list):
        dataset = SimpleNamespace(text=texts, image=list(range(len(image))))

    i2t, t2i = lavis.base.compute_sim_matrix(model, Loader([{"image": image[:3]}, {"image": image[3:]}]), k_test=k)
    return {"out/scores_i2t": torch.from_numpy(i2t), "out/scores_t2i": torch.from_numpy(t2i)}


# ---- stage two


def opt(lavis: SimpleNamespace, variant: str, prompt: str) -> None:
    """Loss, hidden states and gradients with and without a prompt, captions and answers."""
    tokenizer = original.opt_tokenizer(variant)
    sizes = {**OPT[variant], "vocab_size": len(tokenizer) + SPARE[variant], "max_position_embeddings": 96}
    sizes |= {"word_embed_proj_dim": sizes["hidden_size"], "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    original.set_opt(lavis, sizes, tokenizer)
    queries, limit = STAGE1[variant]["queries"], STAGE1[variant]["max_tokens"]
    options = vision_options(lavis, variant)
    model = lavis.opt.Blip2OPT(num_query_token=queries, prompt=prompt, max_txt_len=limit, **options)
    model = model.float().eval()  # the original stores OPT in half
    pixels, texts = images(variant, 3), [f"{prompt} {text}".strip() for text in TEXTS[:3]]
    image, question = normalised(lavis, pixels), "question what is on the beach answer"

    def write() -> list[Tensor]:
        asked = [
            (prompt, {"num_beams": 1, "max_length": 12}),
            (prompt, {"max_length": 12}),
            (prompt, {"max_length": 12, "length_penalty": 0.0}),
            (question, {"max_length": 6, "length_penalty": 0.0}),
            (question, {"max_length": 6, "length_penalty": -1.0}),
        ]
        return [
            written(tokenizer, lambda g=given, o=options: model.generate({"image": image, "prompt": g}, **o))
            for given, options in asked
        ]

    original.fill_telling(model, model.opt_model.lm_head, model.eos_token_id, write)
    with Watch(model.opt_model.model.decoder, model.opt_proj) as seen:
        loss = model({"image": image, "text_input": texts})["loss"]
    loss.backward()
    out = {"out/loss": loss, "out/prefix": seen[1][0], "out/hidden": seen[0][0].last_hidden_state}
    ids = tokenizer(
        [f"{text}\n" for text in texts], truncation=True, max_length=limit, padding=True, return_tensors="pt"
    )
    out |= {"in/ids": ids.input_ids, "in/mask": ids.attention_mask}
    out |= dict(zip((*WRITTEN, "out/answer_paper"), write(), strict=True))
    metadata = {"vision": VISION[variant], "qformer": BERT[variant], "queries": queries, "max_tokens": limit}
    metadata |= {"llm": sizes, "texts": TEXTS[:3], "prompt": prompt, "question": question, "variant": variant}
    save(f"opt_{variant}", model, metadata, {"in/pixels": pixels} | out)


def t5(lavis: SimpleNamespace, variant: str, prompt: str) -> None:
    """Loss, hidden states and gradients of given halves, captions and answers."""
    tokenizer = original.t5_tokenizer(variant)
    sizes = {**T5[variant], "vocab_size": len(tokenizer) + SPARE[variant], "tie_word_embeddings": False}
    sizes |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    original.set_t5(lavis, sizes, tokenizer)
    queries, limit = STAGE1[variant]["queries"], STAGE1[variant]["max_tokens"]
    options = vision_options(lavis, variant)
    model = lavis.t5.Blip2T5(num_query_token=queries, prompt=prompt, max_txt_len=limit, **options)
    model = model.float().eval()  # the original stores T5 in bfloat16
    pixels = images(variant, 3)
    image = normalised(lavis, pixels)
    questions = ["what colour is the bus", "is the cat on the bus", "how many people are riding"]

    def write() -> list[Tensor]:
        given, asked = {"image": image, "prompt": prompt}, {"image": image, "text_input": questions}
        return [
            written(tokenizer, lambda: model.generate(given, max_length=12, num_beams=1)),
            written(tokenizer, lambda: model.generate(given, max_length=12)),
            written(tokenizer, lambda: model.generate(given, max_length=12, length_penalty=0.0)),
            written(tokenizer, lambda: model.predict_answers(asked, prompt="Question: {} Short answer:")),
        ]

    # T5 does not divide its attention scores: with larger weights they leave no doubt.
    original.fill_telling(model, model.t5_model.lm_head, tokenizer.eos_token_id, write, gain=1.0)
    halves = [(" ".join(text.split()[:2]), " ".join(text.split()[2:])) for text in TEXTS[:3]]
    read, target = [first for first, _ in halves], [second for _, second in halves]
    with Watch(model.t5_model.encoder, model.t5_model.decoder, model.t5_proj) as seen:
        loss = model({"image": image, "text_input": read, "text_output": target})["loss"]
    loss.backward()
    out = {"out/loss": loss, "out/prefix": seen[2][0]}
    out |= {"out/encoder": seen[0][0].last_hidden_state, "out/decoder": seen[1][0].last_hidden_state}
    for name, texts in {"read": read, "target": target}.items():
        ids = tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        out |= {f"in/{name}_ids": ids.input_ids, f"in/{name}_mask": ids.attention_mask}
    out |= dict(zip(WRITTEN, write(), strict=True))
    metadata = {"vision": VISION[variant], "qformer": BERT[variant], "queries": queries, "max_tokens": limit}
    metadata |= {"llm": sizes, "read": read, "target": target, "prompt": prompt, "questions": questions}
    save(f"t5_{variant}", model, metadata | {"variant": variant}, {"in/pixels": pixels} | out)


class Watch:
    """Outputs of modules, call by call, while it is open."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules

    def __enter__(self) -> list[list[Any]]:
        seen: list[list[Any]] = [[] for _ in self.modules]
        self.hooks = [
            module.register_forward_hook(lambda _m, _i, output, rows=rows: rows.append(output))
            for module, rows in zip(self.modules, seen, strict=True)
        ]
        return seen

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def written(tokenizer: Any, run: Callable[[], Any]) -> Tensor:
    """The ids that a generation hands to its tokeniser."""
    kept: list[Tensor] = []
    decode = tokenizer.batch_decode

    def keep(ids: Tensor, **_: Any) -> list[str]:
        kept.append(ids)
        return ["" for _ in ids]

    tokenizer.batch_decode = keep
    with torch.no_grad():
        run()
    tokenizer.batch_decode = decode
    return kept[0]


# ---- full size


def keys(lavis: SimpleNamespace) -> None:
    """Names, shapes and dtypes of the released sizes, from models without memory."""
    original.set_vision(lavis, {"patch_size": 14, "width": 1408, "depth": 39, "heads": 16, "mlp_ratio": 4.3637})
    base = {"hidden_size": 768, "layers": 12, "heads": 12, "intermediate_size": 3072, "max_positions": 512}
    original.set_bert(lavis, base, [*vocabulary.SPECIAL, *(f"word{n}" for n in range(30522 - 5))])
    opt_2_7b = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 10240}
    xl = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128}
    original.set_opt(lavis, opt_2_7b | {"word_embed_proj_dim": 2560}, original.opt_tokenizer("a"))
    original.set_t5(lavis, xl | {"tie_word_embeddings": False}, original.t5_tokenizer("a"))
    linspace = torch.linspace
    torch.linspace = lambda *args: linspace(*args, device="cpu")  # its items are read, which "meta" has none of
    lists = {}
    with torch.device("meta"):
        for name, kind in {
            "stage1": lavis.stage1.Blip2Qformer,
            "opt2.7b": lavis.opt.Blip2OPT,
            "flant5xl": lavis.t5.Blip2T5,
        }.items():
            model = kind()
            trained = {key for key, p in model.named_parameters() if p.requires_grad}
            lists[name] = {
                key: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), key in trained]
                for key, tensor in model.state_dict().items()
            }
            parameters = {id(p): p.numel() for p in model.parameters()}
            print(f"{name}: {len(lists[name])} keys, {sum(parameters.values()):,} parameters")
    torch.linspace = linspace
    packed = gzip.compress(json.dumps(lists, separators=(",", ":")).encode(), mtime=0)
    (HERE / "keys.json.gz").write_bytes(packed)


def main() -> None:
    torch.set_num_threads(1)
    lavis = original.load()
    original.start_process_group()
    for variant in VISION:
        stage1(lavis, variant)
    opt(lavis, "a", prompt="")
    opt(lavis, "b", prompt="a photo of")
    t5(lavis, "a", prompt="a photo of")
    t5(lavis, "b", prompt="")
    golden_plain.make(lavis, HERE)
    keys(lavis)


if __name__ == "__main__":
    main()
