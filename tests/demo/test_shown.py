"""Several pictures and clips of a visitor: what is read, in which order, what is refused, and how it is said."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from qformer import resolution
from qformer.demo import backend, finding, limits, shown, tabs
from qformer.resolution.limits import Limited
from qformer.types import BadSample, Plan, UsageError
from qformer.videos import STRANGERS, Clip, Video, read_video
from tests.clips import SIZE, STEP, level, write_clip
from tests.clips import picture as drawn
from tests.demo.visitor import API, META, Visitor

if TYPE_CHECKING:
    from qformer.model.vision_language import VisionLanguageModel

av: Any = pytest.importorskip("av")
ASK = "what color is the star?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds, of which `fixed` takes the frames 0, 8 and 16."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 24, 8)


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = [Image.fromarray(drawn(number)) for number in (0, 10, 20)]
    file = tmp_path_factory.mktemp("gif") / "moving.gif"
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=1000)
    return file


def test_a_row_is_read_in_its_order(model: VisionLanguageModel, picture: Path, clip: Path, moving: Path) -> None:
    row = shown.row_of(model, str(picture), [str(clip), str(picture), str(moving)])
    assert [isinstance(one, Clip) for one in row] == [False, True, False, True]
    assert [level(frame) for frame in row[1].frames] == pytest.approx([0, 8, 16], abs=0.5)  # type: ignore[union-attr]
    assert len(row[3].frames) == 3  # type: ignore[union-attr]
    assert np.asarray(shown.still(row[1]))[-1, -1] == pytest.approx([8 * STEP] * 3, abs=8)


def test_stills_are_opened_one_at_a_time(
    model: VisionLanguageModel, picture: Path, clip: Path, moving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations are saved outside the queue, and eight at once held eight pictures in full."""
    opened: list[bool] = []
    whole = shown._open

    def note(*one: Any) -> Any:
        opened.append(shown.ONE_PICTURE.locked())
        return whole(*one)

    monkeypatch.setattr(shown, "_open", note)
    made = shown.stills_of(model, str(picture), [str(clip), str(moving)], 64)
    assert opened == [True] * 3
    assert not shown.ONE_PICTURE.locked()
    assert [max(one.size) for one in made] == [64, min(64, max(SIZE)), min(64, max(SIZE))]
    with pytest.raises(UsageError, match="cannot be read"):
        shown.stills_of(model, __file__, None, 64)
    assert not shown.ONE_PICTURE.locked()


def test_a_question_about_all_of_them(model: VisionLanguageModel, picture: Path, clip: Path) -> None:
    given = str(picture), [str(picture), str(clip)]
    asked = backend.prepare(model, given[0], ASK, more=given[1])
    strategy = model.frontend.strategy
    tiles = model.frontend.tiles([[picture, picture, read_video(clip, strategy.sample)]])
    assert asked.tiles.plans == tiles.plans
    assert asked.places == "[picture 1: 8 tokens][picture 2: 8 tokens][clip 3: 3 frames, 24 tokens]"
    assert asked.prompt == f"Question: {ASK} Answer:"
    assert [*backend.answer(model, asked)] == model.answer(tiles, [ASK])
    assert backend.prepare(model, str(clip), ASK).places == "[clip: 3 frames, 24 tokens]"
    assert backend.prepare(model, None, "", more=[str(picture)]).places == "[picture: 8 tokens]"
    assert finding.captions(model, given[0], 1, more=given[1])[0].text == model.generate(tiles)[0]
    assert len(backend.suggest(model, given[0], more=given[1])) == 2


def test_a_gif_above_is_the_picture_it_was(model: VisionLanguageModel, moving: Path, tmp_path: Path) -> None:
    """And further on a clip, if it moves."""
    first = shown.row_of(model, str(moving))
    assert np.array_equal(np.asarray(first[0]), drawn(0))
    Image.fromarray(drawn(3)).save(tmp_path / "still.gif")
    (still,) = shown.row_of(model, None, [str(tmp_path / "still.gif")])
    assert isinstance(still, Image.Image)


def test_markers_stand_where_the_plan_has_them() -> None:
    """Those of LLaVA-UHD stand between tiles, those of Qwen2-VL around a picture."""
    model: Any = SimpleNamespace(connector=SimpleNamespace(count_tokens=lambda plan: plan.tokens))
    photo = Image.new("RGB", (672, 448))
    sliced = resolution.build("uhd").plan(*photo.size)
    assert (sliced.grid, len(sliced.tiles)) == ((2, 1), 3)
    told = "[picture: 432 tokens],[tile 2]\n[tile 3]"
    assert shown.places(model, [photo], sliced) == told
    qwen = resolution.build("qwen2vl")
    moving = Clip(torch.zeros(4, 3, 56, 56, dtype=torch.uint8), 2.0)
    plan = Plan.join([qwen.plan(*photo.size), qwen.plan_video(56, 56, 4)])
    before, after = "<|vision_start|>", "<|vision_end|>"
    frames = plan.parts[1].tokens
    told = f"{before}[picture 1: 384 tokens]{after}{before}[clip 2: 4 frames, {frames} tokens]{after}"
    assert shown.places(model, [photo, moving], plan) == told


def test_a_model_of_one_picture_says_so(
    model: VisionLanguageModel, picture: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, in place of the box, and to those who send several all the same."""
    monkeypatch.setattr(model.frontend, "strategy", Limited(model.frontend.strategy, tiles=1))
    assert shown.lacks(model).startswith("this model is shown one picture alone: a row of 2 pictures makes 2 tiles")
    assert shown.lacks(model, clips=True).startswith("this model is shown no clips: a clip of 2 frames")
    for given, said in (
        ((str(picture), [str(picture)]), "one picture alone"),
        ((str(clip), None), "no clips"),
        ((None, [str(clip)]), "no clips"),
    ):
        with pytest.raises(UsageError, match=f"this model is shown {said}"):
            shown.row_of(model, *given)
    assert len(shown.row_of(model, str(picture))) == 1
    with gr.Blocks() as page:
        box = tabs.more_box(model, "more")
    assert not box.visible
    assert any(
        "one picture alone" in str(block.value) for block in page.blocks.values() if isinstance(block, gr.Markdown)
    )


def test_without_pyav(model: VisionLanguageModel, clip: Path, moving: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for refuse in (lambda: shown.row_of(model, str(clip)), lambda: limits.check_file(clip)):
        with pytest.raises(UsageError, match="PyAV, which is not installed"):
            refuse()
    assert isinstance(shown.row_of(model, None, [str(moving)])[0], Image.Image)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"frames": 20}, "has more than 20 frames"),
        ({"seconds": 2.5}, "has 3 seconds, more than 2"),
        ({"pixels": 3_000}, "has frames of 64 x 48 pixels, more than 3,000"),
        ({"in_all": 70_000}, "has 73,728 pixels in all its frames, more than 70,000"),
        ({"codecs": "vp9"}, "no decoder; convert it"),
        ({"containers": "gif"}, "cannot be read"),
    ],
)
def test_limits_of_clips(clip: Path, bounds: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at the upload, before a frame is made; and nobody learns where files lie."""
    limits.check_file(clip)
    monkeypatch.setattr(limits, "STRANGERS", replace(limits.STRANGERS, **bounds))
    with pytest.raises(UsageError, match=said) as refused:
        limits.check_file(clip)
    assert str(clip.parent) not in str(refused.value)
    assert "'clip.mp4'" in str(refused.value)


def test_what_is_shown_is_bounded_too(model: VisionLanguageModel, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = model.frontend.strategy
    monkeypatch.setattr(limits, "STRANGERS", replace(limits.STRANGERS, kept=9_000))
    with pytest.raises(UsageError, match="has 9,216 pixels in the 3 frames that are shown, more than 9,000"):
        limits.open_clip(clip, strategy)
    with pytest.raises(UsageError, match=r"a clip of 3 frames of 64 x 48 pixels makes 3 tiles, but limits\.tiles is 2"):
        limits.open_clip(clip, Limited(strategy, tiles=2))
    video = Video(clip, replace(STRANGERS, kept=9_000))
    video.size = (8, 8)  # the container may lie
    with pytest.raises(BadSample, match="has 9,216 pixels in the 3 frames that are shown"):
        video.read(lambda *_: [0, 8, 16])
    with pytest.raises(UsageError, match="got 9 pictures and clips; give at most 8"):
        shown.row_of(model, None, [str(clip)] * 9)


def test_a_clip_with_sound(tmp_path: Path) -> None:
    """It is read although no decoder of sound is among those that strangers' files may use."""
    file = tmp_path / "loud.mp4"
    with av.open(str(file), "w") as container:
        stream, loud = container.add_stream("libx264", rate=8), container.add_stream("aac", rate=48000)
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        for number in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(number), format="rgb24")))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            container.mux(loud.encode(frame))
        container.mux(stream.encode(None))
        container.mux(loud.encode(None))
    assert Video(file, STRANGERS).total == 8
    with pytest.raises(UsageError, match="no decoder; convert it"):
        Video(file, replace(STRANGERS, codecs="aac"))


def test_files_that_are_no_clips(tmp_path: Path, clip: Path) -> None:
    data = clip.read_bytes()
    for name, content in (
        ("cut.mp4", data[: len(data) * 2 // 3]),
        ("noise.mp4", data[:12] + bytes(range(256)) * 40),
        ("list.mp4", b"#EXTM3U\n#EXTINF:10,\nclip.mp4\n#EXT-X-ENDLIST\n"),
        ("page.webm", b"<html><script>alert(1)</script></html>"),
        ("head.webm", b"\x1aE\xdf\xa3"),
        ("empty.mp4", b""),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot be read|no stream is left|has no frames") as refused:
            limits.check_file(file)
        assert str(tmp_path) not in str(refused.value)


def test_several_files_over_the_api(
    visitor: Visitor, model: VisionLanguageModel, picture: Path, clip: Path, no_network: None
) -> None:
    """A clip and two pictures in one upload; clients that know no `more` are answered as ever."""
    files = [("files", (one.name, io.BytesIO(one.read_bytes()))) for one in (picture, clip, picture)]
    uploaded = visitor.http.post(f"{API}/upload", files=files)
    assert uploaded.status_code == 200, uploaded.text
    first, *more = ({"path": path, "meta": META} for path in uploaded.json())
    right = backend.answer_to(model, str(picture), ASK, more=[str(clip), str(picture)])
    assert visitor.outcome([first, ASK, "", "vqa", None, None, more]) == ("complete", right)
    assert visitor.outcome([None, ASK, "", "vqa", None, None, more])[0] == "complete"
    assert visitor.outcome([first, ASK, ""]) == ("complete", backend.answer_to(model, str(picture), ASK))
    assert visitor.outcome([first, 1, "", 0.9, 1, more], "caption")[0] == "complete"
    assert visitor.outcome([more[0], ASK, ""], "look") == (
        "400",
        "'data' must be a list of 4 values (Picture, Question, Answer, token)",
    )
    for wrong, said in (
        ([{"path": "/etc/passwd", "meta": META}], "does not belong to the page"),
        (["/etc/passwd"], "files that were uploaded to this page"),
        ({"path": first["path"], "meta": META}, "must be a list"),
        ([first] * 8, "got 9 pictures and clips"),
    ):
        status, sentence = visitor.outcome([first, ASK, "", "vqa", None, None, wrong])
        assert status in ("400", "403", "error")
        assert said in sentence


def test_uploads_that_hold_no_clip_or_too_much(visitor: Visitor, clip: Path) -> None:
    data = clip.read_bytes()
    for name, content, said in (
        ("a.mp4", data[: len(data) // 2], "the video 'a.mp4' "),
        ("a.mp4", data.replace(b"avc1", b"zzzz"), "no decoder; convert it"),
        ("a.mp4", data[:100] + bytes(limits.MAX_BYTES), "a file is too large; the limit is 20 MB"),
        ("a.mp4", bytes(101_000_000), "the limit is 100 MB"),
    ):
        response = visitor.upload(content, name)
        assert response.status_code in (400, 413)
        assert said in response.text
