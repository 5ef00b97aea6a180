"""`qformer backbones`: train the mini towers one after the other, convert them to fp16 and write their model card.

A run for each in one folder, resumed by the same command: first BERT, with which the first image encoder is trained,
then the encoders that go on from that one and the others, OPT and T5, and those that go on from the last two. Then
`towers/`, which the package ships as `mini:bert`, `mini:vit` and so on.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qformer import stages
from qformer.checkpoints import folder as checkpoint
from qformer.config import by_prefix, load_config, shipped
from qformer.files.records import Metrics, read_lines
from qformer.schema import EYES
from qformer.stages.checking import check
from qformer.stages.loop import console
from qformer.stages.towers.build import ship_language
from qformer.stages.towers.encoders import ship_encoder
from qformer.stages.towers.train import TOWER
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.config import BackboneConfig
    from qformer.schema import Config

#: Image encoders that are there to differ: no minimum is required of them.
COMPARED = ("vit_tiles", "vit_native", "vit_rope", "ssl", "clip")
#: Recipes, each behind that which it needs, with the key that names the tower of it.
KINDS = ("bert", "vit", *COMPARED, "opt", "t5", "opt_canvases", "t5_canvases")
NEEDS = {
    "vit": ("text", "bert"),
    "vit_tiles": ("start", "vit"),
    "vit_native": ("start", "vit_tiles"),
    "vit_rope": ("start", "vit_tiles"),
    "opt_canvases": ("start", "opt"),
    "t5_canvases": ("start", "t5"),
}
KEPT = ("vit_tiles",)  # towers that are not shipped, since others go on from them and know all that they know
LIMIT = 25_000_000  # bytes of all towers that are shipped
#: Measures that the card requires of the others, on unseen scenes and canvases, with their minimum.
MINIMA = {"probe_colour": 0.95, "probe_shape": 0.95, "probe_position": 0.95, "probe_word": 0.80, "right": 0.95}
EACH = ("opt_canvases", "t5_canvases")  # towers that must answer every kind of question so well, at every position


def make(folder: Path, overrides: list[str]) -> Path:
    """Train and assemble all towers; returns their folder.

    Args:
        folder: the folder of the runs.
        overrides: `KIND.key=value`, such as `opt.train.steps=100`, applied to `configs/mini/KIND.yaml`.

    Raises:
        UsageError: an override that names no tower, or towers that are too large to ship.
    """
    chosen = by_prefix(overrides, KINDS)
    records: dict[str, dict[str, Any]] = {}
    configs = {}
    for kind in KINDS:
        key, needed = NEEDS.get(kind, ("", ""))
        fixed = [f"run={folder / kind}", *([f"backbone.{key}={folder / needed / TOWER}"] if key else [])]
        configs[kind] = check(load_config(shipped()[f"mini/{kind}.yaml"], [*fixed, *chosen[kind]]))
    for kind, config in configs.items():
        console.rule(kind)
        stages.train(config)
        records[kind] = describe(folder / kind)
    target = folder / "towers"
    for kind in records.keys() - KEPT:
        records[kind]["bytes"] = ship(_backbone(configs[kind]).kind, folder / kind / TOWER, target / kind)
    weight = sum(record.get("bytes", 0) for record in records.values())
    if weight > LIMIT:
        raise UsageError(f"the towers have {weight:,} bytes together, more than {LIMIT:,}; make them smaller")
    command = shlex.join(["qformer", "backbones", *overrides])
    (target / "card.json").write_text(json.dumps({"command": command, "towers": records}, indent=1), encoding="utf-8")
    (target / "README.md").write_text(card(command, records), encoding="utf-8")
    return target


def ship(kind: str, source: Path, target: Path) -> int:
    """Copy a tower of this `backbone.kind` with fp16 weights; returns its size in bytes."""
    (ship_encoder if kind in EYES else ship_language)(kind, source, target)
    return sum(file.stat().st_size for file in target.iterdir())


def describe(run: Path) -> dict[str, Any]:
    """Collect the facts of a run for the card: configuration, commit, steps and the last held-out measures."""
    saved = checkpoint.read(run)
    held_out = [line for line in read_lines(run / "metrics.jsonl", Metrics) if line["kind"] == "validation"]
    measured = {key: value for key, value in held_out[-1].items() if key not in ("kind", "step")} if held_out else {}
    config = saved.config
    return {
        "seed": config.seed,
        "commit": saved.meta.get("commit"),
        "steps": config.train.steps,
        "batch": config.data.batch,
        "seconds": round(_seconds(run, config.data.batch)),
        "data": config.data.train.model_dump(),
        "held_out": None if config.data.validation is None else config.data.validation.model_dump(),
        "sizes": _backbone(config).model_dump(
            include={"width", "layers", "decoder_layers", "heads", "intermediate", "vocab_size"}
        ),
        "measured": measured,
    }


def _seconds(run: Path, batch: int) -> float:
    """Add up the seconds of all steps, without validation."""
    seconds, before = 0.0, 0
    for line in read_lines(run / "metrics.jsonl", Metrics):
        if line["kind"] == "train":
            seconds += batch * (line["step"] - before) / line["images_per_second"]
            before = line["step"]
    return seconds


def _backbone(config: Config) -> BackboneConfig:
    return cast("BackboneConfig", config.backbone)


def card(command: str, records: dict[str, dict[str, Any]]) -> str:
    """Write the model card as Markdown."""
    lines = [
        "# Mini towers",
        "",
        "A BERT, image encoders, OPTs and T5s with a few million weights each, for trying the bridge on drawn scenes",
        "without a network or a GPU. They know scenes and canvases and nothing else; those called `..._canvases`,",
        "which go on from the others, also know clips and rows of two pictures. OPT and T5 have read about every",
        "combination of shape, color and place; images of those that are kept for tests are shown to no tower. The",
        "encoders have learned from phrases about the objects of scenes (`vit`), from labels of objects on canvases",
        "and scenes (`vit_tiles`, which is not shipped, and `vit_native` and `vit_rope`, which go on from it), from",
        "whole captions (`clip`), or from pictures alone (`ssl`). Trained from scratch and stored in fp16 by",
        "",
        f"    {command}",
        "",
        "| tower | steps x batch | seed | trained on | seconds | commit | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, record in records.items():
        lines.append(
            f"| {kind} | {record['steps']} x {record['batch']} | {record['seed']} | {record['data']['name']} | "
            f"{_number(record, 'seconds')} | {record['commit'] or 'unknown'} | {_number(record, 'bytes')} |"
        )
    lines += [
        "",
        "Measured on scenes that training never shows:",
        "",
        "| tower | measure | value | minimum |",
        "|---|---|---|---|",
    ]
    for kind, record in records.items():
        for key, value in record["measured"].items():
            least = None if kind in COMPARED else MINIMA.get(key)
            if kind in EACH and key.startswith(("right", "late")):
                least = MINIMA["right"]
            lines.append(f"| {kind} | {key} | {value:.3f} | {'' if least is None else least} |")
    return "\n".join(lines) + "\n"


def _number(record: dict[str, Any], key: str) -> str:
    return f"{record[key]:,}" if key in record else "-"
