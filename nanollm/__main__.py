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
    evaluate: str = ""  # what python -m nanollm.evaluate is called with; default: the run folder
    talks: bool = True  # False: a reward model, which writes no text
    curves: str = "Loss over the optimizer steps."


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
        Stage(
            "rm",
            "Reward model",
            "train_rm.py",
            {"init": f"{root}/sft", "out": f"{root}/rm"},
            "The fine-tuned model answers each prompt several times, and annotators rank the "
            "answers: right, polite and short ones are better. They are wrong now and then. A "
            "model learns from the rankings to score answers.",
            rm_effect,
            f"{root}/sft --data preferences --reward_model {root}/rm --best_of 4 "
            f"--against {root}/sft --out {root}/rm/preferences.json",
            talks=False,
        ),
        Stage(
            "ppo",
            "PPO",
            "train_ppo.py",
            {"init": f"{root}/sft", "reward_model": f"{root}/rm", "out": f"{root}/ppo"},
            "The model answers, the reward model scores, and answers that were better than "
            "expected become more likely, at a price for every step away from the fine-tuned "
            "model (KL).",
            policy_effect,
            f"{root}/ppo --data preferences --reward_model {root}/rm --against {root}/sft",
            curves="Learned reward, gold score and KL of the sampled answers over the updates.",
        ),
        Stage(
            "dpo",
            "DPO",
            "train_dpo.py",
            {"init": f"{root}/sft", "out": f"{root}/dpo"},
            "The same rankings without a reward model: the better answer of each pair becomes more "
            "likely than the worse one, measured against the fine-tuned model.",
            policy_effect,
            f"{root}/dpo --data preferences --reward_model {root}/rm --against {root}/sft",
            curves="Loss per pair over the optimizer steps.",
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


def rm_effect(section, result, root):
    section.table(
        ["held-out pairs in the right order", "share"],
        [
            ["reward model, by the gold score", f"{result['gold_accuracy']:.1%}"],
            ["reward model, by the annotators", f"{result['accuracy']:.1%}"],
            ["annotators, by the gold score", f"{result['annotators_accuracy']:.1%}"],
        ],
    )
    section.text(
        f"Log-loss {result['log_loss']:.3f}, calibration error {result['calibration_error']:.3f}. "
        "The gold score is the village's truth: 0.5 for right, 0.3 for polite, 0.2 for short; no "
        "model ever sees it."
    )
    chart = root / "rm" / "score_against_gold.svg"
    caption = "Scores of held-out replies over their gold."
    section.figure("rm/score_against_gold.svg", chart.read_text(), caption)


def policy_effect(section, result, root):
    name = section.folder.name
    now = read_json(section.folder / "preferences.json")["figures"]
    before = now["against"]
    rows = [
        [label, f"{before[key]:.3f}", f"{now[key]:.3f}"]
        for key, label in PREFERENCE_FIGURES.items()
        if key in before
    ]
    section.table(["held-out prompts, sampled answers", "fine-tuned", name], rows)
    section.text(
        f"Better than the fine-tuned model's answer in {now['win_rate']:.1%} of the prompts, by "
        f"gold; a tie counts half. KL to it: {now['kl']:.2f} nats per answer. "
        f"{now['gap_closed']:.0%} of the way to the best possible gold score, 1."
    )
    if name == "dpo":
        was, after = result["before"], result["after"]
        section.text(
            "Log-probability of held-out chosen answers: "
            f"{was['val_logp_chosen']:.2f} to {after['val_logp_chosen']:.2f}; of rejected ones: "
            f"{was['val_logp_rejected']:.2f} to {after['val_logp_rejected']:.2f}."
        )
    else:
        chart = section.folder / "reward_over_kl.svg"
        section.figure(
            "ppo/reward_over_kl.svg",
            chart.read_text(),
            "Where the two part, the policy has learnt the reward model's errors.",
        )


PREFERENCE_FIGURES = {
    "gold": "gold score",
    "correct": "right",
    "polite": "polite (-1 rude, 1 courteous)",
    "concise": "short",
    "reward": "score of the reward model",
    "length": "tokens",
}


def preferences_section(root):
    """The same prompts, answered by the fine-tuned model, best-of-4, PPO and DPO, side by side."""
    section = Section("Preferences: four ways to answer")
    best = read_json(root / "rm" / "preferences.json")
    found = {name: read_json(root / name / "preferences.json") for name in ("ppo", "dpo")}
    rows = [["fine-tuned", best["figures"]["against"]], ["best of 4", best["figures"]]]
    rows += [[name.upper(), result["figures"]] for name, result in found.items()]
    section.table(
        ["answers", "gold", "wins over fine-tuned", "KL", "tokens"],
        [
            [
                name,
                f"{f['gold']:.3f}",
                f"{f['win_rate']:.1%}" if "win_rate" in f else "-",
                f"{f['kl']:.2f}" if "kl" in f and name != "best of 4" else "-",
                f"{f['length']:.1f}",
            ]
            for name, f in rows
        ],
    )
    section.text(
        "Sampled at temperature 1. A gold score of 1 is right, polite and short; best of 4 takes "
        "the one of four fine-tuned answers that the reward model likes best."
    )
    answers = [best["replies_against"], best["replies"], *(f["replies"] for f in found.values())]
    samples = zip(best["prompts"], *answers)
    section.table(
        ["prompt", "fine-tuned", "best of 4", "PPO", "DPO"], [list(row) for row in samples][:6]
    )
    return section


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
    evaluate = ["python", "-m", "nanollm.evaluate", *shlex.split(stage.evaluate or str(folder))]
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
    section.folder = folder
    section.code(f"$ {record['command']}\n$ {record['evaluate']}")
    stage.effect(section, read_json(folder / "result.json"), root)
    section.figure(
        f"{stage.name}/curves.svg",
        (folder / "curves.svg").read_text(),
        stage.curves,
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
    done = [stage for stage in done if stage.talks]
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


def last_that_talks(done):
    return [stage.name for stage in done if stage.talks][-1]


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
        f"{str(rt.dtype)[6:]}. Talk with it: python -m nanollm.chat {root}/{last_that_talks(done)}"
    )
    sections = [overview, prompts_section(done, root, rt)]
    if done[-1].name == "dpo":
        sections.append(preferences_section(root))
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
    print(f"python -m nanollm.chat {root}/{last_that_talks(done)}")


if __name__ == "__main__":
    cli(main, Config, PRESETS)
