"""The one door to transformers' `from_pretrained`: no code of a model's files runs, and no file elsewhere is read.

Without a word about it, transformers would ask at the terminal whether code in a folder or repository may run, and
would read whatever file an index of shards names. (Of repositories, `huggingface_hub` refuses such names itself.)
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from qformer.files import pretrained
from qformer.lookup import find
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.yaml")  # of a folder on the hub
OLDER = "*.bin"  # its weights where there are no safetensors
INDEXES = ("*.safetensors.index.json", "*.bin.index.json")


def read(kind: Any, path: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(path, **options)` of transformers.

    Args:
        kind: a class of transformers. path: folder or hub id; transformers' own errors about it stay as they are.

    Raises:
        UsageError: it needs code that comes with it, or an index in the folder names files elsewhere.
    """
    check_indexes(Path(path))
    with quiet():
        return _read(kind, path, options)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers writes no report, warning or bar of loading and saving weights; downloads keep their bars.

    What matters of a report is read from its result, and said in a sentence. Whoever has asked transformers for
    information (`TRANSFORMERS_VERBOSITY=info`) gets it.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    verbosity, has_bar, has_none = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    if verbosity >= logging.WARNING:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if not has_none:  # which transformers has turned off with its own
            enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _read(kind: Any, path: str | Path, options: dict[str, Any]) -> Any:
    if kind.__name__ in ("AutoTokenizer", "AutoProcessor"):
        _check_vocabulary(str(path))
    try:
        return kind.from_pretrained(str(path), trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UsageError(
            f"'{path}' needs code of its own, which is not run; give a model that transformers knows by itself"
        ) from error


def as_words(tokenizer: Any) -> Any:
    """A tokenizer that from now on reads special tokens typed in a text, such as `</s>` or `[SEP]`, as plain words.

    Those that it puts around a text itself stay what they are. The same object is returned.
    """
    tokenizer.split_special_tokens = True
    return tokenizer


def _check_vocabulary(path: str) -> None:
    """Refuse a tokenizer whose configuration names the file of its words: it would be read wherever it lies.

    Raises:
        UsageError: it does.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    said = get_tokenizer_config(path)
    for key in ("vocab", "merges"):
        if isinstance(said, dict) and isinstance(said.get(key), str):
            raise UsageError(
                f"the tokenizer in '{path}' takes its {key} from '{said[key]}', but it may read files of its own "
                "folder only; download the model again"
            )


def check_indexes(folder: Path) -> None:
    """Refuse indexes of shards whose files are not plain names, hence in the folder itself; no folder has none.

    Raises:
        UsageError: naming the file, or the index that is damaged.
    """
    for weights in _find_weights(folder / "config.json"):
        if not _is_plain(weights):
            raise UsageError(
                f"'{folder / 'config.json'}' names the weights {weights!r}, but it may name files of its own folder "
                "only; download the model again"
            )
    for pattern in INDEXES:
        for index in sorted(folder.glob(pattern)) if folder.is_dir() else ():
            for shard in shards(index).values():
                if not _is_plain(shard):
                    raise UsageError(
                        f"'{index}' names {shard!r}, but an index may name files of its own folder only; download the "
                        "model again"
                    )


def _find_weights(config: Path) -> Iterator[str]:
    """Files or indexes of weights that a configuration, or one inside it, names (`transformers_weights`)."""
    try:
        left = [json.loads(config.read_text(encoding="utf-8"))] if config.is_file() else []
    except (OSError, ValueError, RecursionError):
        left = []  # transformers will say what is wrong
    while left:
        said = left.pop()
        if isinstance(said, dict):
            if "transformers_weights" in said:
                yield str(said["transformers_weights"])
            left += said.values()


def shards(index: Path) -> dict[str, str]:
    """What an index says: name of a tensor -> name of its file.

    Raises:
        UsageError: it is damaged.
    """
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
        if odd := [place for place in places.values() if not isinstance(place, str)]:
            raise TypeError(f"{odd[0]!r} is no file name")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{index}' is damaged ({error}); download it again") from error
    return places


def _is_plain(name: str) -> bool:
    """Whether it names a file beside the index, wherever it is read: no folder, drive or parent in front."""
    return (
        name not in ("", "..") and "\0" not in name and PurePosixPath(name).name == name == PureWindowsPath(name).name
    )


def local_folder(path_or_id: str) -> Path:
    """The folder itself, or where the hub's was downloaded to.

    Raises:
        UsageError: it cannot be downloaded.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        folder = Path(snapshot_download(path_or_id, allow_patterns=list(NEEDED)))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(path_or_id, allow_patterns=[OLDER])
        return folder
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path_or_id}' cannot be had from the hub ({error}); give a folder") from error


TOWERS = Path(__file__).parent.parent / "towers"


def tower(path: str) -> str:
    """`mini:NAME` is the folder of a shipped tower (`mini:vit`, `mini:opt`, ...); any other path stays as it is.

    Raises:
        UsageError: no tower of that name is shipped.
    """
    scheme, colon, name = path.partition(":")
    if scheme != "mini" or not colon:
        return path
    shipped = {folder.name: folder for folder in TOWERS.glob("*/") if (folder / "config.json").is_file()}
    return str(find(shipped, name, "shipped tower"))


def configuration(path_or_id: str) -> Any:
    """The configuration in a folder or under a hub id of transformers.

    Raises:
        UsageError: there is none.
    """
    try:
        return pretrained.read(AutoConfig, pretrained.tower(path_or_id))
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(
            f"'{path_or_id}' is no checkpoint here, no name of a release and not to be had from the hub ({reason}); "
            "give a run, a file of LAVIS, or a folder of transformers"
        ) from error
