"""Videos: a few frames of a file as upright RGB pixels, by PyAV, which is an optional extra.

A file is read twice. The first time its packets are listed, which decodes nothing but tells how many frames there are
and when each is shown. The second time only those stretches are decoded, from a key frame on, in which frames lie that
are wanted. Nothing seeks, so that every container works alike.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qformer.formats import VIDEOS, VideoFile
from qformer.images import is_animated, read_image, regular
from qformer.images import shown as describe
from qformer.images.orientation import upright
from qformer.types import BadSample, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    Sample = Callable[[int, float], list[int]]

INSTALL = "videos are read by PyAV, which is not installed; run: pip install -e '.[video]'"
#: Containers that are opened, by their names in FFmpeg: none that names other files or addresses, as playlists do.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpeg,mpegts,ogg,flv,asf"
#: How files of WebM and MKV, and of MP4 and MOV begin; and brands of pictures in the container of MP4.
EBML, BOXES = b"\x1aE\xdf\xa3", (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
STILL = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
COMPLETE, SLACK = 0.9, 0.5  # least share of the duration that must be there, or all but so many seconds
MIXED = 4  # packets of all streams for each frame that is allowed; sound has about two
AGREE = 0.01  # by which the stated rate and that of the time stamps may differ; then the stated one is exact
LARGEST = 178_956_970  # pixels of a frame; as of pictures


@dataclass(frozen=True)
class Bounds:
    """Bounds of the videos that are read; by default those for files of one's own.

    Attributes:
        containers, codecs: names of demuxers and decoders in FFmpeg, separated by commas; without codecs, any.
        frames, seconds: most of them. pixels: most of a frame; in_all: of all frames; kept: of those asked for.
    """

    containers: str = CONTAINERS
    codecs: str = ""
    frames: float = math.inf
    seconds: float = math.inf
    pixels: int = LARGEST
    in_all: float = math.inf
    kept: float = math.inf

    @property
    def options(self) -> dict[str, str]:
        """Options of FFmpeg, which also hold for what it decodes to look into a file."""
        narrow = {"codec_whitelist": self.codecs, "max_pixels": f"{self.pixels}"} if self.codecs else {}
        return {"format_whitelist": self.containers, **narrow}


USUAL = Bounds()
#: For files of strangers: common containers and codecs alone, since FFmpeg has hundreds that nobody sends.
STRANGERS = Bounds(
    containers="mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif",
    codecs="h264,hevc,vp8,vp9,libvpx,libvpx-vp9,av1,libdav1d,mpeg4,gif",
    frames=10_000,
    seconds=300,
    pixels=10_000_000,
    in_all=8_000_000_000,  # two minutes in full HD
    kept=100_000_000,  # 48 frames in full HD
)
#: EXIF's orientation by the first two rows of a display matrix, of which the last column is never used.
TURNS = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, in the order in which they are shown.

    Attributes:
        frames: uint8[F, 3, h, w].
        fps: frames of the video a second.
        sampled: the frames are those that are to be shown; otherwise a resolution strategy chooses some of them.
    """

    frames: Tensor
    fps: float
    sampled: bool = False

    def __post_init__(self) -> None:
        shape, kind = list(self.frames.shape), str(self.frames.dtype).removeprefix("torch.")
        if self.frames.ndim != 4 or shape[1] != 3 or kind != "uint8" or not self.frames.numel():
            raise UsageError(f"the frames of a clip are {kind}{shape}; give uint8[F, 3, h, w], at least one frame")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise UsageError(f"the clip has {self.fps} frames a second; give a positive number")


class NoDecoder(UsageError, BadSample):
    """A video that PyAV cannot decode here: wrong input to a command, a bad sample of a data set."""

    def __init__(self, message: str) -> None:
        UsageError.__init__(self, message)
        self.kind, self.detail = "undecodable", message

    def __str__(self) -> str:
        return self.detail


def read_video(path: str | Path, sample: Sample | None = None) -> Clip:
    """Read a video file; of frames that are not named none is made, and as few as possible are decoded.

    Args:
        sample: chooses frames by their numbers, from the number of all and how many there are a second; such as
            `ResolutionStrategy.sample`. None takes all, which of a minute in full HD are gigabytes.

    Returns:
        The frames, turned as a player turns them, with those of another size made as large as the first.

    Raises:
        UsageError: PyAV is not installed, it has no decoder for this video, or `sample` names frames that do not exist.
        BadSample: kinds `missing` and `unreadable`; `undecodable`: it is no video, damaged, cut off, or PyAV has no
            decoder for it (`NoDecoder`, an error of both kinds).
    """
    return Video(path).read(sample)


def begins_as_video(path: str | Path) -> bool:
    """Return True for a file that begins as MP4, MOV, WebM and MKV do, whatever its name; a GIF is a picture here."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        head = file.read(12)
    return head.startswith(EBML) or (head[4:8] in BOXES and head[8:12] not in STILL)


def is_video(shown: Any) -> bool:
    """Return True for the path of a file that is a video by its name, or that is a `VideoFile`."""
    return isinstance(shown, VideoFile) or (isinstance(shown, str | Path) and Path(shown).suffix.lower() in VIDEOS)


def moves(path: Path) -> bool:
    """Return True for a GIF of several frames, where PyAV can read it as a video; others are pictures."""
    return path.suffix.lower() == ".gif" and find_spec("av") is not None and is_animated(path)


def read_shown(shown: Any, strategy: Any) -> Tensor | Clip:
    """Read a picture in any form (`read_image`), or a file that is a video by its name.

    Args:
        strategy: the `ResolutionStrategy` that chooses frames.

    Returns:
        uint8[3, h, w], or a clip of the frames that were chosen.

    Raises:
        UsageError, BadSample: as `read_image` and `read_video` do.
    """
    if isinstance(shown, Clip):
        return shown
    return read_video(shown, strategy.sample) if is_video(shown) else read_image(shown)


class Video:
    """A video file whose packets have been listed.

    Attributes:
        total: number of its frames.
        fps: how many of them are shown a second, on average.
        size: (width, height) of a frame as it is stored, in pixels.
    """

    def __init__(self, path: str | Path, bounds: Bounds = USUAL) -> None:
        """List the packets.

        Raises:
            UsageError, BadSample: see `read_video`; or it exceeds the bounds.
        """
        self.path = Path(path)
        self.bounds = bounds
        self._packets: list[tuple[int | None, bool]] = []  # time stamp, and can decoding begin here; as stored
        shown_at: list[int | None] = []
        end, seconds = 0, 0.0  # of the video, in units of its time stamps; of all streams
        with self._open() as (container, stream):
            self.size: tuple[int, int] = (stream.codec_context.width, stream.codec_context.height)
            for number, packet in enumerate(container.demux()):
                if len(self._packets) > bounds.frames or number > MIXED * bounds.frames:
                    raise self._bad(f"has more than {bounds.frames:,} frames, or too much sound")
                until = (packet.pts or 0) + (packet.duration or 0)
                seconds = max(seconds, float(until * (packet.time_base or 0)))
                if packet.stream_index != stream.index or not packet.size:
                    continue
                self._packets.append((packet.pts, packet.is_keyframe))
                if not packet.is_discard:  # the others are only there to decode from
                    shown_at.append(packet.pts)
                    end = max(end, until)
            stated = (container.duration or 0) / 1e6
            if stream.frames > len(self._packets) or stated - seconds > max((1 - COMPLETE) * stated, SLACK):
                raise self._bad("is cut off before its end")
            if not shown_at:
                raise self._bad("has no frames")
            self.total = len(shown_at)
            #: When each frame is shown, in that order; empty where packets do not say, so that frames are counted.
            self._times = [] if None in shown_at else sorted(time for time in shown_at if time is not None)
            self.fps = self._rate(stream, end)
        self._require("seconds", self.total / self.fps, bounds.seconds)
        self._check_size(self.size)

    def _rate(self, stream: Any, end: int) -> float:
        """Frames a second, by the time stamps unless the container states the same."""
        stated = float(stream.average_rate or stream.guessed_rate or 0)
        if not self._times:
            return stated or 1.0
        first, last = self._times[0], self._times[-1]
        # Where nothing says how long the last frame is shown, it is as long as the others on average.
        span = end - first if end > last else (last - first) * self.total / max(self.total - 1, 1)
        measured = self.total / float(span * stream.time_base) if span else 0.0
        return stated if measured and abs(stated / measured - 1) < AGREE else measured or stated or 1.0

    def read(self, sample: Sample | None = None) -> Clip:
        """Decode the frames that `sample` names, or all.

        Raises:
            UsageError, BadSample: see `read_video`.
        """
        numbers = list(range(self.total)) if sample is None else [int(one) for one in sample(self.total, self.fps)]
        if not numbers or min(numbers) < 0 or max(numbers) >= self.total:
            raise UsageError(
                f"frames {numbers[:8]} of '{describe(self.path)}' were asked for; name some of its {self.total} "
                "frames, counted from 0"
            )
        self._check_size(self.size, len(numbers))
        found = self._decode(sorted(set(numbers)))
        return Clip(torch.stack([found[one] for one in numbers]), self.fps, sample is not None)

    def _decode(self, numbers: list[int]) -> dict[int, Tensor]:
        """The frames with these numbers, in ascending order: uint8[3, h, w] each, all of one size."""
        waiting = deque(zip(numbers, self._begins(numbers), strict=True))
        found: dict[int, Tensor] = {}
        before, counted, decodes, number = None, 0, False, -1
        first: Any = None  # (width, height) of the first frame
        with self._open() as (container, stream):
            for packet in container.demux(stream):
                if not waiting:
                    break
                number += packet.size > 0
                if packet.size and not decodes:
                    if number < waiting[0][1]:
                        continue
                    stream.codec_context.flush_buffers()
                    decodes, before = True, None
                for frame in packet.decode() if decodes else ():
                    if first is None:
                        first = frame.width, frame.height
                        self._check_size(first, len(numbers))  # the container may have said otherwise
                    at = (frame.pts or 0) if self._times else counted
                    counted += 1
                    while waiting and at >= self._place(waiting[0][0]):
                        # A packet may show nothing; what was shown before is still there then.
                        late = at > self._place(waiting[0][0]) and before is not None
                        found[waiting.popleft()[0]] = self._pixels(before if late else frame, first)
                    before = frame
                decodes = decodes and bool(waiting) and waiting[0][1] <= number
            for one, _ in waiting:
                if before is None:
                    raise self._bad(f"has a frame {one} that cannot be decoded")
                found[one] = self._pixels(before, first)
        return found

    def _begins(self, numbers: list[int]) -> list[int]:
        """For each frame the number of the packet from which to decode: the last key frame that is not shown later."""
        if not self._times:
            return [0] * len(numbers)
        packet_at = {time: number for number, (time, _) in enumerate(self._packets)}
        keys = [number for number, (time, is_key) in enumerate(self._packets) if is_key and time is not None]
        begins = []
        for time in map(self._place, numbers):
            earlier = keys[: bisect_right(keys, packet_at[time])]
            begins.append(next((one for one in reversed(earlier) if self._packets[one][0] <= time), 0))  # type: ignore[operator]
        return begins

    def _place(self, number: int) -> int:
        """Time stamp of a frame, or its number where frames are counted."""
        return self._times[number] if self._times else number

    def _pixels(self, frame: Any, size: tuple[int, int]) -> Tensor:
        """Upright RGB pixels of a frame, uint8[3, h, w], after it is resized to (width, height)."""
        if frame.is_corrupt:
            raise self._bad("has damaged frames")
        clear = any(component.is_alpha for component in frame.format.components)
        # A scaler that is gone at once: the frame would keep one with threads, for which a forked worker waits forever.
        scaler = _pyav().video.reformatter.VideoReformatter()
        pixels = scaler.reformat(frame, *size, format="rgba" if clear else "rgb24").to_ndarray()
        if clear:  # onto white, as pictures
            alpha = pixels[..., 3:].astype(np.uint16)
            pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return torch.from_numpy(np.array(upright(pixels, _orientation(frame)))).permute(2, 0, 1)

    def _check_size(self, size: tuple[int, int], kept: int = 0) -> None:
        """Check that frames of this size are within the bounds, all of them and so many that are kept."""
        pixels = size[0] * size[1]
        if pixels > self.bounds.pixels:
            raise self._bad(f"has frames of {size[0]} x {size[1]} pixels, more than {self.bounds.pixels:,}")
        self._require("pixels in all its frames", self.total * pixels, self.bounds.in_all)
        self._require(f"pixels in the {kept} frames that are shown", kept * pixels, self.bounds.kept)

    def _require(self, what: str, number: float, most: float) -> None:
        if number > most:
            raise self._bad(f"has {number:,.0f} {what}, more than {most:,.0f}; make it shorter or smaller")

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """The container and its first video stream; all faults of the file become one of our two errors."""
        av = _pyav()
        with regular(self.path):
            file = self.path.open("rb")
        try:
            with (
                file,
                av.open(file, options=self.bounds.options, metadata_errors="ignore") as container,
            ):
                if not container.streams:
                    raise self._bad("is damaged or cut off: no stream is left")
                cover = av.stream.Disposition.attached_pic
                stream = next((one for one in container.streams.video if not one.disposition & cover), None)
                if stream is None:
                    raise self._bad("has no video stream")
                known = self.bounds.codecs.split(",")
                if stream.codec_context is None or (
                    self.bounds.codecs and stream.codec_context.codec.name not in known
                ):
                    raise av.error.DecoderNotFoundError(0, "")
                if self.bounds.codecs:
                    stream.codec_context.options = {"max_pixels": f"{self.bounds.pixels}"}
                yield container, stream
        except av.error.DecoderNotFoundError as error:
            raise NoDecoder(
                f"the video '{describe(self.path)}' is encoded in a way for which this PyAV has no decoder; convert "
                "it, such as to MP4 with H.264"
            ) from error
        except (av.error.FFmpegError, OSError) as error:
            raise self._bad(f"cannot be read ({error.strerror or type(error).__name__})") from error

    def _bad(self, fault: str) -> BadSample:
        return BadSample("undecodable", f"the video '{describe(self.path)}' {fault}")


def _pyav() -> Any:
    """The package `av`.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError(INSTALL) from error
    return av


def _orientation(frame: Any) -> int:
    """EXIF's number of the orientation in which a frame is stored, 1 to 8; phones turn videos by a display matrix."""
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return 1
    a, b, _, c, d = np.frombuffer(bytes(stored), dtype=np.int32)[:5].astype(float)
    largest = max(abs(a), abs(b), abs(c), abs(d), 1.0)
    return TURNS.get(tuple(round(one / largest) for one in (a, b, c, d)), 1)
