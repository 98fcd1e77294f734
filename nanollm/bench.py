"""How fast it is, and beside what: training and sampling tokens per second, memory, share of the
hardware's peak.

Run     python -m nanollm.bench                        # a 1M-parameter model
        python -m nanollm.bench --peer transformers    # beside transformers, same shape, same run
        python -m nanollm.bench --preset gpu           # 124M parameters, context 1024, batch 256

Medians of --repeats runs. With --peer the two take turns, so that a machine whose speed drifts
slows both; the peer computes in fp32 eagerly, as its examples do. The roofline is measured: the
rate of one large matrix product.
"""

import json
import os
import statistics
from dataclasses import dataclass
from typing import Literal

import torch

from nanollm.config import UserError, cli
from nanollm.generate import generate
from nanollm.gpt import GPT, GPTConfig, count_parameters
from nanollm.hub import config_json
from nanollm.logprobs import token_logprobs
from nanollm.optim import build_optimizers
from nanollm.runtime import clock, flop_per_token, model_flops_utilisation, peak_memory, start
from nanollm.tokenizer import Tokenizer


@dataclass
class Config:
    preset: str = "tiny"  # tiny: the shape of the default pretraining run; gpu: 124M parameters
    what: Literal["all", "train", "sample", "step"] = "all"  # which measurements
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
    # -- How
    peer: Literal["transformers"] | None = None  # measure it too; it must be installed
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
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--peer transformers needs it installed: pip install -r requirements-dev.txt"
        ) from None
    values = config_json(shape, Tokenizer.from_bytes(), torch.float32) | {
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = transformers.AutoConfig.for_model(**values)
    return transformers.AutoModelForCausalLM.from_config(config).to(rt.device)


def training_work(model, called, tokens, optimizers=None):
    """One forward and backward pass of ours, and the optimizer's step where one is given."""
    scaler = torch.amp.GradScaler(tokens.device.type, enabled=False)

    def work():
        model.zero_grad(set_to_none=True)
        (-token_logprobs(called(tokens[:, :-1]), tokens[:, 1:]).mean()).backward()
        if optimizers:
            optimizers.step(scaler)

    return work


def main(cfg):
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
    called = rt.prepare(model, cfg.compile)
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
    peer = peer_model(shape, rt) if cfg.peer else None
    figures = {
        "parameters": total,
        "dtype": str(rt.dtype),
        "device": where,
        "roof_flop_per_second": roof,
    }
    if cfg.what in ("all", "train", "step"):
        figures |= bench_training(cfg, rt, model, called, peer, matrices, roof)
    if cfg.what in ("all", "sample"):
        figures |= bench_sampling(cfg, rt, model, peer)
    figures["peak_memory_bytes"] = peak_memory(rt.device)
    print(f"peak memory {figures['peak_memory_bytes'] / 2**30:.2f} GiB")
    if cfg.json:
        with open(cfg.json, "w") as f:
            json.dump(figures, f, indent=2)


def bench_training(cfg, rt, model, called, peer, matrices, roof):
    tokens = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.context + 1), device=rt.device)
    n = cfg.batch_size * cfg.context
    optimizers = build_optimizers(model) if cfg.what == "step" else None
    works = {"nanollm": training_work(model, called, tokens, optimizers)}
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


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cli(main, Config, PRESETS)
