"""Where and how a script computes: device, precision, seeds, and several processes under torchrun.

Every script begins with `rt = start(cfg.device, cfg.dtype, cfg.seed)` and ends with `rt.close()`.
Data parallelism (Li et al. 2020, arXiv:2006.15704): each process computes the gradient of its share
of the batch, DistributedDataParallel averages them, so N processes take the step that one would.
"""

import contextlib
import os
import random
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanollm.config import UserError, leave

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DATASHEET_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "4090": 165,
    "3090": 71,
}  # bf16, dense


@dataclass
class Runtime:
    device: torch.device
    dtype: torch.dtype  # what the layers compute in; weights and optimizer state stay fp32
    rank: int = 0  # the number of this process
    world: int = 1  # how many there are

    @property
    def main(self):
        """True in the one process that prints and writes."""
        return self.rank == 0

    def print(self, *args):
        if self.main:
            print(*args, flush=True)

    def prepare(self, model, compile=False, train=True):
        """The model as it's called in training: on the device, in the precision, compiled, data-
        parallel. One that isn't trained stays with each process.
        """
        model.to(self.device).train(train)
        model.compute_dtype = self.dtype
        called = torch.compile(model) if compile else model
        if self.world > 1 and train:
            ids = [self.device.index] if self.device.type == "cuda" else None
            called = DistributedDataParallel(called, device_ids=ids)
        return called

    def accumulating(self, model, more):
        """Context for a backward pass after which `more` follow before the step: gradients aren't
        sent yet.
        """
        return model.no_sync() if more and self.world > 1 else contextlib.nullcontext()

    def sum(self, value):
        """Sum of a number over all processes."""
        if self.world == 1:
            return value
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def scaler(self):
        """Gradient scaler, which keeps fp16 gradients from vanishing; it does nothing in other
        precisions.
        """
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def share(self, n):
        """This process's part of n rows: slice for indexing; n must divide evenly."""
        if n % self.world:
            raise UserError(
                f"{n} sequences per step can't be shared by {self.world} processes; change "
                f"--batch_size"
            )
        size = n // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        """The last call of a script. Processes that torchrun started leave together, and end here,
        as config.leave says.
        """
        if self.world == 1:
            return
        dist.barrier()  # one that is still busy keeps those that it talks with
        if self.device.type == "cuda":
            dist.destroy_process_group()
        leave(0)


def start(device="auto", dtype="auto", seed=0):
    """Set up this process; reads RANK, WORLD_SIZE and LOCAL_RANK when torchrun started it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    random.seed(seed)
    torch.manual_seed(seed)
    return Runtime(device, pick_dtype(dtype, device), rank, world)


def pick_device(name):
    """A torch.device from "auto" (a GPU if there is one, else the CPU) or a name such as "cuda:1".
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda asked for, but torch sees no GPU; use --device cpu or auto")
    return device


def pick_dtype(name, device):
    """A torch.dtype from "auto" (bf16 where the hardware multiplies in it, else fp32), "bf16",
    "fp16" or "fp32".
    """
    if name == "auto":
        name = "bf16" if has_bf16(device) else "fp32"
    if name not in DTYPES:
        raise UserError(f"unknown precision {name!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def has_bf16(device):
    """True where bf16 matrix products run in hardware: Ampere GPUs and later, CPUs with
    avx512_bf16.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        return "avx512_bf16" in f.read()
    return False


def rng_state(device):
    """The state of every global random generator, to be saved in a checkpoint."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state, device):
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def peak_memory(device):
    """Bytes: the most that the GPU's allocator held, or on a CPU the most that the process had
    resident.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flop_per_token(cfg, matrix_parameters, context):
    """FLOP that training spends per token: 6 per parameter, and 12 * layers * H * D * T / 2 for
    causal attention.

    Kaplan et al. 2020 (arXiv:2001.08361), table 1; Chowdhery et al. 2022 (2204.02311), appendix B.
    """
    attention = cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim * context
    return 6 * matrix_parameters + 6 * attention


def model_flops_utilisation(tokens_per_second, flop, device, world=1):
    """MFU: share of the GPU's datasheet bf16 rate that the training arithmetic reaches; None for
    unknown hardware.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((tflops for key, tflops in DATASHEET_TFLOPS.items() if key in name), None)
    return None if peak is None else tokens_per_second * flop / (peak * 1e12 * world)


def clock(device):
    """Seconds, after the device has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
