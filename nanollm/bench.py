"""How fast it is, and beside what: training and sampling tokens per second, seconds per update of
GRPO, memory, share of the hardware's peak.

Run     python -m nanollm.bench                        # a 1M-parameter model
        python -m nanollm.bench --peer transformers    # beside transformers, same shape, same run
        python -m nanollm.bench --preset gpu           # 124M parameters, context 1024, batch 256
        python -m nanollm.bench --preset grpo          # one update of GRPO, and where its time goes
        python -m nanollm.bench --preset grpo --peer trl    # beside trl's GRPOTrainer

Medians of --repeats runs. With --peer the two take turns, so that a machine whose speed drifts
slows both. transformers computes in fp32 eagerly, as its examples do; trl in fp32 and in bf16, with
either attention of transformers, and the fastest counts. The roofline is measured: the rate of one
large matrix product.

An update of GRPO is all of it: sampling, rewards, logprobs of the reference, loss, backward,
clipping, AdamW. Both start from the same random weights and see prompts of random digits; the
reward is the share of even ids, and no stop token is ever drawn, so that all answers are equally
long.
"""

import copy
import json
import math
import os
import random
import statistics
import tempfile
import warnings
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal
from unittest import mock

import torch

from nanollm.batches import Sampler
from nanollm.checkpoint import config_json
from nanollm.config import UserError, cli
from nanollm.generate import check_room, generate
from nanollm.gpt import GPT, GPTConfig, count_parameters
from nanollm.grpo_runs import Sampling
from nanollm.hub import save_model
from nanollm.logprobs import token_logprobs
from nanollm.optim import build_optimizers
from nanollm.runtime import (
    clock,
    flop_per_token,
    has_bf16,
    model_flops_utilisation,
    peak_memory,
    start,
)
from nanollm.tokenizer import SPECIAL_TOKENS, Tokenizer


@dataclass
class Config:
    # tiny: the shape of the default pretraining run; gpu: 124M parameters; grpo: tiny, --what grpo
    preset: str = "tiny"
    # which measurements; all: train and sample
    what: Literal["all", "train", "sample", "step", "grpo"] = "all"
    # -- Shape
    layers: int = 4  # number of blocks
    channels: int = 128  # width C
    heads: int = 4  # attention heads
    mlp: int = 384  # hidden width of the MLP
    vocab_size: int = 2048  # V
    context: int = 256  # T
    qk_norm: bool = False  # RMSNorm on queries and keys
    # -- Training: forward and backward; with --what step the optimizer too
    batch_size: int = 32  # rows
    # -- Sampling
    prompts: int = 64  # prompts side by side
    prompt_tokens: int = 32  # length of each
    new_tokens: int = 64  # sampled after each
    samples: int = 8  # answers per prompt; with --what grpo
    # -- How
    # measure it too; it must be installed. trl: with --what grpo; transformers: with the others
    peer: Literal["transformers", "trl"] | None = None
    repeats: int = 5  # runs to take the median of, after one that is not counted
    compile: bool = False  # torch.compile for training
    seed: int = 0  # of weights and tokens
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision of the layers
    json: str | None = None  # file to write the figures to


PRESETS = {
    "tiny": {},
    "gpu": {
        "layers": 12,
        "channels": 768,
        "heads": 12,
        "mlp": 2048,
        "vocab_size": 50304,
        "context": 1024,
        "batch_size": 32,
        "prompts": 256,
        "prompt_tokens": 128,
        "new_tokens": 256,
        "compile": True,
    },
    "grpo": {"what": "grpo", "prompts": 32, "new_tokens": 32, "samples": 8},
}


def matmul_rate(rt):
    """FLOP per second of one large matrix product in the run's precision: the measured roof of
    everything here.
    """
    n = 8192 if rt.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=rt.device, dtype=rt.dtype) for _ in range(2))
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b, rt, 10))


def seconds(work, rt, repeats):
    """Durations of `repeats` calls after one that isn't counted."""
    durations = []
    for _ in range(repeats + 1):
        begin = clock(rt.device)
        work()
        durations.append(clock(rt.device) - begin)
    return durations[1:]


def in_turn(works, rt, repeats):
    """Median duration of each of several works, run A B A B ...: {name: seconds}."""
    durations = {name: [] for name in works}
    for i in range(repeats + 1):
        for name, work in works.items():
            begin = clock(rt.device)
            work()
            if i:
                durations[name].append(clock(rt.device) - begin)
    return {name: statistics.median(times) for name, times in durations.items()}


def peer_model(shape, rt):
    """transformers' Llama (or Qwen3) of the same shape."""
    import transformers

    values = config_json(shape, Tokenizer.from_bytes(), torch.float32) | {
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = transformers.AutoConfig.for_model(**values)
    return transformers.AutoModelForCausalLM.from_config(config).to(rt.device)


def training_work(model, ddp_model, tokens, optimizers=None):
    """One forward and backward pass of ours, and the optimizer's step where one is given."""
    scaler = torch.amp.GradScaler(tokens.device.type, enabled=False)

    def work():
        model.zero_grad(set_to_none=True)
        (-token_logprobs(ddp_model(tokens[:, :-1]), tokens[:, 1:]).mean()).backward()
        if optimizers:
            optimizers.step(scaler)

    return work


def check_peer(what, peer):
    """Raise UserError where the peer can't do what is measured, or isn't installed."""
    if peer and (peer == "trl") != (what == "grpo"):
        raise UserError("--peer trl goes with --what grpo, --peer transformers with all else")
    try:
        if peer:
            __import__(peer)
    except ImportError:
        raise UserError(
            f"--peer {peer} needs it installed: pip install -r requirements-dev.txt"
        ) from None


def main(cfg):
    check_peer(cfg.what, cfg.peer)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    shape = GPTConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.channels,
        intermediate_size=cfg.mlp,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads,
        head_dim=cfg.channels // cfg.heads,
        qk_norm=cfg.qk_norm,
        max_position_embeddings=max(cfg.context, cfg.prompt_tokens + cfg.new_tokens),
    )
    model = GPT(shape)
    ddp_model = rt.prepare(model, cfg.compile)
    total, matrices = count_parameters(model)
    roof = matmul_rate(rt)
    where = (
        torch.cuda.get_device_name(rt.device)
        if rt.device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(
        f"{total:,} parameters, {str(rt.dtype)[6:]}, {where}; roof: {roof / 1e12:.2f} TFLOP/s in "
        f"a matrix product"
    )
    peer = peer_model(shape, rt) if cfg.peer == "transformers" else None
    figures = {
        "parameters": total,
        "dtype": str(rt.dtype),
        "device": where,
        "roof_flop_per_second": roof,
    }
    if cfg.what in ("all", "train", "step"):
        figures |= bench_training(cfg, rt, model, ddp_model, peer, matrices, roof)
    if cfg.what in ("all", "sample"):
        figures |= bench_sampling(cfg, rt, model, peer)
    if cfg.what == "grpo":
        figures |= bench_grpo(cfg, rt, model, ddp_model)
    figures["peak_memory_bytes"] = peak_memory(rt.device)
    print(f"peak memory {figures['peak_memory_bytes'] / 2**30:.2f} GiB")
    if cfg.json:
        with open(cfg.json, "w") as f:
            json.dump(figures, f, indent=2)
    rt.close()


def bench_training(cfg, rt, model, ddp_model, peer, matrices, roof):
    tokens = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.context + 1), device=rt.device)
    n = cfg.batch_size * cfg.context
    optimizers = build_optimizers(model) if cfg.what == "step" else None
    works = {"nanollm": training_work(model, ddp_model, tokens, optimizers)}
    if peer is not None:

        def peer_work():
            peer.zero_grad(set_to_none=True)
            peer(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss.backward()

        works["transformers"] = peer_work
    times = in_turn(works, rt, cfg.repeats)
    flop = flop_per_token(model.cfg, matrices, cfg.context)
    mfu = model_flops_utilisation(n / times["nanollm"], flop, rt.device)
    share = f"{flop * n / times['nanollm'] / roof:.1%} of the roof" + (
        f", MFU {mfu:.1%} of the datasheet" if mfu else ""
    )
    report("training", times, n, share)
    return {f"train_tokens_per_second_{name}": n / t for name, t in times.items()} | {"mfu": mfu}


def bench_sampling(cfg, rt, model, peer):
    model.eval()
    prompts = torch.randint(cfg.vocab_size, (cfg.prompts, cfg.prompt_tokens), device=rt.device)
    generator, n = torch.Generator(rt.device).manual_seed(cfg.seed), cfg.prompts * cfg.new_tokens
    works = {
        "nanollm": lambda: generate(model, prompts.tolist(), cfg.new_tokens, generator=generator)
    }
    if peer is not None:
        peer.eval()
        works["transformers"] = lambda: peer.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=cfg.new_tokens,
            min_new_tokens=cfg.new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
    times = in_turn(works, rt, cfg.repeats)
    report(
        "sampling",
        times,
        n,
        f"{cfg.prompts} prompts of {cfg.prompt_tokens} tokens, {cfg.new_tokens} new ones",
    )
    return {f"sample_tokens_per_second_{name}": n / t for name, t in times.items()}


def report(name, times, tokens, remark):
    print(
        f"{name:10}"
        + "".join(f"{who} {tokens / t:>11,.0f} tokens/s   " for who, t in times.items())
        + (
            f"ratio {times['transformers'] / times['nanollm']:.2f}   "
            if "transformers" in times
            else ""
        )
        + remark
    )


# --- GRPO ----------------------------------------------------------------------------------------


def bench_grpo(cfg, rt, model, ddp_model):
    tokenizer = endless_tokenizer(cfg.vocab_size)
    digits, n = random.Random(cfg.seed), cfg.prompts * (cfg.repeats + 1)
    prompts = ["".join(digits.choices("0123456789", k=cfg.prompt_tokens)) for _ in range(n)]
    laps = Laps(rt.device)
    settings, work = grpo_work(cfg, rt, model, ddp_model, tokenizer, prompts, laps)
    figures, remark = {}, ""
    if cfg.peer:
        tried = product(("fp32", "bf16")[: 1 + has_bf16(rt.device)], ("sdpa", "eager"))
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, tokenizer, folder)
            found = {
                setting: in_turn_with_trl(cfg, rt, settings, folder, prompts, *setting, work)
                for setting in tried
            }
        figures = {f"grpo_seconds_trl_{p}_{a}": found[p, a]["trl"] for p, a in found}
        fastest = min(found, key=lambda setting: found[setting]["trl"])
        times, remark = found[fastest], f" ({', '.join(fastest)})"
    else:
        times = in_turn({"nanollm": work}, rt, cfg.repeats)
    shares = laps.shares()
    print(
        "GRPO update  "
        + "   ".join(f"{who} {t:.2f} s" for who, t in times.items())
        + (f"{remark}   ratio {times['trl'] / times['nanollm']:.2f}" if cfg.peer else "")
        + f"   {cfg.prompts} prompts x {cfg.samples} answers x {cfg.new_tokens} new tokens, KL on\n"
        + "of nanollm's "
        + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    )
    figures |= {f"grpo_seconds_{who}": t for who, t in times.items()}
    return figures | {"grpo_shares_nanollm": shares}


class Laps:
    """Where the time of a work goes, run by run."""

    def __init__(self, device):
        self.device, self.runs = device, []

    def begin(self):
        self.runs.append({})
        self.last = clock(self.device)

    def after(self, function, name):
        """The function; what has passed at its end since the last lap goes down to `name`."""

        def timed(*args):
            out = function(*args)
            now, run = clock(self.device), self.runs[-1]
            run[name], self.last = run.get(name, 0.0) + now - self.last, now
            return out

        return timed

    def shares(self):
        """{name: share of the time} over all runs but the first."""
        totals = {name: sum(run[name] for run in self.runs[1:]) for name in self.runs[0]}
        return {name: seconds / sum(totals.values()) for name, seconds in totals.items()}


def endless_tokenizer(vocab_size):
    """A tokenizer whose stop tokens lie beyond the model's vocabulary, so that none is ever drawn.
    A digit is a token.
    """
    ranks = {bytes([i]) if i < 256 else i.to_bytes(3, "big"): i for i in range(vocab_size - 1)}
    special = {token: vocab_size + n for n, token in enumerate(SPECIAL_TOKENS)}
    return Tokenizer(ranks, special | {"<|pad|>": vocab_size - 1})


def share_of_even(answers):
    """A reward for each list of ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in answers]


def grpo_work(cfg, rt, model, ddp_model, tokenizer, prompts, laps):
    """(settings, one update of ours): all but prompts and reward is train_grpo.py's."""
    import train_grpo  # at the root of the repository

    sample_and_check = train_grpo.sample_rollout

    def sample_rollout(*args):
        out = sample_and_check(*args)
        rows = out.rows.to("cpu")
        answers = [tokens[mask].tolist() for tokens, mask in zip(rows.tokens, rows.mask)]
        return replace(out, rewards=torch.tensor(share_of_even(answers), device=rt.device))

    settings = train_grpo.Config(
        batch_size=cfg.prompts,
        samples=cfg.samples,
        max_new_tokens=cfg.new_tokens,
        kl_coef=0.04,
        accumulate=train_grpo.PRESETS.get(cfg.preset, {}).get("accumulate", 4),
    )
    problems = [{"prompt": text, "answer": "none", "check": "exact"} for text in prompts]
    sampling = Sampling(settings, tokenizer)
    sampling.ask = lambda problem: tokenizer.encode(problem["prompt"])
    check_room(model, list(map(sampling.ask, problems)), cfg.new_tokens)
    ref = copy.deepcopy(model)
    rt.prepare(ref, train=False)
    optimizers = build_optimizers(model, "adamw", lr=settings.lr, weight_decay=0.0)
    optimizers.unscale = laps.after(optimizers.unscale, "forward and backward")
    sample_batch = laps.after(train_grpo.sample_batch, "sampling")
    batched_logprobs = laps.after(train_grpo.batched_logprobs, "reference")
    update = laps.after(train_grpo.update, "optimizer and rest")
    sampler, scaler = Sampler(len(problems), cfg.seed), rt.scaler()

    def work():
        laps.begin()
        with mock.patch.multiple(
            train_grpo, sample_rollout=sample_rollout, batched_logprobs=batched_logprobs
        ):
            rollout, _ = sample_batch(settings, rt, model, sampling, problems, sampler)
            update(settings, rt, ddp_model, ref, optimizers, scaler, rollout)

    return settings, work


def in_turn_with_trl(cfg, rt, settings, folder, prompts, precision, attention, ours):
    """As in_turn: trl's GRPOTrainer on the model in `folder`, and after each of its updates ours.

    An update of trl's goes from the end of ours to its next on_step_end, generation included.
    """
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    from data.prepare import Dataset

    durations = {"nanollm": [], "trl": []}

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.begin = clock(rt.device)

        def on_step_end(self, *args, **kwargs):
            end = clock(rt.device)
            ours()
            durations["trl"].append(end - self.begin)
            self.begin = clock(rt.device)
            durations["nanollm"].append(self.begin - end)

    parts = math.gcd(settings.accumulate, cfg.prompts)  # of whole groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        trainer = GRPOTrainer(
            folder,
            reward_funcs=lambda completion_ids, **_: share_of_even(completion_ids),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=cfg.repeats + 1,
                per_device_train_batch_size=cfg.prompts * cfg.samples // parts,
                gradient_accumulation_steps=parts,
                num_generations=cfg.samples,
                max_completion_length=cfg.new_tokens,
                loss_type="grpo",
                beta=settings.kl_coef,
                learning_rate=settings.lr,
                lr_scheduler_type="constant",
                max_grad_norm=settings.clip,
                bf16=precision == "bf16",
                model_init_kwargs={"attn_implementation": attention},
                gradient_checkpointing=False,  # trl's default, True, costs a forward pass
                use_cpu=rt.device.type == "cpu",
                dataloader_pin_memory=rt.device.type == "cuda",
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                seed=cfg.seed,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[Turns],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return {who: statistics.median(times[1:]) for who, times in durations.items()}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cli(main, Config, PRESETS)
