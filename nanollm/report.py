"""The pipeline's report, as HTML and as Markdown: what each stage did and what it changed.

It reads run folders and knows nothing of single stages: the "effects" in result.json and in what
python -m nanollm.evaluate has written, charts, samples.txt, and where they are there the sampled
completions of preferences.json and the images of images.json.
"""

import base64
import os
import re
from html import escape
from pathlib import Path

from nanollm.checkpoint import read_json
from nanollm.config import atomic_write
from nanollm.run import effect_line

RESULTS = ("result.json", "evaluation.json", "preferences.json")
STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 960px; margin: 40px auto;
padding: 0 20px; color: #1a1a1a } h1 { font-size: 30px; margin-bottom: 4px } h2 { margin-top: 44px;
border-bottom: 1px solid #e5e7eb; padding-bottom: 6px } .lead { color: #555; margin-top: 0 }
.table { overflow-x: auto; margin: 14px 0 } table { border-collapse: collapse; width: 100%;
font-size: 14.5px } th { text-align: left; color: #555; font-weight: 600 } td, th { padding:
5px 10px; border-bottom: 1px solid #eceff3; vertical-align: top; overflow-wrap: anywhere; min-width:
7em } .number { text-align: right; font-variant-numeric: tabular-nums; min-width: 5em } pre {
background: #f6f8fa; padding: 10px 14px; border-radius: 6px; white-space: pre-wrap; overflow: auto;
overflow-wrap: anywhere; max-height: 340px; font-size: 13.5px } figure { margin: 14px 0; max-width:
720px } svg { width: 100%; height: auto } img { width: 96px; image-rendering: pixelated;
border-radius: 6px; display: block }
"""


class Page:
    """A report that grows part by part, in both forms at once."""

    def __init__(self, folder, title, lead):
        """folder: where the report will lie, from which the Markdown links to images."""
        self.folder, self.title = Path(folder), title
        self.html = [f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>"]
        self.markdown = [f"# {title}", lead]

    def heading(self, text):
        self.html.append(f"<h2>{escape(text)}</h2>")
        self.markdown.append(f"## {text}")

    def text(self, text):
        self.html.append(f"<p>{escape(text)}</p>")
        self.markdown.append(text)

    def code(self, text):
        self.html.append(f"<pre>{escape(text)}</pre>")
        self.markdown.append(f"~~~\n{text}\n~~~")

    def chart(self, path):
        """The path of an SVG: embedded in the HTML, linked in the Markdown."""
        self.html.append(f"<figure>{path.read_text(encoding='utf-8')}</figure>")
        self.markdown.append(f"![{path.stem}]({self.link(path)})")

    def table(self, head, rows):
        """Cells are text, or the Path of an image. Columns of numbers are flush right."""
        right = [all(is_number(row[i]) for row in rows) for i in range(len(head))]

        def line(cells, tag):
            kinds = (" class=number" if number else "" for number in right)
            cells = (f"<{tag}{kind}>{html_cell(c)}</{tag}>" for kind, c in zip(kinds, cells))
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(line(row, "td") for row in rows)
        table = f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"
        self.html.append(f"<div class='table'>{table}</div>")
        lines = [[self.markdown_cell(cell) for cell in row] for row in [head, *rows]]
        lines.insert(1, ["---"] * len(head))
        self.markdown.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))

    def markdown_cell(self, cell):
        if isinstance(cell, Path):
            return f"![]({self.link(cell)})"
        return cell.replace("|", "\\|").replace("\n", " ")

    def link(self, path):
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def write(self):
        """Write report.html, which needs no other file, and report.md."""
        head = f"<meta charset='utf-8'><title>{escape(self.title)}</title><style>{STYLE}</style>"
        body = "\n".join(self.html)
        page = (
            f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n"
        )
        atomic_write(self.folder / "report.html", page)
        atomic_write(self.folder / "report.md", "\n\n".join(self.markdown) + "\n")


def html_cell(cell):
    if isinstance(cell, Path):
        data = base64.b64encode(cell.read_bytes()).decode()
        return f"<img src='data:image/png;base64,{data}' alt=''>"
    return escape(cell)


def is_number(cell):
    return isinstance(cell, str) and bool(re.fullmatch(r"[-+−]?[\d.,]+%?", cell))


# --- what lies in a run folder -------------------------------------------------------------------


def effects_of(folder):
    """What a run has changed, the most important first; see run.effect."""
    paths = [folder / name for name in RESULTS if (folder / name).exists()]
    return [effect for path in paths for effect in read_json(path).get("effects", [])]


def change(effect):
    """The numbers of an effect: 0.68 → 0.94."""
    return effect_line(effect).removeprefix(f"{effect['name']}: ").replace("->", "→")


def folders_of(folder):
    """A run's folder, and those of the runs that it made beside it: vlm, vlm-clip, ..."""
    beside = folder.parent.glob(f"{folder.name}-*/result.json")
    return [folder, *sorted(path.parent for path in beside if path.parent.suffix != ".previous")]


def overview(page, done):
    """A row per stage: its first effect, its seconds, its folder."""
    rows = []
    for stage, record in done:
        folder = page.folder / stage.name
        first = next(iter(effects_of(folder)), None)
        cells = ["-", "-"] if first is None else [first["name"], change(first)]
        rows.append([stage.title, *cells, f"{record['seconds']:.0f}", folder.as_posix()])
    page.heading("Overview")
    page.table(["stage", "effect", "before → after", "seconds", "run folder"], rows)


def section(page, stage, record):
    """What a stage did, its commands, and all that its run folder shows."""
    folder = page.folder / stage.name
    page.heading(f"{stage.title} · {record['seconds']:.0f} s")
    page.text(stage.what)
    page.code(record["shown"])
    found = [(place, effect) for place in folders_of(folder) for effect in effects_of(place)]
    rows = [[place.name, effect["name"], change(effect)] for place, effect in found]
    page.table(["run", "effect", "before → after"], rows)
    for chart in sorted(folder.glob("*.svg"), key=lambda path: path.name != "curves.svg"):
        page.chart(chart)
    if (folder / "samples.txt").exists():
        page.code((folder / "samples.txt").read_text(encoding="utf-8").strip())
    preferences(page, folder / "preferences.json")
    images(page, folder / "images.json")


def preferences(page, path):
    """Sampled completions to held-out prompts, beside those of the model compared with."""
    found = read_json(path) if path.exists() else {}
    columns = {"prompt": "prompts", "before": "completions_against", "after": "completions"}
    columns = {name: found[key][:6] for name, key in columns.items() if key in found}
    if columns:
        page.table([*columns], list(zip(*columns.values())))


def images(page, path):
    """Questions about images, a column for each text that goes with them."""
    examples = read_json(path, list) if path.exists() else []
    if examples:
        keys = [key for key, value in examples[0].items() if isinstance(value, str)]
        head = ["image", *(key for key in keys if key != "image")]
        rows = [[Path(each["image"]), *map(each.get, head[1:])] for each in examples]
        page.table(head, rows)


def write_report(root, done, answers, closing):
    """Write report.html and report.md to `root`.

    done: the stages so far, (Stage, its record) in order; answers: for each kind of question
    {column: cells} with the answers of several stages.
    """
    lead = "From raw text to a model that answers, stage by stage."
    page = Page(root, "nanollm: the training of a language model", lead)
    overview(page, done)
    page.text(closing)
    for kind, columns in answers.items():
        page.heading(f"{kind.capitalize()}: the same prompts, answered after each stage")
        page.table([*columns], list(zip(*columns.values())))
        page.text("None of them occurs in training. Answers are greedy, and cut after 112 tokens.")
    for stage, record in done:
        section(page, stage, record)
    page.write()
