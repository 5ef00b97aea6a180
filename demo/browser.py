"""JavaScript of the page: a conversation is kept by the browser, focus returns to the question, and files are saved.

Everything goes through what Gradio documents: `js=` of events, and `js_on_load` of `gr.HTML` with its `element`,
`props`, `trigger`, `upload` and `watch`. The files are in `demo/page/`.
"""

from __future__ import annotations

from pathlib import Path

FILES = Path(__file__).parent / "page"
# Without the comment on top, since Gradio takes for a function what begins as one.
KEEP, FILL, NEW_PICTURE, TALK, FOCUS, SAVE, SAVE_PICTURE, NAME_EXAMPLES, OPEN_HIT = (
    (FILES / f"{name}.js").read_text(encoding="utf-8").partition("\n")[2]
    for name in ("keep", "fill", "new_picture", "talk", "focus", "save", "save_picture", "name_examples", "open_hit")
)
KEEP_TALK = "(talk) => { window.qformerKeepTalk?.(talk); return []; }"
KEEP_FILES = "(picture, more) => { window.qformerKeep?.(picture, more); return []; }"
# A call that Stop ends before the server has it counts as failed in Gradio.
ASKED = f"() => {{ window.qformerStopped = false; ({FOCUS.strip()})(); return []; }}"
STOPPED = "(talk) => { window.qformerStopped = true; return [talk]; }"
UNLESS_STOPPED = "(talk) => [window.qformerStopped ? '' : talk]"
FORGET = "() => { window.qformerForget?.(); return []; }"
FOCUS_TO_EDIT = "() => document.querySelector('#question textarea')?.focus()"
