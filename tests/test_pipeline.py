"""The pipeline in its smallest size, the report it writes, and the commands that README shows."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanollm.config import parse

ROOT = Path(__file__).resolve().parents[1]


def pipeline(root, *flags):
    flags = [
        sys.executable,
        "-m",
        "nanollm",
        "--preset",
        "smoke",
        "--root",
        str(root),
        "--device",
        "cpu",
        *flags,
    ]
    return subprocess.run(flags, cwd=ROOT, capture_output=True, text=True)


def test_the_pipeline_runs_reports_and_does_nothing_twice(tmp_path):
    first = pipeline(tmp_path / "runs")
    assert first.returncode == 0, first.stderr
    assert f"$ python train_sft.py --preset smoke --init {tmp_path}/runs/pretrain" in first.stdout
    html, text = ((tmp_path / "runs" / f"report.{end}").read_text() for end in ("html", "md"))
    for part in (
        "bits per byte",
        "xz -9",
        "facts, villagers never asked about",
        "The same five prompts",
        "reward model, by the gold score",
        "best of 4",
        "stories of two steps",
        "pass@2",
        "calls not run",
        "the harbour, fact and manner right",
        "the right caption among",
        "the blind model",
    ):
        assert part in html and part in text
    assert html.count("<svg") == 14 and html.count("<img src='data:image/png") > 3
    second = pipeline(tmp_path / "runs")
    assert second.stdout.count("done before") == 12 and "step 10" not in second.stdout


def readme_commands():
    text = (ROOT / "README.md").read_text()
    lines = [
        line.split("#")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", text, re.S)
        for line in block.split("\n")
    ]
    return [
        part.strip()
        for line in lines
        for part in line.split("&&")
        if part.strip().startswith(("python ", "torchrun "))
    ]


@pytest.mark.parametrize("command", sorted(set(readme_commands())))
def test_every_command_in_readme_is_understood(command):
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, w in enumerate(words) if w.endswith(".py")) :]]
    if words[1] == "-m" and words[2] == "pytest":
        return
    module, flags = (
        (words[2], words[3:])
        if words[1] == "-m"
        else (words[1].removesuffix(".py").replace("/", "."), words[2:])
    )
    module = importlib.import_module("nanollm.__main__" if module == "nanollm" else module)
    if hasattr(module, "Config"):
        parse(module.Config, getattr(module, "PRESETS", None), flags)
    else:
        assert (ROOT / words[1]).exists()
