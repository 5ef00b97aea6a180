"""Safe access to transformers' `from_pretrained`: no code from a model's folder runs, and no file outside it is read.

By default, transformers asks at the terminal if code in a folder or repository may run, and reads any file that an
index of shards names. (For repositories on the hub, `huggingface_hub` refuses such names itself.)
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from qformer.files import real_towers
from qformer.lookup import find
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.yaml", "*.jinja")  # files to download from the hub
OLDER = "*.bin"  # weights of a repository without safetensors
OLDER_TEMPLATE = "chat_template.json"
INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
UNREADABLE = "nothing can be loaded from {where} ({reason}); give a folder or hub id of transformers"


def read(kind: Any, path: str | Path, sentence: str = UNREADABLE, **options: Any) -> Any:
    """Call `kind.from_pretrained(path, **options)` of transformers, and turn its many errors into one.

    Args:
        kind: a class of transformers.
        path: folder, hub id, or name of a tower (`tower`).
        sentence: of the error, saying what was expected and what to do; `{where}`, `{path}` and `{reason}` are filled
            in.

    Raises:
        UsageError: it cannot be read, needs code that comes with it, or an index in the folder names files elsewhere.
    """
    path = tower(str(path))
    check_indexes(Path(path))
    try:
        with quiet():
            return _read(kind, path, options)
    except (UsageError, MemoryError):  # say what is wrong themselves
        raise
    except Exception as error:  # damaged files make transformers raise nearly anything
        where = (
            f"the folder '{path}'"
            if Path(path).is_dir()
            else f"'{path}', which is neither a folder nor readable from the hub"
        )
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(sentence.format(where=where, path=path, reason=reason)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which transformers prints no reports, warnings or progress bars, except for downloads.

    Callers check the result of loading and report problems in a sentence of their own. With
    `TRANSFORMERS_VERBOSITY=info` nothing is silenced.
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
        if not has_none:  # transformers has turned these off together with its own
            enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _read(kind: Any, path: str, options: dict[str, Any]) -> Any:
    if kind.__name__ in ("AutoTokenizer", "AutoProcessor"):
        _check_vocabulary(str(path))
    try:
        made = kind.from_pretrained(path, trust_remote_code=False, **options)
        return _with_older_template(made, Path(path)) if kind.__name__ == "AutoTokenizer" else made
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UsageError(
            f"'{path}' needs code of its own, which is not run; give a model that transformers knows by itself"
        ) from error


def _with_older_template(tokenizer: Any, folder: Path) -> Any:
    """Give a tokenizer without a chat template that of a processor of transformers 4, which wrote it to its own file.

    Raises:
        ValueError: the file is not JSON.
    """
    file = folder / OLDER_TEMPLATE
    if not getattr(tokenizer, "chat_template", None) and file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("chat_template"), str):
            tokenizer.chat_template = values["chat_template"]
    return tokenizer


def as_words(tokenizer: Any) -> Any:
    """Make a tokenizer read special tokens that are typed in a text, such as `</s>` or `[SEP]`, as plain words.

    The special tokens that it adds around a text are not affected. Returns the same object.
    """
    tokenizer.split_special_tokens = True
    return tokenizer


def _check_vocabulary(path: str) -> None:
    """Refuse a tokenizer whose configuration names its vocabulary file, which could lie outside the folder.

    Raises:
        UsageError: the configuration names such a file.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    config = get_tokenizer_config(path)
    for key in ("vocab", "merges"):
        if isinstance(config, dict) and isinstance(config.get(key), str):
            raise UsageError(
                f"the tokenizer in '{path}' takes its {key} from '{config[key]}', but it may read files of its own "
                "folder only; download the model again"
            )


def check_indexes(folder: Path) -> None:
    """Refuse a folder whose configuration or indexes name weights outside the folder; other paths pass.

    Raises:
        UsageError: such a name, or a damaged index; the message names the file.
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
    """Find the weights files that a configuration, or one nested in it, names (`transformers_weights`)."""
    try:
        left = [json.loads(config.read_text(encoding="utf-8"))] if config.is_file() else []
    except (OSError, ValueError, RecursionError):
        left = []  # transformers will report the fault
    while left:
        values = left.pop()
        if isinstance(values, dict):
            if "transformers_weights" in values:
                yield str(values["transformers_weights"])
            left += values.values()


def shards(index: Path) -> dict[str, str]:
    """Read an index of shards: name of a tensor -> name of its file.

    Raises:
        UsageError: the index is damaged.
    """
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
        if odd := [place for place in places.values() if not isinstance(place, str)]:
            raise TypeError(f"{odd[0]!r} is not a file name")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{index}' is damaged ({error}); download it again") from error
    return places


def _is_plain(name: str) -> bool:
    """Check, for any operating system, if a name is that of a file in the same folder: no folder, drive or parent."""
    return (
        name not in ("", "..") and "\0" not in name and PurePosixPath(name).name == name == PureWindowsPath(name).name
    )


def local_folder(path_or_id: str) -> Path:
    """Return a folder itself, or download a repository from the hub and return its folder.

    Raises:
        UsageError: the repository cannot be downloaded.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        folder = Path(snapshot_download(path_or_id, allow_patterns=list(NEEDED)))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(path_or_id, allow_patterns=[OLDER])
        return folder
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path_or_id}' cannot be downloaded from the hub ({error}); give a folder") from error


TOWERS = Path(__file__).parent.parent / "towers"
MINI = "mini:"
DIGITS = 12  # of a digest, behind the `@` of a name
#: Digests of the weights that each name after `mini:` has meant in any version of this package, the newest last.
VERSIONS = {
    "bert": ("1e19848cebff261df3bd958735b81e93",),
    "vit": ("edecbfea1fb3b4496744929cfdecacc3",),
    "vit_native": ("979ee65271f30960144a9eb7fbfaba5b",),
    "opt": ("8508efe7f0ea1d2fb95efb95095c00b4",),
    "t5": ("b70ea5f12b8726855fd49353312343ea",),
    "vit_rope": ("bf87143cc30441ff8f232ac1f030c3c4",),
    "ssl": ("514369671605a54bcbabe7b6b04c0768",),
    "clip": ("b2e1246c667f8ec33efdb4a80b732e5f",),
    "opt_canvases": ("fc205f36f327fec42bcab4286d4db9e5", "401979a06ba33b8b9266299ed6c502e0"),
    "t5_canvases": ("e5d9cd198acdd962c064267c4193be3d",),
}


def shipped() -> dict[str, Path]:
    """The towers that come with the package: name after `mini:` -> folder.

    The folder of a former version is called `NAME@DIGEST`, by the first `DIGITS` of the digest of its weights.
    """
    return {folder.name: folder for folder in TOWERS.glob("*/") if (folder / "config.json").is_file()}


def mini(name: str) -> Path:
    """Find the folder of a mini tower by its name after `mini:`, with or without a digest.

    Raises:
        UsageError: no tower has that name, or it is not in this version of the package.
    """
    base, _, digits = name.partition("@")
    versions = VERSIONS.get(base, ())
    if versions and digits == versions[-1][:DIGITS]:
        name = base
    known = {base, *(f"{base}@{digest[:DIGITS]}" for digest in versions)} if versions else ()
    if name in known and name not in shipped():
        raise UsageError(
            f"the weights of the tower '{MINI}{name}' are not in this version of the package; use the version of "
            "qformer that trained with them"
        )
    return Path(find(shipped(), name, "shipped tower"))


def tower(path: str) -> str:
    """Resolve the name of a tower, `mini:NAME`, `mini:NAME@DIGEST` or `real:NAME`, to its folder; keep any other path.

    Raises:
        UsageError: no tower has that name, or (`real_towers.NotFetched`) it is not on this machine yet.
    """
    if path.startswith(real_towers.SCHEME):
        return str(real_towers.fetched(path.removeprefix(real_towers.SCHEME)))
    if path.startswith(MINI):
        return str(mini(path.removeprefix(MINI)))
    return path


def configuration(path_or_id: str) -> Any:
    """Read the transformers configuration of a folder or hub id.

    Raises:
        UsageError: there is none.
    """
    from transformers import AutoConfig  # here alone: a configuration is checked without torch

    return read(
        AutoConfig,
        path_or_id,
        "'{path}' is not a local checkpoint, not the name of a release, and not available on the hub ({reason}); give "
        "a run, a LAVIS file, or a transformers folder",
    )
