"""Public datasets for every stage: downloaded as JSONL of the shapes that data/README.md shows.

A record stays as its publisher wrote it, if the reader of its format can use it; others are left
out and counted. A file is unpacked while it comes in, so that nothing but the result takes up disk,
and a download with --limit ends early. The result takes its place once it is whole, and is found
there next time.

Run     python data/prepare.py                              # lists the datasets
        python data/prepare.py tinystories --limit 100000
"""

import gzip
import io
import json
import re
import sys
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

if not __package__:  # run as a file: the repository root holds the package
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanollm.config import UserError, Whole, atomic_file, cli, say
from nanollm.download import CHUNK, Download
from nanollm.formats import divided, json_values
from nanollm.records import as_chat, as_prompt, as_ranking, as_text_chat, check_markers

CACHE = Path("data/cache")
GITHUB = "https://raw.githubusercontent.com"
HUB, MAIN = "https://huggingface.co/datasets", "resolve/main"
NO_DATA = (b"<!doctype", b"<html", b"version https://git-lfs")  # pages and pointers, not data


@dataclass
class Config:
    name: str | None = field(default=None, metadata={"positional": True})  # none: list them
    out: str | None = None  # directory to write; none: data/cache/NAME
    limit: Whole[1] | None = None  # keep only the first so many records of each file
    base_url: str | None = None  # mirror that takes the place of the https://host of every URL


def open_text(download):
    """The text that a download holds, unpacked where its name ends in .gz."""
    stream = io.BufferedReader(download, CHUNK)
    if stream.peek(1).lstrip().lower().startswith(NO_DATA):
        advice = "see it in a browser, or name another mirror with --base_url"
        raise UserError(f"{download.url}: this is a web page, or a pointer, not the data; {advice}")
    if urlsplit(download.url).path.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=stream)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")


# --- the datasets -------------------------------------------------------------------------------


def check_image_chat(record):
    check_markers(as_chat(record)["messages"], 1)


KINDS = {  # the script that they are for, and the reader that has to understand a record
    "corpus": ("train_pretrain.py", None),
    "chat": ("train_sft.py", as_text_chat),
    "preferences": ("train_dpo.py", as_ranking),
    "problems": ("train_grpo.py", as_prompt),
    "images": ("train_vlm.py", check_image_chat),
}


@dataclass(frozen=True)
class Dataset:
    size: str  # of the download
    licence: str
    about: str  # begins with one of KINDS
    files: dict  # file to write -> URL

    @property
    def kind(self):
        return KINDS[self.about.partition(":")[0]]

    def command(self, paths):
        """That of the script that it is for."""
        held_out = f" --val_data {paths['val']}" if "val" in paths else ""
        return f"python {self.kind[0]} --data {paths['train']}{held_out}"


CATALOGUE = f"""
tinyshakespeare | 1.1 MB | public domain | corpus: 40,000 lines of plays
    train.txt {GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
tinystories | 1.9 GB | CDLA-Sharing-1.0 | corpus: 2.1 million stories in a child's words
    train.jsonl {HUB}/roneneldan/TinyStories/{MAIN}/TinyStories-train.txt
    val.jsonl {HUB}/roneneldan/TinyStories/{MAIN}/TinyStories-valid.txt
alpaca | 23 MB | CC-BY-NC-4.0 | chat: 52,000 instructions, answered by text-davinci-003
    train.jsonl {GITHUB}/tatsu-lab/stanford_alpaca/main/alpaca_data.json
dolly | 13 MB | CC-BY-SA-3.0 | chat: 15,000 instructions, answered by people
    train.jsonl {HUB}/databricks/databricks-dolly-15k/{MAIN}/databricks-dolly-15k.jsonl
openhermes | 1.9 GB | none stated | chat: 1 million dialogues, answered mostly by GPT-4
    train.jsonl {HUB}/teknium/OpenHermes-2.5/{MAIN}/openhermes2_5.json
hh-harmless | 14 MB | MIT | preferences: the more harmless of two completions, some offensive
    train.jsonl {HUB}/Anthropic/hh-rlhf/{MAIN}/harmless-base/train.jsonl.gz
    test.jsonl {HUB}/Anthropic/hh-rlhf/{MAIN}/harmless-base/test.jsonl.gz
hh-helpful | 17 MB | MIT | preferences: the more helpful of two completions, some offensive
    train.jsonl {HUB}/Anthropic/hh-rlhf/{MAIN}/helpful-base/train.jsonl.gz
    test.jsonl {HUB}/Anthropic/hh-rlhf/{MAIN}/helpful-base/test.jsonl.gz
gsm8k | 4.9 MB | MIT | problems: 8,792 in words, with worked steps
    train.jsonl {GITHUB}/openai/grade-school-math/master/grade_school_math/data/train.jsonl
    test.jsonl {GITHUB}/openai/grade-school-math/master/grade_school_math/data/test.jsonl
llava-instruct | 229 MB | CC-BY-4.0 | images: 158,000 dialogues about photographs
    train.jsonl {HUB}/liuhaotian/LLaVA-Instruct-150K/{MAIN}/llava_instruct_150k.json
"""
DATASETS = {}
for entry in re.split(r"\n(?! )", CATALOGUE.strip()):
    words, *files = entry.splitlines()
    name, *words = words.split(" | ")
    DATASETS[name] = Dataset(*words, dict(map(str.split, files)))
IMAGES = "http://images.cocodataset.org/zips/train2017.zip (18 GB)"  # llava-instruct is about them


def records_of(text, url, path):
    """The records of a download, to be written to `path`: lines of text, or what JSON holds."""
    if urlsplit(url).path.endswith(".txt"):
        return text if path.suffix == ".txt" else ({"text": story} for story in divided(text))
    return (value for _, value in json_values(iter(lambda: text.read(CHUNK), ""), url))


def fetch(url, path, check, limit=None):
    """Download `url`, and write its records to `path`. Returns a sentence on what came."""
    count, misfits = 0, []
    try:
        with Download(url, "--base_url") as download, atomic_file(path) as file:
            for number, record in enumerate(records_of(open_text(download), url, path), 1):
                try:
                    if check:
                        check(record if isinstance(record, dict) else {})
                    line = record if path.suffix == ".txt" else json.dumps(record) + "\n"
                    file.write(line.encode())
                except UserError as error:
                    misfits.append(f"record {number}: {error}")
                    continue
                count += 1
                if count == limit:
                    break
            if count <= len(misfits):
                raise ValueError(misfits[0] if misfits else "it is empty")
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:  # no UTF-8, no JSON
        what = f"damaged, or not the data that was expected ({error})"
        advice = "run the same command again, or name another --base_url"
        raise UserError(f"{url}: {what}; {advice}") from None
    left_out = f"; left out {len(misfits):,}, the first being {misfits[0]}" if misfits else ""
    return f"{count:,} records, {path.stat().st_size / 1e6:.1f} MB{left_out}"


def prepare(name, out=None, limit=None, base_url=None):
    """Returns {"train": path, ...} of a dataset, and fetches what is not there yet."""
    if name not in DATASETS:
        raise UserError(f"there is no dataset {name!r}; choose from {', '.join(DATASETS)}")
    dataset, paths = DATASETS[name], {}
    for file, url in dataset.files.items():
        stem, suffix = file.split(".")
        path = Path(out or CACHE / name) / (f"{stem}_{limit}.{suffix}" if limit else file)
        url = base_url.rstrip("/") + urlsplit(url).path if base_url else url
        news = "there already" if path.exists() else fetch(url, path, dataset.kind[1], limit)
        say(f"{path}: {news}")
        paths[stem] = path
    return paths


def main(config):
    if config.name:
        paths, dataset = prepare(**asdict(config)), DATASETS[config.name]
        if config.name == "llava-instruct":
            say(f"the images come apart: unzip -j {IMAGES} in {paths['train'].parent}")
        return say(f"licence: {dataset.licence}\nnext: {dataset.command(paths)}")
    for name, data in DATASETS.items():
        paths = {file.split(".")[0]: CACHE / name / file for file in data.files}
        say(f"{name:16}{data.size:>7}  {data.licence:17}{data.about}\n    {data.command(paths)}")
    say("\npython data/prepare.py NAME    fetches one; see --help for the flags")


if __name__ == "__main__":
    cli(main, Config)
