"""How fast it is, and beside what: tokens per second of training and sampling, seconds of an update
of GRPO, memory, and the share of what the machine can multiply.

Run     python -m nanollm.bench                        # a 1M-parameter model
        python -m nanollm.bench --peer transformers    # beside transformers, same shape, same run
        python -m nanollm.bench --preset gpu           # 124M parameters, context 1024
        python -m nanollm.bench --preset grpo --peer trl    # an update beside trl's GRPOTrainer

Medians of --repeats turns after one that isn't counted. With --peer the two take turns, so that a
machine whose speed drifts slows both. transformers computes in fp32 eagerly, as its examples do; of
trl's settings (fp32 or bf16, either attention of transformers) the fastest counts. The roof is the
best rate of a linear layer in the run's precision, before the measurements and after them.

An update of GRPO goes from sampling to the optimizer's step, and is made of the pieces that
train_grpo.py is made of. Both sides start from the same weights and see the same random digits; the
reward is the share of even ids, and no completion stops early.
"""

import copy
import itertools
import os
import random
import statistics
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F

from nanollm.batches import pad_completions
from nanollm.checkpoint import config_json, save_gpt
from nanollm.config import TrainConfig, UserError, Whole, cli
from nanollm.generate import as_text, generate
from nanollm.gpt import GPT, GPTConfig, count_parameters, shape_of
from nanollm.logprobs import batched_logprobs, completion_logprobs, token_logprobs
from nanollm.optim import build_optimizer
from nanollm.runtime import bf16_is_faster, clock, flop_per_token, peak_memory, start
from nanollm.tokenizer import Tokenizer


@dataclass
class Config:
    # tiny: the shape of the default pretraining run; gpu: 124M parameters; grpo: tiny, an update
    preset: str = "tiny"
    # measure it too: trl with --preset grpo, transformers with the others
    peer: Literal["transformers", "trl"] | None = None
    repeats: Whole[1] = 5  # turns to take the median of
    # -- Shape
    layers: Whole[1] = 4  # number of blocks
    channels: Whole[1] = 128  # width C
    heads: Whole[1] = 4  # attention heads
    mlp: Whole[1] = 384  # hidden width of the MLP
    vocab_size: Whole[1] = 2048  # V
    context: Whole[1] = 256  # T
    # -- Work
    batch_size: Whole[1] = 32  # rows of training
    prompts: Whole[1] = 64  # prompts side by side
    prompt_tokens: Whole[1] = 32  # length of each
    new_tokens: Whole[1] = 64  # sampled after each
    samples: Whole[2] = 8  # grpo: completions per prompt
    # -- Machine
    compile: bool = False  # torch.compile for training
    seed: Whole[0] = 0  # of weights and tokens
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision of the layers


PRESETS = {
    "gpu": dict(
        layers=12,
        channels=768,
        heads=12,
        mlp=2048,
        vocab_size=50304,
        context=1024,
        prompts=256,
        prompt_tokens=128,
        new_tokens=256,
        compile=True,
    ),
    "grpo": dict(prompts=32, new_tokens=32),
}


# --- measuring -----------------------------------------------------------------------------------


def in_turn(works, rt, repeats):
    """Median seconds of each of several works, run A B A B ...: {name: seconds}."""
    durations = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            begin = clock(rt.device)
            work()
            durations[name].append(clock(rt.device) - begin)
    return {name: statistics.median(times[1:]) for name, times in durations.items()}


def matrix_rate(rt, turns):
    """FLOP per second of the fastest of several linear layers in the run's precision."""
    sizes = (2048, 4096, 8192) if rt.device.type == "cuda" else (256, 512, 1024, 2048)
    best = 0.0
    for n in sizes:
        x, weight = (torch.randn(n, n, device=rt.device, dtype=rt.dtype) for _ in range(2))
        for _ in range(turns):
            begin = clock(rt.device)
            F.linear(x, weight)
            best = max(best, 2 * n**3 / (clock(rt.device) - begin))
    return best


def show(what, times, remark, tokens=None):
    """Print what was measured: seconds, or tokens per second, of each, and their ratio to ours."""
    print(f"{what:12}{remark}")
    for name, seconds in times.items():
        speed = f"{tokens / seconds:,.0f} tokens/s" if tokens else f"{seconds:.2f} s"
        print(f"  {name:14}{speed:>18}   {seconds / times['nanollm']:.2f}x the time")


# --- training and sampling -----------------------------------------------------------------------


def bench_speed(cfg, rt, model, ddp_model):
    """{measurement: {name: seconds}} of a forward and a backward pass, and of sampling."""
    tokens = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.context + 1), device=rt.device)
    prompts = torch.randint(cfg.vocab_size, (cfg.prompts, cfg.prompt_tokens), device=rt.device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def train():
        model.zero_grad(set_to_none=True)
        (-token_logprobs(ddp_model(inputs), targets).mean()).backward()

    training = {"nanollm": train}
    sampling = {"nanollm": lambda: generate(model, prompts.tolist(), cfg.new_tokens)}
    if cfg.peer:
        peer = peer_model(model.cfg, rt)
        how = {"attention_mask": torch.ones_like(prompts), "do_sample": True, "top_k": 0}
        how |= {"max_new_tokens": cfg.new_tokens, "min_new_tokens": cfg.new_tokens}

        def peer_train():
            peer.zero_grad(set_to_none=True)
            peer(input_ids=inputs, labels=inputs).loss.backward()

        training["transformers"] = peer_train
        sampling["transformers"] = lambda: peer.generate(prompts, **how, pad_token_id=0)
    roof, n = matrix_rate(rt, cfg.repeats + 1), inputs.numel()
    found = {"training": in_turn(training, rt, cfg.repeats)}
    show("training", found["training"], f"{cfg.batch_size} rows of {cfg.context} tokens", n)
    found["sampling"] = in_turn(sampling, rt, cfg.repeats)
    remark = f"{cfg.prompts} prompts of {cfg.prompt_tokens} tokens, {cfg.new_tokens} new ones"
    show("sampling", found["sampling"], remark, cfg.prompts * cfg.new_tokens)
    roof = max(roof, matrix_rate(rt, cfg.repeats + 1))
    flop = n * flop_per_token(model.cfg, count_parameters(model)[1], cfg.context)
    share = flop / found["training"]["nanollm"] / roof
    print(f"training is {share:.1%} of the roof, {roof / 1e12:.2f} TFLOP/s in a linear layer")
    return found | {"share": share}


def peer_model(shape, rt):
    """transformers' model of the same shape."""
    import transformers

    values = config_json(shape, Tokenizer.from_bytes(), torch.float32)
    config = transformers.AutoConfig.for_model(**values | {"eos_token_id": None})
    return transformers.AutoModelForCausalLM.from_config(config).to(rt.device)


# --- GRPO ----------------------------------------------------------------------------------------

KL_COEF, CLIP, PARTS = 0.04, 0.2, 4  # on both sides; into so many parts are completions split


def share_of_even(completions):
    """A reward for each list of ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completions]


def grpo_update(cfg, rt, model, ddp_model, tokenizer, questions):
    """A function that makes one update with the next questions."""
    ref, G, questions = copy.deepcopy(model), cfg.samples, itertools.cycle(questions)
    rt.prepare(ref, train=False)
    optimizer = build_optimizer(model, TrainConfig(optimizer="adamw"), rt.scaler)

    def update():
        prompts = [tokenizer.encode(next(questions)) for _ in range(cfg.prompts)]
        completions = generate(model, prompts, cfg.new_tokens, G, pad_id=tokenizer.pad_id).lists()
        _ = [as_text(tokenizer, ids) for ids in completions]  # what most rewards read
        rewards = torch.tensor(share_of_even(completions), device=rt.device).view(-1, G)
        A = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        A = A.view(-1, 1)  # (B, 1)
        prompts = [prompt for prompt in prompts for _ in range(G)]
        rows = pad_completions(prompts, completions, tokenizer.pad_id).to(rt.device)
        parts = torch.arange(len(rows)).chunk(PARTS)
        ref_logprobs = batched_logprobs(ref, rows, parts, 1.0)  # (B, T - 1)
        for part in parts:
            mask, logprobs = rows.mask[part, 1:], completion_logprobs(ddp_model, rows[part])
            rho = torch.exp(logprobs - logprobs.detach())
            clipped = rho.clamp(1 - CLIP, 1 + CLIP)
            to_ref = ref_logprobs[part] - logprobs
            k3 = torch.exp(to_ref) - to_ref - 1
            per_token = torch.maximum(-A[part] * rho, -A[part] * clipped) + KL_COEF * k3
            rt.backward(((per_token * mask).sum(1) / mask.sum(1)).sum() / len(rows))
        optimizer.step(1.0, 1.0)

    return update


def bench_grpo(cfg, rt, model, ddp_model):
    """{"grpo": {name: seconds}} of an update."""
    tokenizer, digits = Tokenizer.from_bytes(), random.Random(cfg.seed)
    n, remark = cfg.prompts * (cfg.repeats + 1), ""
    questions = ["".join(digits.choices("0123456789", k=cfg.prompt_tokens)) for _ in range(n)]
    ours = grpo_update(cfg, rt, model, ddp_model, tokenizer, questions)
    if cfg.peer:
        precisions = ("fp32", "bf16")[: 1 + bf16_is_faster(rt.device)]
        settings = itertools.product(precisions, ("sdpa", "eager"))
        with tempfile.TemporaryDirectory() as folder:
            save_gpt(model, tokenizer, folder)
            found = {s: in_turn_with_trl(cfg, rt, folder, questions, *s, ours) for s in settings}
        fastest = min(found, key=lambda setting: found[setting]["trl"])
        times, remark = found[fastest], f"; trl in {', '.join(fastest)}"
    else:
        times = in_turn({"nanollm": ours}, rt, cfg.repeats)
    rows = f"{cfg.prompts} prompts, {cfg.samples} completions each, of {cfg.new_tokens} tokens"
    show("GRPO update", times, rows + remark)
    return {"grpo": times}


def in_turn_with_trl(cfg, rt, folder, questions, precision, attention, ours):
    """As in_turn: trl's GRPOTrainer on the model in `folder`, and after each of its updates ours.
    An update of trl's goes from the end of ours to its next on_step_end, generation included.
    """
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    ends = []  # of trl's update, of ours, of trl's ...

    class Turns(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(clock(rt.device))
            ours()
            ends.append(clock(rt.device))

    args = GRPOConfig(
        output_dir=folder,
        max_steps=cfg.repeats + 1,
        per_device_train_batch_size=cfg.prompts * cfg.samples // PARTS,
        gradient_accumulation_steps=PARTS,
        num_generations=cfg.samples,
        max_completion_length=cfg.new_tokens,
        generation_kwargs={"min_new_tokens": cfg.new_tokens},
        loss_type="grpo",
        beta=KL_COEF,
        epsilon=CLIP,
        bf16=precision == "bf16",
        model_init_kwargs={"attn_implementation": attention},
        gradient_checkpointing=False,  # trl's default, True, costs a forward pass
        use_cpu=rt.device.type == "cpu",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        folder,
        reward_funcs=lambda completion_ids, **_: share_of_even(completion_ids),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": questions}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[Turns],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    seconds = [end - begin for begin, end in itertools.pairwise(ends)][1:]  # trl's, ours, trl's ...
    return {"nanollm": statistics.median(seconds[1::2]), "trl": statistics.median(seconds[::2])}


# --- all of it -----------------------------------------------------------------------------------


def main(cfg):
    """Measures and prints; returns {measurement: {name: seconds}}, and the share of the roof."""
    if cfg.peer and (cfg.peer == "trl") != (cfg.preset == "grpo"):
        raise UserError("--peer trl goes with --preset grpo, --peer transformers with the others")
    if cfg.peer and not find_spec(cfg.peer):
        raise UserError(f"{cfg.peer} must be installed: pip install -r requirements-dev.txt")
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    shape = GPTConfig(
        vocab_size=cfg.vocab_size,
        max_position_embeddings=max(cfg.context, cfg.prompt_tokens + cfg.new_tokens),
        **shape_of(cfg),
    )
    model = GPT(shape)
    ddp_model = rt.prepare(model, cfg.compile)
    where = f"{torch.get_num_threads()} CPU threads"
    if rt.device.type == "cuda":
        where = torch.cuda.get_device_name(rt.device)
    print(f"{count_parameters(model)[0]:,} parameters in {rt.dtype_name} on {where}", flush=True)
    bench = bench_grpo if cfg.preset == "grpo" else bench_speed
    found = bench(cfg, rt, model, ddp_model)
    if memory := peak_memory(rt.device):
        print(f"peak memory {memory / 2**30:.2f} GiB" + ", the peer's included" * bool(cfg.peer))
    rt.close()
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cli(main, Config, PRESETS)
