r"""A person chooses: which of two completions is better? What train_dpo.py learns from.

Both are sampled from the model at temperature 1, of the same prompt (Christiano et al. 2017,
arXiv:1706.03741; Ouyang et al. 2022, 2203.02155), so that either may stand first. Each choice is
written at once, and is kept however one ends; called again, it goes on with the next prompt.

Run     python -m nanollm.annotate runs/sft --out choices.jsonl
        python train_dpo.py --data choices.jsonl --steps 20 --batch_size 8 --lr 3e-4 \
            --nll_coef 0.3 --eval_every 20 --out runs/chosen       # 13 s on one core
        python -m nanollm.evaluate runs/chosen --data preferences
Expect  30 choices of a scripted person who likes courtesy and skips what doesn't differ in it
        (python tests/scripted_person.py courteous 30 runs/sft --out choices.jsonl): courteous less
        rude completions of held-out prompts 1% -> 86% (83, 85, 91), right answers 97% -> 89% (90,
        88, 89), gold score 0.68 -> 0.88; seeds 0, 1, 2, fp32 (settings: seed 7)
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from data.village import examples as village
from nanollm.config import ModelConfig, Whole, cli
from nanollm.formats import need
from nanollm.generate import as_text, sample_completions
from nanollm.hub import load_model
from nanollm.records import read_preferences, read_prompts
from nanollm.rollouts import chat_prompt, with_room
from nanollm.run import check_file
from nanollm.runtime import start

LABELS = {"1": "a", "2": "b", "s": None}  # what a key means


@dataclass
class Config(ModelConfig):
    prompts: str | None = None  # JSONL of prompts (see data/README.md); default: the village's
    out: str = "choices.jsonl"  # each choice is added to it: {"prompt", "a", "b", "label"}
    max_new_tokens: Whole[1] = 64  # longest completion


def two_completions(cfg, model, tokenizer, prompts):
    """(messages, two texts) of each prompt, unless these are equal, empty or cut short."""
    for prompt in prompts:
        ids, how = [chat_prompt(prompt, tokenizer)], {"samples": 2}
        how["generator"] = torch.Generator(model.device).manual_seed(cfg.seed)
        ids = sample_completions(model, tokenizer, ids, cfg.max_new_tokens, **how)
        a, b = (as_text(tokenizer, i).strip() if i[-1] in tokenizer.stop_ids else "" for i in ids)
        if a and b and a != b:
            yield prompt["messages"], a, b


def ask(messages, a, b):
    """The label that a person gives; EOFError where nobody wants to go on."""
    print(*(f"\n[{message['role']}] {message['content']}" for message in messages), sep="")
    print(f"\n1  {a}\n\n2  {b}\n")
    while True:
        key = input("Which is better, 1 or 2? s: skip, q: end > ").strip().lower()
        if key == "q":
            raise EOFError
        if key in LABELS:
            return LABELS[key]


def main(cfg):
    path = cfg.prompts or village.of_run(cfg.model) / "prompts_train.jsonl"
    check_file(cfg.out, path)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = load_model(cfg.model)
    rt.prepare(model, train=False)
    done = read_preferences(cfg.out) if Path(cfg.out).exists() else []
    done, count = [record["messages"] for record in done], len(done)
    prompts = [prompt for prompt in read_prompts(path) if prompt["messages"] not in done]
    seen = any(prompt.get("images") for prompt in prompts)
    need(not seen, path, "it has images, which nobody would look at; name prompts of text")
    prompts = with_room(prompts, lambda p: chat_prompt(p, tokenizer), model, 1, path)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for messages, a, b in two_completions(cfg, model, tokenizer, prompts):
            if label := ask(messages, a, b):
                said = messages if len(messages) > 1 else messages[0]["content"]
                choice = {"prompt": said, "a": a, "b": b, "label": label}
                with open(cfg.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(choice, ensure_ascii=False) + "\n")
                count += 1
    print(f"\n{cfg.out}: {count} choices; train_dpo.py --data {cfg.out} learns from them")
    rt.close()


if __name__ == "__main__":
    cli(main, Config)
