"""Settings that stage two inherits from the run it starts from: bridge, image encoder and text path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformer.checkpoints import folder as checkpoint
from qformer.config import Choice
from qformer.fields import Section
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.checkpoints.folder import Checkpoint
    from qformer.config import QuestionConfig
    from qformer.schema import Config


ENCODER_CHANGES = ("image_size", "precision")
BRIDGE = ("vision", "vision_norm_eps", "text", "qformer", "connector")


def text_path(question: QuestionConfig, start: Checkpoint | None) -> Checkpoint | None:
    """Find the checkpoint that provides the text path of a question-reading Q-Former.

    Returns:
        `start`, or the checkpoint of `question.init`; None means that the text path starts from BERT.

    Raises:
        UsageError: `question.init` is not a stage-one run, or `start` already has a text path.
    """
    whole = start is not None and (start.config.stage == "stage1" or start.config.question is not None)
    if question.init is None:
        return start if whole else None
    if whole:
        raise UsageError("init already has a text path; leave question.init out")
    found = checkpoint.read(question.init)
    if found.config.stage != "stage1":
        raise UsageError(
            f"question.init '{question.init}' is a run of stage '{found.config.stage}', which has no text path; "
            "give a stage1 run"
        )
    return found


def with_text_sizes(config: Config, theirs: Config) -> Config:
    """Copy the vocabulary size and the number of positions from the configuration of a text path."""
    sizes = {"vocab_size": theirs.qformer.vocab_size, "max_positions": theirs.qformer.max_positions}
    return config.model_copy(update={"qformer": config.qformer.model_copy(update=sizes)})


def inherit(config: Config, start: Config) -> Config:
    """Take the sections that describe the bridge from the run that stage two starts from.

    Raises:
        UsageError: the starting run has no bridge, or the configuration contradicts one of its sections.
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
    if not start.has_qformer and config.llm is not None and config.llm.visual_scale != 1:
        raise UsageError(
            f"llm.visual_scale is {config.llm.visual_scale}, which only the connector 'qformer' uses, and that of init "
            f"'{config.init}' is '{theirs}'; leave it out"
        )
    own_text = "text" in config.model_fields_set and start.stage == "stage2" and start.question is None
    bridge = [name for name in BRIDGE if name != "text" or not own_text]  # that Q-Former never read text
    taken: dict[str, Any] = {name: getattr(start, name) for name in bridge}
    if start.has_qformer and config.links != "none":
        taken["connector"] = config.connector  # slices may be linked from now on, or otherwise
    if "vision" in config.model_fields_set:
        changes = {key: value for key, value in config.vision.options.items() if key in ENCODER_CHANGES}
        taken["vision"] = start.vision.model_copy(update=changes)
    for name in bridge:
        if name in config.model_fields_set and not _agree(getattr(config, name), taken[name]):
            raise UsageError(
                f"the section '{name}' differs from that of init '{config.init}'; leave it out to use that of init"
            )
    for name in config.model_fields_set & {"vision", "connector"}:
        taken[name] = taken[name].read_from("")  # the user named this class too, so it is trusted
    if config.question is None and start.question is not None:
        taken["question"] = start.question.model_copy(update={"init": None})  # init already has a text path
    llm, trained = config.llm, start.llm
    if llm is not None and trained is not None and llm.path == trained.path and "template" not in llm.model_fields_set:
        taken["llm"] = llm.model_copy(update={"template": trained.template})  # in which it was shown pictures
    if "resolution" not in config.model_fields_set:
        taken["resolution"] = start.resolution
    if "limits" not in config.model_fields_set and taken.get("resolution", config.resolution) == start.resolution:
        taken["limits"] = start.limits  # of another strategy they say nothing
    return config.model_copy(update=taken)


def _agree(given: Any, taken: Any) -> bool:
    """Return True if a section agrees with the inherited one; what it leaves out does not count."""
    if isinstance(given, Choice):
        return given.name == taken.name and given.options.items() <= taken.options.items()
    if isinstance(given, Section):
        return all(getattr(given, name) == getattr(taken, name) for name in given.model_fields_set)
    return bool(given == taken)
