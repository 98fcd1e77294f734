"""The stages of the pipeline, in order: the command of each, and what its section shows."""

from dataclasses import dataclass
from typing import Callable

from nanollm import effects


@dataclass
class Stage:
    """One stage: the commands behind it, and how its run folder becomes a section of the report."""

    name: str  # of its run folder
    title: str
    script: str
    flags: dict
    what: str  # what the stage does, in a sentence or two
    effect: Callable  # (section, result.json, run folder) -> None: adds the measured effect
    evaluate: str = ""  # what python -m nanollm.evaluate is called with; "": no call
    speaks: str = "chat"  # which questions it answers in the report: chat, reasoning, tools or none
    curves: str = "Loss over the optimizer steps."
    preset: str = "tiny"  # what stands for tiny in this stage


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
            effects.pretraining,
            f"{root}/pretrain",
        ),
        Stage(
            "sft",
            "Supervised fine-tuning",
            "train_sft.py",
            {"init": f"{root}/pretrain", "out": f"{root}/sft"},
            "The model learns from dialogues to answer instead of to continue. Half of the "
            "villagers never occur in "
            "them: what it can say about those, it knows from pretraining.",
            effects.sft,
            f"{root}/sft",
        ),
        Stage(
            "rm",
            "Reward model",
            "train_rm.py",
            {"init": f"{root}/sft", "out": f"{root}/rm"},
            "The fine-tuned model answers each prompt several times, and annotators rank the "
            "answers: right, polite and short ones are better. They are wrong now and then. A "
            "model learns from the rankings to score answers.",
            effects.rm,
            f"{root}/sft --data preferences --reward_model {root}/rm --best_of 4 "
            f"--against {root}/sft --out {root}/rm/preferences.json",
            speaks="none",
        ),
        Stage(
            "ppo",
            "PPO",
            "train_ppo.py",
            {"init": f"{root}/sft", "reward_model": f"{root}/rm", "out": f"{root}/ppo"},
            "The model answers, the reward model scores, and answers that were better than "
            "expected become more likely, at a price for every step away from the fine-tuned "
            "model (KL).",
            effects.policy,
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
            effects.policy,
            f"{root}/dpo --data preferences --reward_model {root}/rm --against {root}/sft",
            curves="Loss per pair over the optimizer steps.",
        ),
        Stage(
            "cot",
            "Chain of thought",
            "train_sft.py",
            {"init": f"{root}/sft", "data": "mixed", "out": f"{root}/cot"},
            "The model learns to think before it answers, from solutions to problems. People write "
            "out few of the long ones, so it has learnt to think, and not to rely on it.",
            effects.cot,
            speaks="reasoning",
            preset="cot",
        ),
        Stage(
            "grpo",
            "GRPO",
            "train_grpo.py",
            {"init": f"{root}/cot", "out": f"{root}/grpo"},
            "The model answers each problem eight times, a rule checks the answers, and those "
            "better than their group become more likely. Nobody tells it to think: it finds out "
            "that this pays.",
            effects.grpo,
            speaks="reasoning",
            curves="Reward and accuracy of the sampled answers, greedy accuracy on held-out "
            "problems, over the updates.",
        ),
        Stage(
            "reft",
            "ReFT",
            "train_ppo.py",
            {
                "init": f"{root}/cot",
                "data": "problems",
                "reward": "rules",
                "critic": "shared",
                "out": f"{root}/reft",
            },
            "Reinforced fine-tuning: PPO on the same problems, from the same model, rewarded by "
            "rules: 1 for a right answer, 0.1 for one that can be read, 0 for none.",
            effects.reft,
            f"{root}/reft --data reasoning --limit 64",
            speaks="reasoning",
            curves="Reward of the sampled answers, and accuracy of sampled answers to held-out "
            "problems, over the updates.",
            preset="reft",
        ),
        Stage(
            "tools",
            "Tools",
            "train_sft.py",
            {"init": f"{root}/grpo", "data": "tools", "out": f"{root}/tools"},
            "The model learns to call a calculator for large numbers, and a search for people whom "
            "no text has told it of. It writes the call, the engine writes the result behind it.",
            effects.tools,
            f"{root}/tools --data tools --limit 64",
            speaks="tools",
            preset="tools",
        ),
        Stage(
            "distill",
            "Distillation",
            "distill.py",
            {"teacher": f"{root}/sft", "out": f"{root}/distill"},
            "A new model with a third of the parameters learns from the fine-tuned one: from a "
            "thousand dialogues, and from the teacher's answers to four thousand other questions, "
            "with its probabilities of every token.",
            effects.distillation,
            speaks="none",
            curves="Loss per token over the optimizer steps, on held-out labels too, and accuracy "
            "on held-out questions.",
        ),
        Stage(
            "lora",
            "LoRA",
            "lora.py",
            {"init": f"{root}/sft", "out": f"{root}/lora"},
            "The fine-tuned model learns to talk with sailors: another manner of speaking, and a "
            "few new facts. Its weights stay as they are; thin matrices beside them are trained.",
            effects.parameter_efficient,
            speaks="none",
        ),
        Stage(
            "vlm",
            "Eyes",
            "train_vlm.py",
            {"init": f"{root}/sft", "out": f"{root}/vlm"},
            "The fine-tuned model learns to see. A vision tower learns which image belongs to "
            "which caption, a projector turns its features into tokens of the language model, and "
            "then both learn from questions about images. A second model learns the same from "
            "grey images: what that one gets right can be guessed.",
            effects.images,
            speaks="none",
            curves="Loss per token over the optimizer steps.",
        ),
    ]
