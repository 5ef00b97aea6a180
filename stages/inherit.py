"""What stage two takes from the run that it starts from: its bridge, its encoder, its text path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformer.checkpoints import folder as checkpoint
from qformer.config import Choice
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.checkpoints.folder import Checkpoint
    from qformer.config import QuestionConfig
    from qformer.schema import Config


ENCODER_CHANGES = ("image_size", "precision")
BRIDGE = ("vision", "vision_norm_eps", "text", "qformer", "connector")


def text_path(question: QuestionConfig, start: Checkpoint | None) -> Checkpoint | None:
    """What a Q-Former that reads questions has its text path from: `start`, `question.init`, or BERT (None).

    Raises:
        UsageError: `question.init` is not stage one, or not needed.
    """
    whole = start is not None and (start.config.stage == "stage1" or start.config.question is not None)
    if question.init is None:
        return start if whole else None
    if whole:
        raise UsageError("init has a text path already; leave question.init out")
    found = checkpoint.read(question.init)
    if found.config.stage != "stage1":
        raise UsageError(
            f"question.init '{question.init}' is a run of stage '{found.config.stage}', which has no text path; "
            "give one of stage1"
        )
    return found


def with_text_sizes(config: Config, theirs: Config) -> Config:
    """The configuration with as many words and positions as the text path of another one has."""
    sizes = {"vocab_size": theirs.qformer.vocab_size, "max_positions": theirs.qformer.max_positions}
    return config.model_copy(update={"qformer": config.qformer.model_copy(update=sizes)})


def inherit(config: Config, start: Config) -> Config:
    """The sections that describe the bridge come from the run it starts from.

    Raises:
        UsageError: it starts from a run without a bridge, or the configuration sets one of these sections differently.
    """
    if start.stage not in ("stage1", "stage2"):
        raise UsageError(f"init '{config.init}' is a run of stage '{start.stage}'; stage two starts from a stage1 run")
    theirs = start.connector.name
    if start.stage == "stage1" and config.connector.name != theirs:
        raise UsageError(
            f"init '{config.init}' is a run of stage1, whose Q-Former the connector '{config.connector.name}' has no "
            "use for; leave init out"
        )
    if config.question is not None and not start.has_qformer:
        raise UsageError(
            f"question is an option of the connector 'qformer', and that of init '{config.init}' is '{theirs}'; leave "
            "it out"
        )
    own_text = "text" in config.model_fields_set and start.stage == "stage2" and start.question is None
    bridge = [name for name in BRIDGE if name != "text" or not own_text]  # its Q-Former has read none
    taken: dict[str, Any] = {name: getattr(start, name) for name in bridge}
    if "vision" in config.model_fields_set:
        changes = {key: value for key, value in config.vision.options.items() if key in ENCODER_CHANGES}
        taken["vision"] = start.vision.model_copy(update=changes)
    for name in bridge:
        if name in config.model_fields_set and not _agree(getattr(config, name), taken[name]):
            raise UsageError(
                f"the section '{name}' differs from that of init '{config.init}'; leave it out, it is taken from there"
            )
    for name in config.model_fields_set & {"vision", "connector"}:
        taken[name] = taken[name].read_from("")  # the user has named it, too
    if config.question is None and start.question is not None:
        taken["question"] = start.question.model_copy(update={"init": None})  # it has its text path
    if "resolution" not in config.model_fields_set:
        taken["resolution"] = start.resolution
    return config.model_copy(update=taken)


def _agree(given: Any, taken: Any) -> bool:
    """Whether a section says nothing else than the one that is taken; options of an encoder may be left out."""
    if isinstance(given, Choice):
        return given.name == taken.name and given.options.items() <= taken.options.items()
    return bool(given == taken)
