"""The pipeline's report: one page that shows what each stage did and what it changed, as HTML and
as Markdown.

A report is a list of sections; each holds paragraphs, tables, code and figures, written once for
both forms.
"""

import base64
import os
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 860px; margin: 40px auto; padding: 0 20px;
color: #1a1a1a } h1 { font-size: 30px; margin-bottom: 4px } h2 { margin-top: 44px; border-bottom:
1px solid #e5e7eb; padding-bottom: 6px } table { border-collapse: collapse; width: 100%; font-size:
14.5px; margin: 14px 0 } th { text-align: left; color: #555; font-weight: 600 } td, th { padding:
5px 10px; border-bottom: 1px solid #eceff3 } td { vertical-align: top } .number { text-align:
right; font-variant-numeric: tabular-nums; white-space: nowrap } pre { background: #f6f8fa; padding:
10px 14px; border-radius: 6px; overflow-x: auto; white-space: pre-wrap; font-size: 13.5px } figure {
margin: 14px 0 } svg { width: 100%; height: auto }
img { width: 96px; image-rendering: pixelated; border-radius: 6px; display: block }
.lead { color: #555; margin-top: 0 }
"""


@dataclass
class ReportImage:
    """A PNG in a cell of a table: embedded in the HTML, linked in the Markdown."""

    path: Path
    folder: Path  # of the report, from which the link counts

    def html(self):
        data = base64.b64encode(Path(self.path).read_bytes()).decode()
        return f"<td><img src='data:image/png;base64,{data}'></td>"

    def markdown(self):
        return f"![]({os.path.relpath(self.path, self.folder)})"


@dataclass
class Section:
    title: str
    parts: list = field(default_factory=list)  # (kind, content) pairs, in order

    def text(self, paragraph):
        self.parts.append(("text", paragraph))

    def code(self, text):
        self.parts.append(("code", text))

    def table(self, header, rows):
        """header: list of str; rows: lists of str, or Images, as long as it."""
        self.parts.append(("table", (header, rows)))

    def figure(self, path, svg, caption):
        """An SVG: embedded in the HTML, linked by `path` in the Markdown."""
        self.parts.append(("figure", (path, svg, caption)))


def to_html(title, lead, sections):
    body = [f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>"]
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body += [_HTML[kind](content) for kind, content in section.parts]
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return (
        f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"
    )


def to_markdown(title, lead, sections):
    lines = [f"# {title}", "", lead, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for kind, content in section.parts:
            lines += [_MARKDOWN[kind](content), ""]
    return "\n".join(lines)


def looks_like_number(text):
    if isinstance(text, ReportImage):
        return False
    return text.strip("+-−%× ").replace(".", "").replace(",", "").removesuffix(" s").isdigit()


def _html_table(content):
    header, rows = content

    def cell(text, tag="td", like=None):
        if isinstance(text, ReportImage):
            return text.html()
        number = " class=number" if looks_like_number(text if like is None else like) else ""
        return f"<{tag}{number}>{escape(text)}</{tag}>"

    below = rows[-1] if rows else header
    top = "".join(cell(name, "th", like) for name, like in zip(header, below))  # over its column
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _markdown_table(content):
    header, rows = content
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_markdown_cell(c) for c in line) + " |" for line in lines)


def _markdown_cell(content):
    if isinstance(content, ReportImage):
        return content.markdown()
    return content.replace("|", "\\|").replace("\n", " ")


_HTML = {
    "text": lambda text: f"<p>{escape(text)}</p>",
    "code": lambda text: f"<pre>{escape(text)}</pre>",
    "table": _html_table,
    "figure": lambda f: f"<figure>{f[1]}<figcaption>{escape(f[2])}</figcaption></figure>",
}
_MARKDOWN = {
    "text": lambda text: text,
    "code": lambda text: f"```\n{text}\n```",
    "table": _markdown_table,
    "figure": lambda f: f"![{f[2]}]({f[0]})",
}
