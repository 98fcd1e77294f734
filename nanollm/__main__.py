"""The whole pipeline on the embedded village, with a report: python -m nanollm

Each stage is a command that you could type yourself; it is printed before it runs. A stage that is
done is not run again, and one that was interrupted is resumed: call it once more to continue.
--fresh begins anew.

    runs/<stage>/       the run folder of each stage
    runs/report.html    what each stage did and what it changed
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data.village import examples as village
from nanollm.config import UserError, atomic_write, cli, read_json
from nanollm.generate import complete
from nanollm.hub import load_model
from nanollm.metrics import first_of_each_task
from nanollm.records import read_examples
from nanollm.report import effects_of, write_report
from nanollm.rollouts import prompt_of
from nanollm.run import effect_line, move_aside
from nanollm.runtime import start
from nanollm.tools import Toolbox


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: minutes on a laptop; gpu: one GPU
    preset: str = "tiny"
    root: str = "runs"  # folder of the run folders and of the report
    fresh: bool = False  # forget what earlier calls have done
    device: str = "auto"  # auto, cpu, cuda, cuda:N; passed on to every stage


PRESETS = {"smoke": {}, "tiny": {}, "gpu": {}}


# --- the stages ----------------------------------------------------------------------------------


@dataclass
class Stage:
    """Commands of the pipeline; ROOT in them stands for the folder of the runs."""

    name: str  # of its run folder, which the last of its commands writes
    title: str
    command: str  # the script and its flags; or several, with && between them
    what: str  # what the stage does, in a sentence or two
    asked: str = ""  # kinds of QUESTIONS that the model is asked for the report
    evaluate: str = ""  # what python -m nanollm.evaluate is called with afterwards; "": no call
    preset: str = "tiny"  # the script's preset that stands for tiny


STAGES = [
    Stage("pretrain", "Pretraining", "train_pretrain.py --out ROOT/pretrain --compare_xz",
          "A model with random weights reads the village's texts and learns to predict the next "
          "token. It learns the language, and on the way who lives where and keeps which pet.",
          asked="dialogue", evaluate="ROOT/pretrain"),
    Stage("sft", "Supervised fine-tuning", "train_sft.py --init ROOT/pretrain --out ROOT/sft",
          "The model learns from dialogues to answer instead of to continue. Half of the "
          "villagers never occur in them: what it can say about those, it knows from pretraining.",
          asked="dialogue problems tools", evaluate="ROOT/sft"),
    Stage("rm", "Reward model", "train_rm.py --init ROOT/sft --out ROOT/rm",
          "The fine-tuned model completes each prompt several times. Annotators, who err now and "
          "then, rank the completions: right, polite and short ones are better. A model learns to "
          "score completions from that. The samples below are the best of four by its score.",
          evaluate="ROOT/sft --data preferences --reward_model ROOT/rm --best_of 4 "
          "--against ROOT/sft --out ROOT/rm/preferences.json"),
    Stage("ppo", "PPO", "train_ppo.py --init ROOT/sft --reward_model ROOT/rm --out ROOT/ppo",
          "The model completes prompts, the reward model scores, and what was better than "
          "expected becomes more likely; every step away from the fine-tuned model has a price.",
          asked="dialogue",
          evaluate="ROOT/ppo --data preferences --reward_model ROOT/rm --against ROOT/sft"),
    Stage("dpo", "DPO", "train_dpo.py --init ROOT/sft --nll_coef 0.3 --out ROOT/dpo",
          "The same rankings without a reward model: the better completion of each pair becomes "
          "more likely than the worse one. Both can become less likely at that, and right answers "
          "suffer, unless the loss holds the likelihood of the better one as well (Pang et al. "
          "2024, arXiv:2404.19733).",
          asked="dialogue",
          evaluate="ROOT/dpo --data preferences --reward_model ROOT/rm --against ROOT/sft"),
    Stage("cot", "Chain of thought", "train_sft.py --init ROOT/sft --data mixed --out ROOT/cot",
          "The model learns to think before it answers, from solutions to problems. People write "
          "out few of the long ones, so it has learnt to think, and not to rely on it.",
          asked="problems", preset="cot"),
    Stage("grpo", "GRPO", "train_grpo.py --init ROOT/cot --out ROOT/grpo",
          "The model tries each problem eight times, a rule checks the answers, and what was "
          "better than its group becomes more likely. Nobody tells it to think; thinking pays.",
          asked="problems"),
    Stage("reft", "ReFT", "train_ppo.py --init ROOT/cot --data problems --reward rules "
          "--critic shared --out ROOT/reft",
          "Reinforced fine-tuning: PPO on the same problems, from the same model, rewarded by "
          "rules: 1 for a right answer, 0.1 for one that can be read, 0 for none.",
          asked="problems", preset="reft", evaluate="ROOT/reft --data reasoning --limit 64"),
    Stage("tools", "Tools", "train_sft.py --init ROOT/grpo --data tools --out ROOT/tools",
          "The model learns to call a calculator for large numbers, and a search for people whom "
          "no text has told it of. It writes the call, the engine writes the result behind it.",
          asked="tools", preset="tools", evaluate="ROOT/tools --data tools --tools --limit 64"),
    Stage("distill", "Distillation", "distill.py --teacher ROOT/sft --out ROOT/distill",
          "A new model with a third of the parameters learns from the fine-tuned one: from a "
          "thousand dialogues, and four thousand other prompts that the teacher completes, with "
          "its probabilities of every token."),
    Stage("lora", "LoRA", "lora.py --init ROOT/sft --out ROOT/lora",
          "The fine-tuned model learns to talk with sailors: another style, and a few new facts. "
          "Its weights stay as they are; thin matrices beside them are trained."),
    Stage("vlm", "Vision", "train_vlm.py --init ROOT/sft --out ROOT/vlm",
          "The fine-tuned model learns to see. A vision tower learns which image belongs to which "
          "caption, a projector turns its features into tokens of the language model, and then "
          "both learn from questions about images. The no-image baseline learns the same from "
          "grey images: what it gets right can be guessed."),
    Stage("clean", "Cleaning", "data/clean.py --villagers 8 --out ROOT/clean-text && "
          "train_pretrain.py --data ROOT/clean-text/dirty.jsonl --val_data "
          "ROOT/clean-text/val.jsonl --out ROOT/clean-dirty && train_pretrain.py --data "
          "ROOT/clean-text/clean.jsonl --val_data ROOT/clean-text/val.jsonl --against "
          "ROOT/clean-dirty --out ROOT/clean",
          "Back to the beginning: the village's text as the web would hand it over is cleaned. Two "
          "small models read for the same steps, one the dirty text, one what is left of it.",
          preset="short"),
    Stage("mlm", "Masked language modelling", "train_pretrain.py --out ROOT/mlm-causal && "
          "train_pretrain.py --objective mlm --against ROOT/mlm-causal --out ROOT/mlm",
          "One small model predicts the next token, another fills in blanks and sees both sides of "
          "them (BERT). It is asked for fewer tokens at a step, and takes longer to learn facts.",
          preset="short"),
]  # fmt: skip

# by kind: the village's file of test examples, of which the first of each task is asked
QUESTIONS = {
    "dialogue": "sft_test.jsonl",
    "problems": "problems_test.jsonl",
    "tools": "tools_test.jsonl",
}


# --- running -------------------------------------------------------------------------------------


def commands_of(stage, cfg):
    """The stage's commands, and that of its evaluation where it has one, as lists of words."""
    preset, root = preset_of(stage, cfg), Path(cfg.root).as_posix()
    preset_flags = [] if preset == "tiny" else ["--preset", preset]
    device_flags = [] if cfg.device == "auto" else ["--device", cfg.device]
    commands = []
    for command in stage.command.replace("ROOT", root).split(" && "):
        script, *flags = command.split()
        if not script.startswith("data/"):  # it trains
            flags = [*preset_flags, *flags, *device_flags]
        commands.append(["python", script, *flags])
    if stage.evaluate:
        flags = stage.evaluate.replace("ROOT", root).split()
        limit = ["--limit", "20"] if preset == "smoke" else []
        commands.append(["python", "-m", "nanollm.evaluate", *flags, *limit, *device_flags])
    return commands


def preset_of(stage, cfg):
    """The preset of a stage's script. What is beside the way stays short on a GPU."""
    if cfg.preset == "tiny" or (cfg.preset, stage.preset) == ("gpu", "short"):
        return stage.preset
    return cfg.preset


def run_stage(stage, cfg, later):
    """Run the stage's commands unless they are done; returns {"command", "shown", "seconds"}.
    `later` are the folders of the stages behind it, which are stale once it has run again.
    """
    folder, commands = Path(cfg.root) / stage.name, commands_of(stage, cfg)
    n = len(stage.command.split(" && "))  # the first n commands train
    record = {"command": " && ".join(map(shlex.join, commands[:n]))}
    record["shown"] = "\n".join(f"$ {shlex.join(words)}" for words in commands)
    done, begin = folder / "stage.json", time.perf_counter()
    if done.exists() and not cfg.fresh:
        known = read_json(done)
        if known["command"] == record["command"]:
            print(f"{stage.title}: done before in {known['seconds']:.0f} s (--fresh: again)")
            return known
    elif (folder / "state.pt").exists() and not cfg.fresh:  # the last of them was interrupted
        if read_json(folder / "train_config.json")["preset"] == preset_of(stage, cfg):
            commands[:n] = [[*commands[n - 1], "--resume"]]
    for other in later:
        move_aside(other)
    for words in commands:
        print(f"\n$ {shlex.join(words)}", flush=True)
        if code := subprocess.call([sys.executable, *words[1:]]):
            raise UserError(
                f"`{shlex.join(words)}` ended with exit code {code}; fix it and call python -m "
                "nanollm again"
            )
    record["seconds"] = time.perf_counter() - begin  # since the interruption, where there was one
    atomic_write(done, json.dumps(record, indent=2) + "\n")
    return record


def ask(stage, root, rt, answers):
    """Add the stage's greedy answers as a column to {kind of question: {column: cells}}."""
    folder = village.of_run(root / "pretrain")
    for kind in stage.asked.split():
        examples = first_of_each_task(read_examples(folder / QUESTIONS[kind]), 1)
        model, tokenizer = load_model(root / stage.name)
        rt.prepare(model, train=False)
        tools = None
        if kind == "tools":
            tools = Toolbox.with_knowledge(village.knowledge_of(root / "pretrain"), tokenizer)
        prompts = [prompt_of(example, model, tokenizer) for example in examples]
        texts = complete(model, tokenizer, prompts, 112, tools=tools)
        asked = [" / ".join(turn["content"] for turn in e["messages"]) for e in examples]
        columns = answers.setdefault(kind, {"prompt": asked})
        columns["right"] = [example["answer"] for example in examples]
        columns[stage.title] = [text.strip() for text in texts]


def main(cfg):
    if not Path("train_pretrain.py").exists():
        raise UserError("call python -m nanollm in the directory that holds train_pretrain.py")
    root, begin = Path(cfg.root), time.perf_counter()
    rt, answers, done = start(cfg.device), {}, []
    for n, stage in enumerate(STAGES):
        record = run_stage(stage, cfg, [root / each.name for each in STAGES[n + 1 :]])
        ask(stage, root, rt, answers)
        done.append((stage, record))
        if stage.asked:
            chat = f"python -m nanollm.chat {root.as_posix()}/{stage.name}"
            chat += " --tools" if stage.asked == "tools" else ""
        write_report(root, done, answers, f"Talk with it: {chat}")
    print()
    for stage, record in done:
        first = effect_line(effects_of(root / stage.name)[0])
        print(f"{stage.title:24}{record['seconds']:6.0f} s   {first}")
    print(f"\n{root}/report.html has it all ({time.perf_counter() - begin:.0f} s). Talk with it:")
    print(chat)


if __name__ == "__main__":
    cli(main, Config, PRESETS)
