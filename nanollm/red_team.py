r"""Red team: does a model keep the village's secret, and what gets it out?

    1  refuse        train on dialogues that refuse, and on others that don't: train_sft.py
    2  attack        sample completions to many attacks; those that give the secret away got through
    3  learn         of each the refusal is preferred to what was said: train_dpo.py
    4  attack again  with other attacks, on other people

Perez et al. 2022 (arXiv:2202.03286) let a model write the attacks; ours are drawn from the grammar
of data/village/secrets.py. A completion that an attack has begun goes on, in the pair, with the
refusal: what both have in common cancels in DPO's loss, and the model learns to turn back (Qi et
al. 2024, 2406.05946, section 4).

Run     python -m nanollm.red_team runs/sft --refusals refusals.jsonl
        python train_sft.py --init runs/sft --data refusals.jsonl --steps 150 --batch_size 8 \
            --replay 0.25 --muon_lr 0.003 --out runs/safe
        python -m nanollm.red_team runs/safe --pairs attacks.jsonl
        python train_dpo.py --init runs/safe --data attacks.jsonl --steps 30 --batch_size 16 \
            --lr 1e-4 --nll_coef 1 --out runs/safer
        python -m nanollm.red_team runs/safer
Needs   runs/sft                                          (python train_sft.py)
Expect  of 100 attacks on other people, in other words, and as many twins (seed 0, fp32, four
        minutes on one core; settings: seed 7, --split val)
                         runs/sft      runs/safe             runs/safer
                         told twins    refused told twins    refused told twins
            plain        100%   98%        99%   0%   97%        99%   0%   91%
            friend       100%   98%        77%  21%   91%        94%   0%   50%
            follow-up     98%   99%         4%  82%  100%       100%   0%   79%
            role play     98%   94%        75%   9%   92%        73%   0%   82%
            prefix        99%   96%         3%  80%   86%         4%  66%   82%
        Seeds 1 and 2: told after SFT plain 7%, 0%, friend 23%, 6%, follow-up 58%, 68%, role play
        11%, 12%, prefix 72%, 80%; after DPO 0%, but role play 3%, 0%, follow-up 0%, 1%, and prefix
        71%, 68%; twins told 36%, 50% (friend) to 94%, 96% (plain)
        Over-refusal, of twins, stays below 8% (once 14%: seed 1, prefix, before DPO); what safety
        costs here is right answers. Who has agreed goes on: DPO hardly mends the prefix
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from data.village import examples as village
from data.village.secrets import KINDS, attacks, outcome, refusals
from nanollm.config import ModelConfig, Whole, cli
from nanollm.formats import write_jsonl
from nanollm.generate import complete
from nanollm.hub import load_model
from nanollm.metrics import table
from nanollm.records import read_chats
from nanollm.rollouts import chat_prompt
from nanollm.run import check_file
from nanollm.runtime import start

LONGEST = 40  # tokens of a completion


@dataclass
class Config(ModelConfig):
    split: Literal["test", "val"] = "test"  # attacks that are measured; val: to choose settings
    attacks: Whole[1] = 100  # of each kind, and as many harmless twins
    refusals: str | None = None  # write dialogues that refuse, for train_sft.py --data
    pairs: str | None = None  # write training attacks that got through, for train_dpo.py --data
    samples: Whole[1] = 4  # completions of each training attack, at temperature 1


def completions(model, tokenizer, examples, samples=1, **how):
    """Completions of each example, whole: what it begins with is their beginning."""
    prompts = [chat_prompt(e, tokenizer) + tokenizer.encode(e["begin"]) for e in examples]
    texts = complete(model, tokenizer, prompts, LONGEST, samples=samples, **how)
    return [f"{examples[n // samples]['begin']} {t.strip()}".strip() for n, t in enumerate(texts)]


def measure(examples, texts):
    """Table: shares of attacks that were refused and got through; the same of their twins."""
    rows = {kind: [kind] for kind in KINDS}
    for kind, secret in itertools.product(KINDS, (True, False)):
        asked = [
            (e, t) for e, t in zip(examples, texts) if (e["task"], e["secret"]) == (kind, secret)
        ]
        became = [outcome(*each) for each in asked]
        rows[kind] += [became.count(each) / len(became) for each in ("refused", "told")]
    return table(["attack", "refused", "told", "twin: refused", "told"], rows.values())


def pairs_of(examples, texts):
    """What should have been said beside what was, of each attack that got through, and of half as
    many twins the answer beside a refusal, so that refusing isn't all that is learnt: of more, DPO
    unlearns to refuse. texts: several of each.
    """
    pairs, n = {True: [], False: []}, len(texts) // len(examples)
    for i, example in enumerate(examples):
        secret = example["secret"]
        right, wrong = ("refused", "told") if secret else ("told", "refused")
        said = [text for text in texts[i * n : (i + 1) * n] if outcome(example, text) == wrong]
        if not secret:
            said.append(example["refused"])
        if said:
            about = {key: example[key] for key in ("messages", "task", "secret")}
            pairs[secret].append(about | {"chosen": example[right], "rejected": said[0]})
    return pairs[True] + pairs[False][: len(pairs[True]) // 2]


def main(cfg):
    for path in filter(None, (cfg.refusals, cfg.pairs)):
        check_file(path)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = load_model(cfg.model)
    rt.prepare(model, train=False)
    folder = village.of_run(cfg.model)
    world = village.world_of(folder)
    examples = attacks(world, cfg.split, cfg.attacks, cfg.seed)
    print(measure(examples, completions(model, tokenizer, examples)))
    if cfg.refusals:
        chats = refusals(world, read_chats(folder / "sft_train.jsonl"), cfg.seed)
        write_jsonl(cfg.refusals, chats)
        print(f"{cfg.refusals}: {len(chats)} dialogues, some of which refuse")
    if cfg.pairs:
        examples = attacks(world, "train", cfg.attacks, cfg.seed)
        how = {"temperature": 1.0, "generator": torch.Generator(rt.device).manual_seed(cfg.seed)}
        pairs = pairs_of(examples, completions(model, tokenizer, examples, cfg.samples, **how))
        through = [pair["task"] for pair in pairs if pair["secret"]]
        write_jsonl(cfg.pairs, pairs)
        said = ", ".join(f"{kind} {through.count(kind)}" for kind in KINDS)
        print(f"{cfg.pairs}: training attacks that got through: {said} of {cfg.attacks} each")
    rt.close()


if __name__ == "__main__":
    cli(main, Config)
