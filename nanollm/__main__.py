"""The whole pipeline on the embedded village, with a report: python -m nanollm

Each stage is a command that you could type yourself; it is printed before it runs. A stage that is
done is not run again, and one that was interrupted is resumed: call it once more to continue.
--fresh begins anew.

    runs/<stage>/       the run folder of each stage
    runs/report.html    what each stage did and what it changed; report.md is the same as text
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanollm.answers import QUESTIONS, answers_section, preferences_section
from nanollm.checkpoint import read_json
from nanollm.config import UserError, atomic_write, cli
from nanollm.report import Section, to_html, to_markdown
from nanollm.run import set_aside
from nanollm.runtime import start
from nanollm.stages import stages


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: minutes on a laptop; gpu: one GPU
    preset: str = "tiny"
    root: str = "runs"  # folder of the run folders and of the report
    fresh: bool = False  # forget what earlier calls have done
    device: str = "auto"  # auto, cpu, cuda, cuda:N; passed on to every stage


PRESETS = {"smoke": {}, "tiny": {}, "gpu": {}}


# --- running -------------------------------------------------------------------------------------


def run_stage(stage, cfg, root, later):
    """Run the stage's commands unless they are done; returns {"command", "shown", "seconds"}."""
    folder = root / stage.name
    preset = stage.preset if cfg.preset == "tiny" else cfg.preset
    flags = dict(stage.flags)
    if preset != "tiny":
        flags = {"preset": preset, **flags}
    if cfg.device != "auto":
        flags["device"] = cfg.device
    words = [
        w
        for name, value in flags.items()
        for w in ([f"--{name}"] if value is None else [f"--{name}", str(value)])
    ]
    command = ["python", stage.script, *words]
    evaluate = ["python", "-m", "nanollm.evaluate", *shlex.split(stage.evaluate)]
    if cfg.preset == "smoke":
        evaluate += ["--limit", "20"]
    done = folder / "stage.json"
    if done.exists() and not cfg.fresh:
        record = read_json(done)
        if record["command"] == shlex.join(command):
            print(
                f"{stage.title}: done before in {record['seconds']:.0f} s (--fresh to do it again)"
            )
            return record
    begin = time.perf_counter()
    interrupted = not cfg.fresh and not done.exists() and resumable(folder, cfg)
    for name in later:  # what was built on an older run of this stage is stale
        if (root / name).exists():
            set_aside(root / name)
    execute([*command, "--resume"] if interrupted else command)
    if stage.evaluate:
        execute(evaluate)
    seconds = (
        read_json(folder / "result.json")["seconds"] if interrupted else time.perf_counter() - begin
    )
    shown = [command, evaluate] if stage.evaluate else [command]
    record = {
        "command": shlex.join(command),
        "shown": "\n".join(f"$ {shlex.join(words)}" for words in shown),
        "seconds": seconds,
    }
    atomic_write(done, json.dumps(record, indent=2) + "\n")
    return record


def resumable(folder, cfg):
    """True where a stage of the same preset was interrupted after its first checkpoint."""
    settings = folder / "train_config.json"
    if not (folder / "state.pt").exists() or not settings.exists():
        return False
    return read_json(settings).get("preset") == cfg.preset


def execute(command):
    print(f"\n$ {shlex.join(command)}", flush=True)
    code = subprocess.call([sys.executable, *command[1:]])
    if code:
        raise UserError(
            f"`{shlex.join(command)}` ended with exit code {code}; mend it and call python -m "
            f"nanollm again"
        )


# --- the report ----------------------------------------------------------------------------------


def stage_section(stage, record, root):
    folder = root / stage.name
    section = Section(f"{stage.title} · {record['seconds']:.0f} s")
    section.text(stage.what)
    section.code(record["shown"])
    stage.effect(section, read_json(folder / "result.json"), folder)
    section.figure(f"{stage.name}/curves.svg", (folder / "curves.svg").read_text(), stage.curves)
    return section


def chat_command(done, root):
    """How to talk with the last model that writes text."""
    last = [stage for stage in done if stage.speaks != "none"][-1]
    return f"python -m nanollm.chat {root}/{last.name}" + " --tools" * (last.speaks == "tools")


def write_report(done, records, root, rt, known):
    overview = Section("Overview")
    overview.table(
        ["stage", "seconds", "run folder"],
        [
            [stage.title, f"{records[stage.name]['seconds']:.0f}", f"{root}/{stage.name}"]
            for stage in done
        ],
    )
    size = read_json(root / "pretrain" / "config.json")
    overview.text(
        f"A model of {size['num_hidden_layers']} layers and {size['hidden_size']} channels, "
        f"trained on {rt.device.type} in "
        f"{str(rt.dtype)[6:]}. Talk with it: {chat_command(done, root)}"
    )
    names = {stage.name for stage in done}
    kinds = [kind for kind in QUESTIONS if any(stage.speaks == kind for stage in done)]
    sections = [overview, *(answers_section(kind, done, root, rt, known) for kind in kinds)]
    if "dpo" in names:
        sections.insert(2, preferences_section(root))
    sections += [stage_section(stage, records[stage.name], root) for stage in done]
    title, lead = (
        "nanollm: the training of a language model",
        "From raw text to a model that answers, stage by stage.",
    )
    atomic_write(root / "report.html", to_html(title, lead, sections))
    atomic_write(root / "report.md", to_markdown(title, lead, sections))


def main(cfg):
    if not Path("train_pretrain.py").exists():
        raise UserError("call python -m nanollm in the folder that holds train_pretrain.py")
    root, begin = Path(cfg.root), time.perf_counter()
    rt, records, done, known = start(cfg.device), {}, [], {}
    names = [stage.name for stage in stages(root)]
    for stage in stages(root):
        later = names[names.index(stage.name) + 1 :]
        records[stage.name] = run_stage(stage, cfg, root, later)
        done.append(stage)
        write_report(done, records, root, rt, known)
    print(
        f"\n{root}/report.html and report.md are written ({time.perf_counter() - begin:.0f} s in "
        f"all). Now talk with it:"
    )
    print(chat_command(done, root))


if __name__ == "__main__":
    cli(main, Config, PRESETS)
