"""The pipeline's report, one HTML file: what each stage did and what it changed.

It reads run folders and knows nothing of single stages: the "effects" in result.json and in what
python -m nanollm.evaluate has written, charts, samples.txt, and where they are there the sampled
completions of preferences.json and the images of images.json.
"""

import base64
from html import escape
from pathlib import Path

from nanollm.config import atomic_write, read_json
from nanollm.run import change

RESULTS = ("result.json", "evaluation.json", "preferences.json")
STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 960px; margin: 40px auto;
padding: 0 20px; color: #1a1a1a } h1 { font-size: 30px; margin-bottom: 4px } h2 { margin-top: 44px;
border-bottom: 1px solid #e5e7eb; padding-bottom: 6px } .lead { color: #555; margin-top: 0 }
.table { overflow-x: auto; margin: 14px 0 } table { border-collapse: collapse; width: 100%;
font-size: 14.5px } th { text-align: left; color: #555; font-weight: 600 } td, th { padding:
5px 10px; border-bottom: 1px solid #eceff3; vertical-align: top; overflow-wrap: anywhere; min-width:
7em } pre { background: #f6f8fa; padding: 10px 14px; border-radius: 6px; white-space: pre-wrap;
overflow: auto; overflow-wrap: anywhere; max-height: 340px; font-size: 13.5px } figure { margin:
14px 0; max-width: 720px } svg { width: 100%; height: auto } img { width: 96px; image-rendering:
pixelated; border-radius: 6px; display: block }
"""


def element(tag, text):
    return f"<{tag}>{escape(text)}</{tag}>"


def table(head, rows):
    """Cells are text, or the Path of an image."""

    def cell(content):
        if not isinstance(content, Path):
            return element("td", content)
        data = base64.b64encode(content.read_bytes()).decode()
        return f"<td><img src='data:image/png;base64,{data}' alt=''></td>"

    first = "".join(element("th", text) for text in head)
    lines = [first, *("".join(map(cell, row)) for row in rows)]
    lines = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='table'><table>{lines}</table></div>"


# --- what lies in a run folder -------------------------------------------------------------------


def effects_of(folder):
    """What a run has changed, the most important first; see run.effect."""
    paths = [folder / name for name in RESULTS if (folder / name).exists()]
    return [effect for path in paths for effect in read_json(path).get("effects", [])]


def folders_of(folder):
    """A run's folder, and those of the runs that it made beside it: vlm, vlm-clip, ..."""
    beside = folder.parent.glob(f"{folder.name}-*/result.json")
    return [folder, *sorted(path.parent for path in beside if path.parent.suffix != ".previous")]


def overview(root, done):
    """A row per stage: its first effect, its seconds, its folder."""
    rows = []
    for stage, record in done:
        folder = root / stage.name
        cells = [[effect["name"], change(effect, "→")] for effect in effects_of(folder)]
        first = cells[0] if cells else ["-", "-"]
        rows.append([stage.title, *first, f"{record['seconds']:.0f}", folder.as_posix()])
    return table(["stage", "effect", "before → after", "seconds", "run folder"], rows)


def section(folder, stage, record):
    """What a stage did, its commands, and all that its run folder shows."""
    yield element("h2", f"{stage.title} · {record['seconds']:.0f} s")
    yield element("p", stage.what)
    yield element("pre", record["shown"])
    rows = [
        [place.name, effect["name"], change(effect, "→")]
        for place in folders_of(folder)
        for effect in effects_of(place)
    ]
    yield table(["run", "effect", "before → after"], rows)
    for chart in sorted(folder.glob("*.svg"), key=lambda path: path.name != "curves.svg"):
        yield f"<figure>{chart.read_text(encoding='utf-8')}</figure>"
    if (folder / "samples.txt").exists():
        yield element("pre", (folder / "samples.txt").read_text(encoding="utf-8").strip())
    if (folder / "preferences.json").exists():
        yield preferences(read_json(folder / "preferences.json"))
    if (folder / "images.json").exists():
        yield images(read_json(folder / "images.json"))


def preferences(found):
    """Sampled completions to held-out prompts, beside those of the model compared with."""
    columns = {"prompt": "prompts", "before": "completions_against", "after": "completions"}
    columns = {name: found[key][:6] for name, key in columns.items() if key in found}
    return table([*columns], list(zip(*columns.values())))


def images(examples):
    """Questions about images, a column for each text that goes with them."""
    keys = [key for key, value in examples[0].items() if isinstance(value, str)]
    head = ["image", *(key for key in keys if key != "image")]
    return table(head, [[Path(each["image"]), *map(each.get, head[1:])] for each in examples])


def write_report(root, done, answers, closing):
    """Write report.html, which needs no other file, to `root`.

    done: the stages so far, (Stage, its record) in order; answers: for each kind of question
    {column: cells} with the answers of several stages.
    """
    title = "nanollm: the training of a language model"
    parts = [f"<h1>{title}</h1><p class='lead'>From raw text to a model that answers.</p>"]
    parts += [element("h2", "Overview"), overview(root, done), element("p", closing)]
    for kind, columns in answers.items():
        parts.append(
            element("h2", f"{kind.capitalize()}: the same prompts, answered after each stage")
        )
        parts.append(table([*columns], list(zip(*columns.values()))))
        remark = "None of them occurs in training. Answers are greedy, and cut after 112 tokens."
        parts.append(element("p", remark))
    for stage, record in done:
        parts += section(root / stage.name, stage, record)
    head = f"<meta charset='utf-8'><title>{title}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    page = f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n"
    atomic_write(root / "report.html", page)
