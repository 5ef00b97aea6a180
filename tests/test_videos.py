"""Frames of video files that the tests write themselves: which, when, which way up; and files that are no video."""

from __future__ import annotations

import pickle
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from qformer.types import BadSample, UsageError
from qformer.videos import Clip, Video, read_video
from tests.clips import CODECS, SIZE, level, picture, write_clip

if TYPE_CHECKING:
    from pathlib import Path

av: Any = pytest.importorskip("av")
PICKED = [23, 0, 5, 5, 17, 16, 8]


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_of_every_container(suffix: str, tmp_path: Path) -> None:
    """All of them, and some in any order; WebM and Matroska do not state how many there are."""
    file = write_clip(tmp_path / f"clip{suffix}")
    clip = read_video(file)
    assert (clip.frames.shape, clip.frames.dtype, clip.sampled) == ((24, 3, SIZE[1], SIZE[0]), torch.uint8, False)
    assert [level(frame) for frame in clip.frames] == pytest.approx(range(24), abs=0.49)
    assert clip.fps == 8
    asked = []
    some = read_video(file, lambda total, fps: asked.append((total, fps)) or PICKED)  # type: ignore[func-returns-value]
    assert asked == [(24, 8.0)]
    assert torch.equal(some.frames, clip.frames[PICKED])
    assert (some.fps, some.sampled) == (8, True)


def test_gif(tmp_path: Path) -> None:
    """Of which what is transparent is white, as in pictures, and which counts time in hundredths of a second."""
    shown = [Image.fromarray(picture(number)).convert("RGBA") for number in (0, 10, 20)]
    shown[0].putalpha(Image.fromarray(np.full((SIZE[1], SIZE[0]), 0, np.uint8)))
    file = tmp_path / "clip.gif"
    shown[0].save(file, save_all=True, append_images=shown[1:], duration=100, disposal=2)
    clip = read_video(file)
    assert clip.fps == pytest.approx(10)
    assert clip.frames[0].min() == 255
    assert [level(frame) for frame in clip.frames[1:]] == pytest.approx([10, 20], abs=0.5)


def test_frames_shown_for_unequal_times(tmp_path: Path) -> None:
    """A phone's variable rate: frames are numbered as they are shown, and the rate is the average one."""
    file = write_clip(tmp_path / "clip.mp4", 12, 8, [0, 1, 2, 9, 10, 11, 20, 21, 22, 30, 31, 47])
    clip = read_video(file, lambda total, fps: [11, 3, 9])
    assert [level(frame) for frame in clip.frames] == pytest.approx([11, 3, 9], abs=0.4)
    assert clip.fps == pytest.approx(12 / (48 / 8))


@pytest.mark.parametrize("turned", [(-90, False, False), (90, False, False), (180, False, False), (90, True, False)])
def test_turned_as_a_player_turns_it(turned: tuple[int, bool, bool], tmp_path: Path) -> None:
    """An upright phone stores its videos lying, with a matrix that turns them by -90 degrees."""
    clip = read_video(write_clip(tmp_path / "clip.mov", 2, turned=turned))
    expected = np.rot90(picture(1), turned[0] // 90)
    expected = expected[:, ::-1] if turned[1] else expected
    found = clip.frames[1].permute(1, 2, 0).numpy()
    assert found.shape == expected.shape
    for rows in (slice(2, 10), slice(-10, -2)):  # the corners, which tell all ways to turn it apart
        for columns in (slice(2, 10), slice(-10, -2)):
            assert found[rows, columns] == pytest.approx(expected[rows, columns], abs=12)


def test_no_more_is_decoded_than_is_needed(tmp_path: Path) -> None:
    """The third stretch between key frames is damaged: the others can be read, and it alone cannot."""
    file = write_clip(tmp_path / "clip.mp4")
    with av.open(str(file)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    hurt = [(packets[number].pos, packets[number].size) for number in range(keys[2], keys[3])]
    shown = sorted(packet.pts for packet in packets)
    times = [packets[keys[2]].pts, packets[keys[3]].pts]
    first, last = (shown.index(time) for time in times)
    data = bytearray(file.read_bytes())
    for place, size in hurt:
        data[place + 4 : place + size] = bytes([255]) * (size - 4)
    file.write_bytes(data)
    outside = [*range(first - 8), *range(last, 24)]
    assert outside
    assert [level(one) for one in read_video(file, lambda *_: outside).frames] == pytest.approx(outside, abs=0.4)
    with pytest.raises(BadSample, match=r"undecodable: the video '.*' cannot be read"):
        read_video(file, lambda *_: [first])


def cut(file: Path, share: float) -> Path:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    return file


def without_codec(file: Path) -> Path:
    data = file.read_bytes()
    file.write_bytes(data.replace(b"avc1", b"zzzz"))
    return file


def sound(file: Path) -> Path:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def test_files_that_are_no_video(tmp_path: Path) -> None:
    """Bad files are bad samples; what another installation could read is an error of usage."""
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:10,\nclip.mp4\n#EXT-X-ENDLIST\n")  # names other files
    for file, said in (
        (cut(write_clip(tmp_path / "cut.mp4"), 0.6), "undecodable"),  # its table of contents is at the end
        (cut(write_clip(tmp_path / "cut.webm"), 0.6), "cut off before its end"),
        (cut(write_clip(tmp_path / "cut.avi"), 0.5), "undecodable"),
        (sound(tmp_path / "sound.mp4"), "has no video stream"),
        (tmp_path / "noise.mp4", "cannot be read"),
        (tmp_path / "empty.mp4", "cannot be read"),
        (tmp_path / "list.m3u8", "cannot be read"),
        (tmp_path / "none.mp4", "missing: "),
        ("http://example.org/clip.mp4", "missing: .*addresses are not fetched"),
        (tmp_path, "unreadable: "),
    ):
        with pytest.raises(BadSample, match=said):
            read_video(file)
    with pytest.raises(UsageError, match="no decoder; convert it") as raised:
        read_video(without_codec(write_clip(tmp_path / "odd.mp4", 2)))
    again = pickle.loads(pickle.dumps(raised.value))  # on its way from a data worker, where it is a bad sample
    assert isinstance(again, BadSample)
    assert (again.kind, str(again)) == ("undecodable", str(raised.value))


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_clip(tmp_path / "clip.mp4", 3)
    for wrong in ([], [3], [-1, 0]):
        with pytest.raises(UsageError, match="name some of its 3 frames, counted from 0"):
            Video(file).read(lambda total, fps, wrong=wrong: wrong)  # type: ignore[misc]
    for frames, fps, said in (
        (torch.zeros(0, 3, 4, 4).byte(), 1.0, r"uint8\[0, 3, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4), 1.0, r"float32\[2, 3, 4, 4\]"),
        (torch.zeros(3, 4, 4).byte(), 1.0, r"uint8\[3, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4).byte(), 0.0, "0.0 frames a second"),
    ):
        with pytest.raises(UsageError, match=said):
            Clip(frames, fps)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"PyAV, which is not installed; run: pip install -e '.\[video\]'"):
        read_video(file)
