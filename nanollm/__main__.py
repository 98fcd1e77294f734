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
from typing import Callable

from nanollm.config import UserError, atomic_write, cli
from nanollm.evaluate import read_items, reply_all, village_of
from nanollm.hub import load_model, read_json
from nanollm.report import Section, to_html, to_markdown
from nanollm.run import set_aside
from nanollm.runtime import start


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: minutes on a laptop; gpu: one GPU
    preset: str = "tiny"
    root: str = "runs"  # folder of the run folders and of the report
    fresh: bool = False  # forget what earlier calls have done
    device: str = "auto"  # auto, cpu, cuda, cuda:N; passed on to every stage


PRESETS = {"smoke": {}, "tiny": {}, "gpu": {}}


@dataclass
class Stage:
    """One stage: the commands behind it, and how its run folder becomes a section of the report."""

    name: str  # of its run folder
    title: str
    script: str
    flags: dict
    what: str  # what the stage does, in a sentence or two
    effect: (
        Callable  # (section, result.json, root) -> None: adds the measured effect to the section
    )


def stages(root):
    return [
        Stage(
            "pretrain",
            "Pretraining",
            "train_pretrain.py",
            {"out": f"{root}/pretrain", "compare_xz": None},
            "A model with random weights reads the village's texts and learns to predict the "
            "next token. It learns "
            "the language, and on the way who lives where and keeps which pet.",
            pretraining_effect,
        ),
        Stage(
            "sft",
            "Supervised fine-tuning",
            "train_sft.py",
            {"init": f"{root}/pretrain", "out": f"{root}/sft"},
            "The model learns from dialogues to answer instead of to continue. Half of the "
            "villagers never occur in "
            "them: what it can say about those, it knows from pretraining.",
            sft_effect,
        ),
    ]


# --- what each stage's section shows --------------------------------------------------------------


def pretraining_effect(section, result, root):
    cloze = read_json(root / "pretrain" / "evaluation.json")["families"]["cloze"]
    section.table(
        ["held-out text", "bits per byte"],
        [
            ["the model", f"{result['bits_per_byte']:.3f}"],
            ["xz -9, given the training text as a prefix", f"{result['xz_bits_per_byte']:.3f}"],
        ],
    )
    section.text(
        f"Completing sentences about the villagers, such as “By trade Nora is a …”, it is right in "
        f"{cloze['accuracy']:.1%} of {cloze['n']} cases; chance is about 6%."
    )
    section.code((root / "pretrain" / "samples.txt").read_text().strip())


def sft_effect(section, result, root):
    before, after = (
        read_json(root / name / "evaluation.json")["families"] for name in ("pretrain", "sft")
    )
    section.table(
        ["held-out questions", "before", "after", "n"],
        [
            [
                EXPLAINED.get(name, name),
                f"{before[name]['accuracy']:.1%}",
                f"{after[name]['accuracy']:.1%}",
                str(after[name]["n"]),
            ]
            for name in after
        ],
    )
    section.text(
        f"Forgetting: held-out text went from {result['before']['bits_per_byte']:.4f} to "
        f"{result['after']['bits_per_byte']:.4f} bits per byte."
    )


EXPLAINED = {
    "cloze": "completing sentences about villagers",
    "fact": "facts, villagers of the training dialogues, new wording",
    "fact_never_asked": "facts, villagers never asked about",
    "two_hop": "facts about somebody's best friend",
    "unknown": "\"I don't know\" for people who don't exist",
    "formatting": "formatting words as told",
    "arithmetic": "sums with written steps",
    "multi_turn": "follow-up questions",
}


# --- running -------------------------------------------------------------------------------------


def run_stage(stage, cfg, root, later):
    """Run the stage's commands unless they are done; returns {"command", "evaluate", "seconds"}."""
    folder = root / stage.name
    flags = dict(stage.flags)
    if cfg.preset != "tiny":
        flags = {"preset": cfg.preset, **flags}
    if cfg.device != "auto":
        flags["device"] = cfg.device
    words = [
        w
        for name, value in flags.items()
        for w in ([f"--{name}"] if value is None else [f"--{name}", str(value)])
    ]
    command = ["python", stage.script, *words]
    evaluate = [
        "python",
        "-m",
        "nanollm.evaluate",
        str(folder),
        *(["--limit", "20"] if cfg.preset == "smoke" else []),
    ]
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
    execute(evaluate)
    seconds = (
        read_json(folder / "result.json")["seconds"] if interrupted else time.perf_counter() - begin
    )
    record = {"command": shlex.join(command), "evaluate": shlex.join(evaluate), "seconds": seconds}
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
    section.code(f"$ {record['command']}\n$ {record['evaluate']}")
    stage.effect(section, read_json(folder / "result.json"), root)
    section.figure(
        f"{stage.name}/curves.svg",
        (folder / "curves.svg").read_text(),
        "Loss over the optimizer steps.",
    )
    return section


def five_prompts(root):
    """Held-out questions that every model answers: two facts never asked about, a stranger, a
    format, a sum.
    """
    items = read_items(village_of(root / "pretrain") / "sft_test.jsonl")
    wanted = {"fact_never_asked": 2, "unknown": 1, "formatting": 1, "arithmetic": 1}
    return [i for name, n in wanted.items() for i in [i for i in items if i["family"] == name][:n]]


def prompts_section(done, root, rt):
    """The same five prompts, answered by every model so far."""
    items, columns = five_prompts(root), []
    for stage in done:
        model, tokenizer = load_model(root / stage.name)
        rt.prepare(model, train=False)
        prompts = [tokenizer.render(item["messages"], generation_prompt=True)[0] for item in items]
        columns.append([reply.strip() for reply in reply_all(model, tokenizer, prompts, 64)])
    section = Section("The same five prompts, before and after")
    rows = [
        [item["messages"][-1]["content"], *replies, item["answer"]]
        for item, *replies in zip(items, *columns)
    ]
    section.table(["prompt", *(f"after {stage.title.lower()}" for stage in done), "right"], rows)
    section.text(
        "None of these questions occurs in training. Answers are greedy and cut after 64 tokens."
    )
    return section


def write_report(done, records, root, rt):
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
        f"{str(rt.dtype)[6:]}. Talk with it: python -m nanollm.chat {root}/{done[-1].name}"
    )
    sections = [overview, prompts_section(done, root, rt)]
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
    rt, records, done = start(cfg.device), {}, []
    names = [stage.name for stage in stages(root)]
    for stage in stages(root):
        later = names[names.index(stage.name) + 1 :]
        records[stage.name] = run_stage(stage, cfg, root, later)
        done.append(stage)
        write_report(done, records, root, rt)
    print(
        f"\n{root}/report.html and report.md are written ({time.perf_counter() - begin:.0f} s in "
        f"all). Now talk with it:"
    )
    print(f"python -m nanollm.chat {root}/{done[-1].name}")


if __name__ == "__main__":
    cli(main, Config, PRESETS)
