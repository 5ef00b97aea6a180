"""Systems that are compared: configurations crossed with the values of axes, and those that cannot be built."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer import lookup, resolution, vision
from qformer.checkpoints import folder as checkpoint
from qformer.config import FeaturesConfig, UnknownKey, parse_config, read_values
from qformer.connectors import table as connectors
from qformer.files.digests import digests, file_digests
from qformer.schema import QFORMER
from qformer.stages.checking import check
from qformer.stages.compare.samples import digest
from qformer.stages.resume import MAY_CHANGE
from qformer.stages.sizes import described
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from qformer.schema import Config

STAGE_ONE = "stage1"  # as `init`: stage one of the same configuration comes first
BEFORE = f"{STAGE_ONE}."  # begins the keys of that stage one alone
NAMED = ("connector", "resolution", "vision")  # sections whose other options belong to the name
QFORMER_ONLY = ("question", "init", "start")  # keys that no other connector has a use for
NAMES = "/"  # parts the labels of a name
CLOSES = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Refused:
    """A system that has no row of numbers, with the reason as one sentence."""

    reason: str


@dataclass(frozen=True)
class System:
    """A system that can be trained.

    Attributes:
        config: of stage two, without a seed; `init` is that of the user, or None where stage one comes first.
        changes: values of the axes by key, as they were written.
        stage_one: configuration of the stage one that comes first; None: there is none.
    """

    config: Config
    changes: dict[str, str] = field(default_factory=dict)
    stage_one: Config | None = None

    def with_config(self, config: Config) -> System:
        """The same system under another budget; its stage one follows in what has changed, but for its schedule."""
        changed = {key: getattr(config, key) for key in ("qformer", "resolution")}
        changed = {key: value for key, value in changed.items() if value != getattr(self.config, key)}
        return replace(self, config=config, stage_one=self.stage_one and self.stage_one.model_copy(update=changed))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words of the command line into configurations and `key=value`."""
    changes = [word for word in words if "=" in word and not os.path.isfile(word)]
    return [word for word in words if word not in changes], changes


def read_systems(paths: Sequence[str], changes: Sequence[str], steps: int | None = None) -> dict[str, System | Refused]:
    """Cross every configuration with every combination of the values of its axes.

    Args:
        paths: configurations of stage two.
        changes: `key=a,b`, an axis with these values; with one value it holds for all and stands in no name.
        steps: of stage two, in place of those of the configurations; the warm-up keeps its share.

    Returns:
        By name, in the order of `paths`: what differs between the systems.

    Raises:
        UsageError: fewer than two systems, a file that cannot be read, an unknown key, the same axis twice, or a
            configuration of another stage.
    """
    axes = _read_axes(changes)
    stems = _stems(paths)
    found: dict[str, System | Refused] = {}
    for path, stem in zip(paths, stems, strict=True):
        read_values(path)  # refused before anything is crossed
        for values in itertools.product(*axes.values()):
            given = dict(zip(axes, values, strict=True))
            varied = {key: value for key, value in given.items() if len(axes[key]) > 1}
            name = NAMES.join([*([stem] if len(paths) > 1 or not varied else []), *map(_label, varied.items())])
            found[name] = _build(path, given, varied, steps)
    if len(found) < 2:
        raise UsageError(
            f"got {len(found)} system{'s'[: not found]}; a comparison needs two: give another CONFIG, or an axis such "
            "as --over connector.name=mlp,avg_pool"
        )
    begun = [one for one in found.values() if isinstance(one, Refused) or one.stage_one is not None]
    if not begun and (alone := [key for key in axes if key.startswith(BEFORE)]):
        raise UsageError(f"'{alone[0]}' is for systems that begin with init={STAGE_ONE}; add that, or leave it out")
    return found


def _read_axes(changes: Sequence[str]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key or not text.strip():
            raise UsageError(f"'{change}' is no axis; write key=value,value, such as connector.name=mlp,avg_pool")
        if key in axes:
            raise UsageError(f"'{key}' is given twice; write all its values behind one, as {key}=a,b")
        axes[key] = list(_split_values(text))
        if twice := [value for value, times in Counter(axes[key]).items() if times > 1]:
            raise UsageError(f"{key} has the value '{twice[0]}' twice; leave one out")
    return axes


def _split_values(text: str) -> Iterator[str]:
    """Split at commas that stand in no brackets and no quotes, so that a value may be a YAML list or mapping."""
    start, open_, quote = 0, [], ""
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in CLOSES:
            open_.append(CLOSES[sign])
        elif open_ and sign == open_[-1]:
            open_.pop()
        elif sign == "," and not open_:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def _stems(paths: Sequence[str]) -> list[str]:
    """Name configurations by their files; by their whole paths where two files have one name."""
    stems = [Path(path).stem.removeprefix("system_") for path in paths]
    if len(set(paths)) < len(paths):
        twice = next(path for path, times in Counter(paths).items() if times > 1)
        raise UsageError(f"'{twice}' is given twice; leave one out, or vary it with --over")
    shared = Counter(stems)
    return [stem if shared[stem] == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def _label(change: tuple[str, str]) -> str:
    key, value = change[0], "none" if change[1] == "null" else change[1]
    last = key.rpartition(".")[2]
    return value if last == "name" else f"{key if key.startswith(BEFORE) else last}={value}"


def find_reference(name: str | None, systems: Sequence[str]) -> str:
    """The system that others are compared with: the first one, or the only one that `name` means.

    Raises:
        UsageError: there is no such system, or there are several.
    """
    if name is None:
        return systems[0]
    if name in systems:
        return name
    wanted = Path(name).stem.removeprefix("system_")
    near = [one for one in systems if wanted in one.split(NAMES)] or [one for one in systems if wanted in one]
    if len(near) == 1:
        return near[0]
    if near:
        raise UsageError(f"--reference '{name}' may mean {' or '.join(map(repr, near))}; give a whole name")
    raise UsageError(f"--reference '{name}' is no system: {lookup.nearest(name, systems)}")


def _build(path: str, given: dict[str, str], varied: dict[str, str], steps: int | None) -> System | Refused:
    own = {key: value for key, value in given.items() if not key.startswith(BEFORE)}
    of_first = {key.removeprefix(BEFORE): value for key, value in given.items() if key.startswith(BEFORE)}
    values = _read(path, own)
    if values.get("stage") != "stage2":
        raise UsageError(
            f"'{path}' is of stage '{values.get('stage')}', and systems that answer questions are compared; give one "
            f"of stage2, with init={STAGE_ONE} if stage one shall come first"
        )
    has_first = values.get("init") == STAGE_ONE
    try:
        config = check(parse_config({**values, "init": None} if has_first else values))
        if has_first and not config.has_qformer:
            raise UsageError(f"init={STAGE_ONE} trains a Q-Former, and the connector is '{config.connector.name}'")
        first = _read_stage_one(path, own, of_first) if has_first else None
        if steps is not None:
            config = with_steps(config, steps)
            first = first if first is None or "train.steps" in of_first else with_steps(first, steps)
    except UnknownKey:
        raise
    except UsageError as error:
        return Refused(str(error))
    return System(config, varied, first)


def _read(path: str, given: dict[str, str]) -> dict[str, Any]:
    """Read values of a configuration with overrides: whole sections first, then names, whose options follow."""
    changes = [f"{key}={given[key]}" for key in sorted(given, key=lambda key: key.count("."))]
    values, names = read_values(path, changes), tuple(f"{section}.name=" for section in NAMED)
    _fit_names(values, read_values(path, [change for change in changes if not change.startswith(names)]), given)
    return values


def _read_stage_one(path: str, own: dict[str, str], changes: dict[str, str]) -> Config:
    """Read the configuration of the stage one of a system, with changes of its own."""
    left_out = ("init", "llm", "question", "start")
    values = {key: value for key, value in _read(path, own | changes).items() if key not in left_out}
    links = {key: value for key, value in _section(values, "connector").items() if key == "links"}
    return check(parse_config(values | {"stage": STAGE_ONE, "connector": {"name": QFORMER, **links}}))


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def digest_config(config: Config, stage_one: Config | None = None) -> str:
    """Hash everything of a configuration that a trained system depends on, but its data, its seed and its folders."""
    values = config.model_dump(mode="json")
    data = {key: values["data"][key] for key in ("batch", "crop", "flip")}
    stored = values["data"]["features"] or FeaturesConfig(path="-").model_dump()  # every comparison has a store
    values["data"] = data | {"features": [stored["crops"], stored["dtype"]]}
    for key in MAY_CHANGE["train"]:
        del values["train"][key]
    unread = {"run", "seed"} | ({"loss"} if config.stage == "stage2" else set())
    unread |= set() if config.has_qformer else {"qformer", "text", "vision_norm_eps"}
    values = {key: value for key, value in values.items() if key not in unread}
    if config.init is not None:
        meta = checkpoint.read_meta(checkpoint.find(config.init))
        values["init"] = meta.get("checksums", {}).get(checkpoint.WEIGHTS, config.init)
    return digest([values, digests(config) | file_digests(config), stage_one and digest_config(stage_one)])


def with_steps(config: Config, steps: int) -> Config:
    """The configuration with another number of steps, of which as large a share is the warm-up."""
    warmup = min(config.train.warmup * steps // config.train.steps, steps - 1)
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps, "warmup": warmup})})


def _fit_names(values: dict[str, Any], before: dict[str, Any], given: dict[str, str]) -> None:
    """Let options follow a name that an axis has changed: those of the old one go, sizes of the encoder come in."""
    for name in NAMED:
        section = _section(values, name)
        if f"{name}.name" not in given or section["name"] == _section(before, name).get("name"):
            continue
        takes = _takes(name, str(section["name"]))
        for key in [key for key in section if key != "name" and f"{name}.{key}" not in given]:
            if not takes(key, section[key]):
                del section[key]
        if name != "vision":
            sizes = _encoder_sizes(_section(values, "vision"))
            section |= {key: size for key, size in sizes.items() if key not in section and takes(key, size)}
    if _section(values, "connector").get("name", QFORMER) != QFORMER and "connector.name" in given:
        for key in QFORMER_ONLY:
            if key not in given:
                values.pop(key, None)
        if "llm.visual_scale" not in given:
            _section(values, "llm").pop("visual_scale", None)


def _takes(section: str, name: str) -> Callable[[str, Any], bool]:
    """A test if what is called `name` in a section has an option and can have this value for it."""

    def takes(key: str, value: Any) -> bool:
        try:
            if section == "connector":
                if name == QFORMER:
                    return key in ("links", "question")
                connectors.check(name, {key: value}, complete=False)
            else:
                known = vision.ENCODERS if section == "vision" else resolution.STRATEGIES
                lookup.check(known, name, {key: value}, section, complete=False)
        except UsageError:
            return False
        return True

    return takes


def _encoder_sizes(section: dict[str, Any]) -> dict[str, int]:
    """Patch and side of the pictures of an image encoder, as far as its options or its folder say them."""
    name = section.get("name", "eva")
    try:
        options = vision.check(name, **{key: value for key, value in section.items() if key != "name"})
    except UsageError:
        return {}
    found = described(str(getattr(options, "path", ""))) or {}
    found = found.get("vision_config") or found
    sizes = {"patch": "patch_size", "size": "image_size"}
    read = {ours: getattr(options, theirs, None) or found.get(theirs) for ours, theirs in sizes.items()}
    return {key: value for key, value in read.items() if isinstance(value, int)}
