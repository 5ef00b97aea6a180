"""Model card of a pushed checkpoint, written from its run: loading, training, and measured results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qformer.files.records import Form, Metrics, read_lines, read_object
from qformer.template import NONE

if TYPE_CHECKING:
    from qformer.schema import Config

PROGRESS = ("kind", "step", "lr", "images_per_second")
USES = {
    "stage1": "It compares images and texts (ITC), decides whether they match (ITM) and writes captions (ITG).",
    "stage2": "It describes images and answers questions about them.",
}
CODE = {
    ("qformer", "stage1"): """import qformer

model = qformer.load("{repo}")
tiles = model.frontend.tiles(["photo.jpg"])
print(model.caption(tiles))""",
    ("qformer", "stage2"): """import qformer

model = qformer.load("{repo}")
tiles = model.frontend.tiles(["photo.jpg"])
print(model.generate(tiles), model.answer(tiles, ["what is in the picture?"]))""",
    ("transformers", "stage1"): """from transformers import AutoProcessor, Blip2ForImageTextRetrieval

model = Blip2ForImageTextRetrieval.from_pretrained("{repo}")
processor = AutoProcessor.from_pretrained("{repo}")""",
    ("transformers", "stage2"): """from PIL import Image
from transformers import AutoProcessor, Blip2ForConditionalGeneration

model = Blip2ForConditionalGeneration.from_pretrained("{repo}")
processor = AutoProcessor.from_pretrained("{repo}")
inputs = processor(images=Image.open("photo.jpg").convert("RGB"), text={prompt!r}, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=30)
print(processor.batch_decode(ids, skip_special_tokens=True))""",
}


def card(repo: str, form: str, stage: str, config: Config | None, meta: dict[str, Any], run: Path | None) -> str:
    """Write the card as Markdown with the hub's front matter.

    Args:
        config, meta: those of a checkpoint of ours; None and empty for any other.
        run: folder with the records of its training, if known.
    """
    towers = {} if config is None else _towers(config)
    front: dict[str, Any] = {
        "library_name": "transformers" if form == "transformers" else "qformer",
        "tags": ["blip-2", "q-former"],
    }
    if stage == "stage2":
        front["pipeline_tag"] = "image-to-text"
    if bases := [name for name in towers.values() if _is_hub_id(name)]:
        front["base_model"] = bases
    prompt = "" if config is None or config.llm is None else config.llm.prompt
    code = CODE[form, stage].format(repo=repo, prompt=prompt)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repo.partition('/')[2]}",
        f"A Q-Former bridge (BLIP-2, arXiv:2301.12597). {USES[stage]}",
        f"## Use\n\n```python\n{code}\n```",
    ]
    if config is not None:
        parts.append(_training(config, meta))
    if run is not None:
        parts += _measured(run)
    parts.append(_license(towers, form))
    return "\n\n".join(parts) + "\n"


def _towers(config: Config) -> dict[str, str]:
    """Names of the towers that the checkpoint was trained on; for a local folder, the last part of its path."""
    options = config.vision.options
    named = {"image encoder": str(options.get("path") or options.get("weights") or config.vision.name)}
    if config.llm is not None:
        named["language model"] = config.llm.path
    elif config.stage == "stage1":
        named["BERT"] = config.text.bert
    return {part: name if _is_hub_id(name) else name.rstrip("/").rpartition("/")[2] for part, name in named.items()}


def _is_hub_id(name: str) -> bool:
    is_id = name.count("/") == 1 and not name.endswith("/") and not name.startswith(("/", ".", "~", "checkpoint:"))
    return is_id and not Path(name).exists()  # weights/eva.pth is a local file


def _training(config: Config, meta: dict[str, Any]) -> str:
    train = config.train
    rows = {
        "towers": "; ".join(f"{part}: {name}" for part, name in _towers(config).items()),
        **_connector(config),
        "resolution": f"{config.resolution.name} {config.resolution.options.get('size', '')}".strip(),
        "data": config.data.train.name,
        "steps x samples": f"{meta.get('step', train.steps)} x {config.data.batch * train.accumulate} per process",
        "learning rate": f"{train.lr} after {train.warmup} steps, cosine to {train.min_lr}",
        "precision, seed": f"{train.precision}, {config.seed}",
    }
    if config.llm is not None:
        rows["prompt"] = f"`{config.llm.prompt}`" if config.llm.prompt else "none"
        if config.llm.template != NONE:
            rows["template"] = f"`{' '.join(config.llm.template.split())}`"
        rows["language model kept in"] = config.llm.dtype if config.llm.quantize == "none" else config.llm.quantize
    versions = {key: meta[key] for key in ("commit", "torch", "transformers") if meta.get(key)}
    if versions:
        rows["versions"] = ", ".join(f"{key} {value}" for key, value in versions.items())
    return f"## Training\n\n{_table(('', ''), rows.items())}\n\nEvery setting is in `config.yaml` of the run."


def _connector(config: Config) -> dict[str, str]:
    if not config.has_qformer:
        return {"connector": config.connector.name}
    sizes = config.qformer
    return {"queries": f"{sizes.queries} of {sizes.hidden_size}, {sizes.layers} layers"}


def _measured(run: Path) -> list[str]:
    """Sections with the last losses of the run, and with the contents of `results.json`, if there is one."""
    records = read_lines(run / "metrics.jsonl", Metrics)
    last = {record["kind"]: record for record in records}
    rows = [
        (f"{kind}, step {record['step']}", f"{name} {value:.4f}")
        for kind, record in last.items()
        for name, value in record.items()
        if name not in PROGRESS and isinstance(value, int | float)
    ]
    parts = []
    if rows:
        curves = "\n\n![losses](curves.png)" if (run / "curves.png").is_file() else ""
        parts.append(f"## Losses\n\n{_table(('of', 'last value'), rows)}{curves}")
    results = run / "results.json"
    if results.is_file():
        found = dict(_flat(read_object(results, Form)))
        shown = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in found.items()}
        parts.append(f"## Results\n\n{_table(('measure', 'value'), shown.items())}")
    return parts


def _flat(values: Any, name: str = "") -> list[tuple[str, Any]]:
    """Flatten the numbers of nested dictionaries to dotted names."""
    if isinstance(values, dict):
        return [pair for key, inner in values.items() for pair in _flat(inner, f"{name}.{key}" if name else str(key))]
    return [(name, values)] if isinstance(values, int | float) else []


def _license(towers: dict[str, str], form: str) -> str:
    named = ", ".join(towers.values()) or "the towers it was made from"
    held = "contains" if form == "transformers" else "is made for"
    return (
        f"## License\n\nNot stated yet: this repository {held} {named}, each under a license of its own. "
        "Add `license:` at the top when you know what they allow."
    )


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
