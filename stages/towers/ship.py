"""`qformer backbones`: the mini towers, trained from scratch one after the other, halved, weighed and described.

Four runs in one folder (BERT, the ViT that learns against it, OPT, T5), each resumed by the same command; then
`towers/`, what the package ships as `mini:bert`, `mini:vit`, `mini:opt` and `mini:t5`, with a card.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from qformer import stages
from qformer.checkpoints import folder as checkpoint
from qformer.config import by_prefix, load_config, shipped
from qformer.files.records import Metrics, read_lines
from qformer.stages.checking import check
from qformer.stages.loop import console
from qformer.stages.towers import build as mini
from qformer.stages.towers.train import TOWER
from qformer.types import UsageError

KINDS = ("bert", "vit", "opt", "t5")  # the ViT needs the BERT
LIMIT = 8_000_000  # bytes of all towers together
#: What the card asks of each tower, the least share of right answers on unseen scenes.
MINIMA = {"probe_colour": 0.95, "probe_shape": 0.95, "probe_position": 0.95, "probe_word": 0.80, "right": 0.95}


def make(folder: Path, overrides: list[str]) -> Path:
    """Train all four and assemble them; returns the folder of the towers.

    Args:
        folder: of the runs.
        overrides: `KIND.key=value`, such as `opt.train.steps=100`, over `configs/mini/KIND.yaml`.

    Raises:
        UsageError: an override of no tower, or towers that weigh more than may be shipped.
    """
    chosen = by_prefix(overrides, KINDS)
    records: dict[str, dict[str, Any]] = {}
    configs = {}
    for kind in KINDS:
        fixed = [f"run={folder / kind}"] + ([f"backbone.text={folder / 'bert' / TOWER}"] if kind == "vit" else [])
        configs[kind] = check(load_config(shipped()[f"mini/{kind}.yaml"], [*fixed, *chosen[kind]]))
    for kind, config in configs.items():
        console.rule(kind)
        stages.train(config)
        records[kind] = describe(folder / kind)
    target = folder / "towers"
    for kind in KINDS:
        records[kind]["bytes"] = mini.ship(kind, folder / kind / TOWER, target / kind)
    weight = sum(record["bytes"] for record in records.values())
    if weight > LIMIT:
        raise UsageError(f"the towers weigh {weight:,} bytes together, more than {LIMIT:,}; make them smaller")
    command = shlex.join(["qformer", "backbones", *overrides])
    (target / "card.json").write_text(json.dumps({"command": command, "towers": records}, indent=1), encoding="utf-8")
    (target / "README.md").write_text(card(command, records), encoding="utf-8")
    return target


def describe(run: Path) -> dict[str, Any]:
    """What the card says of one run: configuration, commit, steps, last held-out measures."""
    saved = checkpoint.read(run)
    held_out = [line for line in read_lines(run / "metrics.jsonl", Metrics) if line["kind"] == "validation"]
    measured = {key: value for key, value in held_out[-1].items() if key not in ("kind", "step")} if held_out else {}
    config = saved.config
    assert config.backbone is not None
    return {
        "seed": config.seed,
        "commit": saved.meta.get("commit"),
        "steps": config.train.steps,
        "batch": config.data.batch,
        "data": config.data.train.model_dump(),
        "held_out": None if config.data.validation is None else config.data.validation.model_dump(),
        "sizes": config.backbone.model_dump(
            include={"width", "layers", "decoder_layers", "heads", "intermediate", "vocab_size"}
        ),
        "measured": measured,
    }


def card(command: str, records: dict[str, dict[str, Any]]) -> str:
    """The model card, as Markdown."""
    lines = [
        "# Mini towers",
        "",
        "A BERT, a ViT, an OPT and a T5 of a few million weights together, for trying the bridge on drawn scenes",
        "without a network or a GPU. They know scenes and nothing else. OPT and T5 have read of every combination of",
        "shape, colour and place; of those that are kept for tests, no picture was ever shown. Trained from scratch,",
        "stored in fp16, by",
        "",
        f"    {command}",
        "",
        "| tower | steps x batch | seed | trained on | commit | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for kind, record in records.items():
        lines.append(
            f"| {kind} | {record['steps']} x {record['batch']} | {record['seed']} | {record['data']['name']} | "
            f"{record['commit'] or 'unknown'} | {record['bytes']:,} |"
        )
    lines += [
        "",
        "Measured on scenes that training never shows:",
        "",
        "| tower | measure | value | least |",
        "|---|---|---|---|",
    ]
    for kind, record in records.items():
        for key, value in record["measured"].items():
            least = MINIMA.get(key)
            lines.append(f"| {kind} | {key} | {value:.3f} | {'' if least is None else least} |")
    return "\n".join(lines) + "\n"
