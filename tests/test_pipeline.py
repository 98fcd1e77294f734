"""The pipeline: which commands it runs, the report that it writes, and the commands of README."""

import importlib
import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from nanollm import __main__ as pipeline
from nanollm.config import UserError, parse
from nanollm.plot import line_chart
from nanollm.report import effects_of, write_report
from nanollm.run import effect

ROOT = Path(__file__).resolve().parents[1]
NAMES = [stage.name for stage in pipeline.STAGES]


def fake_run(folder, preset="tiny"):
    """A run folder as a script leaves it, with two effects."""
    folder.mkdir(parents=True, exist_ok=True)
    effects = [effect("right answers", 0.1, 0.9, "share"), effect("text", 2, 1, "bits", False)]
    result = {"effects": effects, "seconds": 7}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "train_config.json").write_text(json.dumps({"preset": preset}))
    (folder / "state.pt").write_text("")
    (folder / "curves.svg").write_text(line_chart({"loss": [(0, 1), (1, 0)]}, folder.name))
    (folder / "samples.txt").write_text("--- step 1\nsaid <think> this\n")


@pytest.fixture
def run_pipeline(monkeypatch, tmp_path):
    """Runs it with flags; instead of running, commands are listed, and leave a fake run folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pipeline, "ask", lambda *_: None)

    def run(*flags, fails=None):
        commands = []

        def call(words):
            commands.append(" ".join(words[1:]))
            preset = words[words.index("--preset") + 1] if "--preset" in words else "tiny"
            if words[1].endswith(".py") and fails != words[1]:
                fake_run(Path(words[words.index("--out") + 1]), preset)
            return int(words[1] == fails)

        monkeypatch.setattr(pipeline.subprocess, "call", call)
        flags = ["--root", str(tmp_path), *flags]
        pipeline.main(parse(pipeline.Config, pipeline.PRESETS, flags))
        return commands

    return run


def scripts(commands):
    """The stages whose own run folder these commands write."""
    outs = (re.search(r"^\w+\.py .*--out \S+?/([\w-]+)( |$)", command) for command in commands)
    return [found[1] for found in outs if found and found[1] in NAMES]


def test_stages_run_in_order_once_and_with_their_presets(run_pipeline, capsys):
    commands = run_pipeline()
    assert scripts(commands) == NAMES
    printed = capsys.readouterr().out
    assert f"$ python {commands[0]}" in printed and "right answers: 10.0% -> 90.0%" in printed
    assert any("train_sft.py --preset cot --init" in command for command in commands)
    assert run_pipeline() == []
    again = run_pipeline("--preset", "smoke", "--device", "cpu")
    assert scripts(again) == NAMES
    again.remove(next(c for c in again if c.startswith("data/clean.py")))  # reads text alone
    assert all("--preset smoke" in c or "--limit 20" in c for c in again)
    assert all("--device cpu" in command for command in again)
    gpu = [c for c in run_pipeline("--preset", "gpu") if c.startswith("train_pretrain.py")]
    assert [re.search("--preset ([a-z]+)", c)[1] for c in gpu] == ["gpu", *["short"] * 4]


def test_what_is_built_on_a_stage_that_runs_again_is_stale(run_pipeline, tmp_path):
    run_pipeline()
    (tmp_path / "cot" / "stage.json").unlink()
    commands = run_pipeline()
    assert scripts(commands) == NAMES[NAMES.index("cot") :]
    assert commands[0].endswith("--resume")  # it was interrupted, the later ones weren't
    assert not any("--resume" in command for command in commands[1:])
    assert (tmp_path / "grpo.previous" / "result.json").exists()
    again = run_pipeline("--fresh")
    assert scripts(again) == NAMES and not any("--resume" in command for command in again)


def test_of_several_commands_the_last_is_resumed_and_a_changed_one_runs_them_again(
    run_pipeline, tmp_path
):
    run_pipeline()
    done = tmp_path / "clean" / "stage.json"
    done.write_text(done.read_text().replace("val.jsonl", "test.jsonl"))
    commands = run_pipeline()
    assert commands[0].startswith("data/clean.py") and not "".join(commands).count("--resume")
    done.unlink()
    commands = run_pipeline()
    assert scripts(commands) == ["clean", "mlm"]
    assert commands[0].endswith("clean --resume") and "mlm-causal" in commands[1]


def test_a_stage_that_fails_names_its_command(run_pipeline, tmp_path):
    with pytest.raises(UserError, match="`python train_rm.py --init .*exit code 1"):
        run_pipeline(fails="train_rm.py")
    assert (tmp_path / "report.html").exists()  # of the stages before it
    assert scripts(run_pipeline())[0] == "rm"


@pytest.mark.parametrize("preset", ["tiny", "smoke", "gpu"])
def test_every_command_of_the_pipeline_is_understood(preset):
    for stage in pipeline.STAGES:
        for words in pipeline.commands_of(stage, pipeline.Config(preset, "runs", device="cpu")):
            understood(words)


def test_the_report_shows_all_that_a_run_folder_holds(tmp_path):
    fake_run(tmp_path / "vlm"), fake_run(tmp_path / "vlm-clip")
    evaluation = {"effects": [effect("after evaluation", None, 0.5, "share")]}
    sampled = {"prompts": ["Hi?"], "completions_against": ["rude"], "completions": ["<b>polite"]}
    (tmp_path / "vlm" / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "vlm" / "preferences.json").write_text(json.dumps(sampled))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    shown = {"image": str(tmp_path / "a.png"), "question": "What?", "answer": "cup"}
    shown |= {"completion": "a cup", "no_images": "a bell", "correct": True}
    (tmp_path / "vlm" / "images.json").write_text(json.dumps([shown]))
    (tmp_path / "vlm" / "more.svg").write_text("<svg id='more'></svg>")
    names = [each["name"] for each in effects_of(tmp_path / "vlm")]
    assert names == ["right answers", "text", "after evaluation"]
    done = [
        (pipeline.STAGES[NAMES.index("vlm")], {"seconds": 61, "shown": "$ python train_vlm.py"})
    ]
    answers = {"dialogue": {"prompt": ["Who?"], "right": ["Nora"], "DPO": ["I think Nora."]}}
    write_report(tmp_path, done, answers, "Talk with it")
    html = (tmp_path / "report.html").read_text("utf-8")
    known = "10.0% → 90.0%|2 → 1 bits|$ python train_vlm.py|Talk with it|rude|I think Nora."
    for part in f"{known}|vlm-clip|What?|a cup|no_images|a bell|Vision · 61 s".split("|"):
        assert part in html
    assert html.count("<svg") == 2 and html.count("src='data:image/png") == 1
    assert "said &lt;think&gt; this" in html and "&lt;b&gt;polite" in html


def test_the_smallest_pipeline_writes_a_report_of_every_stage(tmp_path, monkeypatch):
    """Its first command runs as one; the others are called here, which imports nothing twice."""

    def call(words):
        if "train_pretrain.py" in words:
            return subprocess.run(words).returncode
        module, cfg = understood(words)
        module.main(cfg)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pipeline.subprocess, "call", call)
    pipeline.main(pipeline.Config("smoke", str(tmp_path / "runs"), device="cpu"))
    html = (tmp_path / "runs/report.html").read_text("utf-8")
    for stage in pipeline.STAGES:
        assert effects_of(tmp_path / "runs" / stage.name), stage.name
        assert f"<h2>{stage.title} · " in html
    for name, least in ("clean", 4), ("mlm", 1):  # beside those of the run before it
        assert sum(e["before"] is not None for e in effects_of(tmp_path / "runs" / name)) >= least
    for kind in pipeline.QUESTIONS:
        assert f"{kind.capitalize()}: the same prompts" in html
    assert html.count("<svg") >= len(NAMES) and html.count("src='data:image/png") > 3


# --- README --------------------------------------------------------------------------------------


def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    lines = [line.split("#")[0] for block in blocks for line in block.split("\n")]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return sorted({part for part in parts if part.startswith(("python ", "torchrun "))})


def understood(words):
    """(module, Config) of the script or module in `python script --flag ...`."""
    name, *flags = words[1 + (words[1] == "-m") :]
    name = "nanollm.__main__" if name == "nanollm" else name.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    if name.endswith((".compare", ".hub", ".prepare")):  # which take other words first
        flags = list(itertools.dropwhile(lambda word: not word.startswith("--"), flags))
    return module, parse(module.Config, getattr(module, "PRESETS", None), flags)


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_in_readme_is_understood(command):
    words = shlex.split(command)
    if "pytest" in words:
        return
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, w in enumerate(words) if w.endswith(".py")) :]]
    understood(words)
