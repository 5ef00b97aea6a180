"""A page of blind pairs: two pictures side by side, a question with two options to write, and answers to give.

What is typed stays in the browser under a key of these pairs, until one of two files is saved: `Questions.csv`, in
MMVP's layout, or `answers.csv`, one person's answers. Nothing is sent anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from qformer.figures import page as sheet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

STYLE = """
.bar { position: sticky; top: 0; z-index: 1; background: var(--back); border-bottom: 1px solid var(--line);
  display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; padding: 10px 0; margin: 20px 0 0; }
.bar output { flex: 1 1 14em; font-variant-numeric: tabular-nums; }
button { font: inherit; color: var(--ink); background: var(--raised); border: 1px solid var(--line); border-radius: 6px;
  padding: 7px 14px; min-height: 40px; cursor: pointer; }
.pair { border-top: 1px solid var(--line); padding: 18px 0 22px; scroll-margin-top: 110px; }
.bar + .pair { border-top: 0; }
.pair h2 { margin: 0 0 10px; display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; }
.pair h2 span { font-size: 14px; font-weight: 400; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; max-width: 760px; }
figure { margin: 0; min-width: 0; } figure img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block;
  background: var(--raised); border-radius: 6px; }
figcaption { font-size: 13px; margin: 6px 0 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.asks { font-size: 17px; margin: 0 0 10px; } .asks:empty { display: none; } td:first-child { white-space: nowrap; }
fieldset { border: 0; padding: 0; margin: 4px 0 0; display: flex; flex-wrap: wrap; gap: 0 16px; min-width: 0; }
fieldset label { display: flex; gap: 6px; align-items: baseline; min-height: 36px; padding: 6px 0; }
.write { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 12px; max-width: 760px; margin: 10px 0 0; }
.write label { font-size: 13px; color: var(--soft); min-width: 0; } .write .whole { grid-column: 1 / -1; }
input[type=text], select { font: inherit; color: var(--ink); background: var(--back); border: 1px solid var(--line);
  border-radius: 6px; padding: 7px 9px; width: 100%; min-height: 40px; }
@media (max-width: 560px) { .pair { scroll-margin-top: 130px; }
  .write { grid-template-columns: 1fr; } .bar button { flex: 1 1 40%; } }
"""

PAIRS = sheet.ENVIRONMENT.from_string("""\
<form id=pairs data-key='{{ key }}' autocomplete=off onsubmit='return false'>
<div class=bar><output id=told aria-live=polite></output>
<button type=button id=questions>Save questions</button>
<button type=button id=answers>Save answers</button></div>
{% for pair in pairs %}
{% set p = loop.index %}
<section class=pair id=pair{{ p }}><h2>Pair {{ p }}<span>near {{ "%.3f" | format(pair.near) }}</span>
  <span>far {{ "%.3f" | format(pair.far) }}</span>{% if pair.pattern %}<span>{{ pair.pattern }}</span>{% endif %}</h2>
<p class=asks data-says=question></p>
<div class=two>
  {% for image in pair.images %}
  {% set row = 2 * p - 2 + loop.index %}
  <figure>{{ picture(image, alt="picture %d" % row) }}
    <figcaption class=soft>{{ row }} · {{ pair.names[loop.index0] }}</figcaption>
    <fieldset aria-label='Picture {{ row }}'>
      {% for letter in "ab" %}
      <label><input type=radio name=row{{ row }} value={{ letter }}> ({{ letter }})
        <span data-says='{{ letter }}'></span></label>
      {% endfor %}
    </fieldset></figure>
  {% endfor %}
</div>
<div class=write>
  <label class=whole>Question<input type=text name=question{{ p }} value='{{ pair.question }}'></label>
  <label>(a)<input type=text name=a{{ p }} value='{{ pair.options[0] }}'></label>
  <label>(b)<input type=text name=b{{ p }} value='{{ pair.options[1] }}'></label>
  <label class=whole>Pattern<select name=pattern{{ p }}><option></option>
    {% for name in patterns %}<option{{ " selected" if name == pair.pattern }}>{{ name }}</option>{% endfor %}
  </select></label>
</div></section>
{% endfor %}
</form>""")

SCRIPT = Markup("""\
<script>
"use strict";
const form = document.getElementById("pairs"), key = form.dataset.key, pairs = form.querySelectorAll(".pair");
const field = (name) => form.elements.namedItem(name);
const text = (name) => field(name).value.replace(/\\s+/g, " ").trim();
let typed = {};
try { typed = JSON.parse(localStorage.getItem(key)) || {}; } catch (error) { typed = {}; }
for (const [name, value] of Object.entries(typed))
  if (field(name) && typeof value === "string") field(name).value = value;

function show() {
  let written = 0, answered = 0;
  pairs.forEach((pair, at) => {
    const p = at + 1;
    if (text("question" + p) && text("a" + p) && text("b" + p)) written += 1;
    for (const row of [2 * p - 1, 2 * p]) if (text("row" + row)) answered += 1;
    for (const says of pair.querySelectorAll("[data-says]")) says.textContent = text(says.dataset.says + p);
  });
  document.getElementById("told").value =
    `${written} of ${pairs.length} questions written, ${answered} of ${2 * pairs.length} pictures answered`;
}

form.addEventListener("input", (event) => {
  typed[event.target.name] = event.target.value;
  try { localStorage.setItem(key, JSON.stringify(typed)); } catch (error) { /* saved files are what counts */ }
  show();
});

function save(name, rows) {
  const quoted = (cell) => /[",\\r\\n]/.test(cell) ? `"${cell.replace(/"/g, '""')}"` : cell;
  const blob = new Blob([rows.map((row) => row.map((cell) => quoted(String(cell))).join(",") + "\\r\\n").join("")],
    { type: "text/csv;charset=utf-8" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

const letter = (row) => text("row" + row) ? `(${text("row" + row)})` : "";
document.getElementById("questions").addEventListener("click", () => {
  const rows = [["Index", "Question", "Options", "Correct Answer", "Pattern"]];
  for (let row = 1; row <= 2 * pairs.length; row += 1) {
    const p = Math.ceil(row / 2), a = text("a" + p), b = text("b" + p);
    rows.push([row, text("question" + p), a || b ? `(a) ${a} (b) ${b}` : "", letter(row), text("pattern" + p)]);
  }
  save("Questions.csv", rows);
});
document.getElementById("answers").addEventListener("click", () => {
  const rows = [["Index", "Answer"]];
  for (let row = 1; row <= 2 * pairs.length; row += 1) if (letter(row)) rows.push([row, letter(row)]);
  save("answers.csv", rows);
});
show();
</script>""")


@dataclass(frozen=True)
class ShownPair:
    """A pair on the page.

    Attributes:
        images: any size. names: of their files.
        near, far: cosines. pattern: what differs, or empty.
        question, options: what has been asked so far, or empty.
    """

    images: tuple[Image.Image, Image.Image]
    names: tuple[str, str]
    near: float
    far: float
    pattern: str = ""
    question: str = ""
    options: tuple[str, str] = ("", "")


def blind_sheet(
    title: str,
    notes: Sequence[str],
    counts: tuple[Sequence[str], Sequence[Sequence[str]]],
    pairs: Sequence[ShownPair],
    patterns: Sequence[str],
    key: str,
) -> str:
    """Draw the whole page.

    Args:
        notes: sentences below the title.
        counts: head and rows of the table of how many pairs there are for other thresholds.
        patterns: to choose from.
        key: under which the browser keeps what is typed; another one for other pairs.
    """
    parts = [sheet.heading(title), *map(sheet.paragraph, notes), sheet.table(*counts)]
    if pairs:
        shown = PAIRS.render(pairs=pairs, patterns=patterns, key=key, picture=sheet.picture)
        parts += [Markup(shown), SCRIPT]
    else:
        parts.append(sheet.paragraph("No pair lies between these thresholds; the table says which ones have some."))
    return sheet.page(title, parts, STYLE)
