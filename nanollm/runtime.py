"""Where and how a script computes: device, precision, seeds, and several processes under torchrun.

Every script begins with `rt = start(cfg.device, cfg.dtype, cfg.seed)` and ends with `rt.close()`.
Data parallelism (Li et al. 2020, arXiv:2006.15704): each process computes the gradient of its share
of the batch, DistributedDataParallel averages them, so N processes take the step that one would.
"""

import functools
import os
import random
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanollm.config import UserError, leave

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Runtime:
    device: torch.device
    dtype: torch.dtype  # what the layers compute in; weights and optimizer state stay fp32
    rank: int = 0  # the number of this process
    world: int = 1  # how many there are
    scaler: torch.amp.GradScaler = field(init=False)  # keeps fp16 gradients from vanishing

    def __post_init__(self):
        fp16 = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

    @property
    def main(self):
        """True in the one process that prints and writes."""
        return self.rank == 0

    @property
    def dtype_name(self):
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def print(self, *args):
        if self.main:
            print(*args, flush=True)

    def prepare(self, model, compile=False, train=True):
        """The model to call in training: on the device, in the precision, compiled, data-parallel.
        One that isn't trained stays with each process.
        """
        model.to(self.device).train(train)
        model.compute_dtype = self.dtype
        ddp_model = torch.compile(model) if compile else model
        if self.world > 1 and train:
            ids = [self.device.index] if self.device.type == "cuda" else None
            ddp_model = DistributedDataParallel(ddp_model, device_ids=ids)
        return ddp_model

    def micro_batches(self, rows, parts, ddp_model):
        """Yield `rows` (anything that len() and an index tensor work on) in so many parts, of which
        only the last one's backward pass sends gradients to the other processes.
        """
        numbers = torch.arange(len(rows)).chunk(parts)
        for i, part in enumerate(numbers):
            if isinstance(ddp_model, DistributedDataParallel):
                ddp_model.require_backward_grad_sync = i + 1 == len(numbers)
            yield rows[part]

    def backward(self, loss):
        """Backward pass of a loss whose sum over parts and processes is the loss of the batch;
        returns it without its graph.
        """
        # DDP takes the mean over processes where we want the sum
        self.scaler.scale(loss * self.world).backward()
        return loss.detach()

    def sum(self, value):
        """Sum of a number over all processes, as a float."""
        if self.world == 1:
            return float(value)
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def gather(self, values):
        """The lists of all processes as one, in the order of their ranks."""
        if self.world == 1:
            return values
        gathered = [None] * self.world
        dist.all_gather_object(gathered, values)
        return [value for each in gathered for value in each]

    def mine(self, n):
        """This process's part of n rows, shared as evenly as possible: a slice."""
        return slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def share(self, n):
        """As `mine`, for a batch, whose n rows must divide evenly."""
        if n % self.world:
            raise UserError(
                f"{n} rows per step can't be shared by {self.world} processes; change --batch_size"
            )
        return self.mine(n)

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
    """Set up this process; reads RANK, WORLD_SIZE and LOCAL_RANK when torchrun started it. dtype:
    bf16, fp16, fp32, or auto for what the device multiplies fastest.
    """
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
    if dtype == "auto":
        dtype = "bf16" if bf16_is_faster(device) else "fp32"
    return Runtime(device, DTYPES[dtype], rank, world)


def pick_device(name):
    """A torch.device from "auto" (a GPU if there is one, else the CPU) or a name such as "cuda:1"
    or "mps".
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # what torch raises of one that isn't here
        message = f"--device {name}: torch sees no such device here; use cpu or auto"
        raise UserError(message) from None


# --- precision -----------------------------------------------------------------------------------


@functools.cache
def bf16_is_faster(device):
    """Does a matrix product take less time in bf16 than in fp32? Measured, in some milliseconds:
    processors that emulate bf16 are up to a hundred times slower, and don't say so. Of several
    processes each would measure something else, so the first one's answer counts.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    faster = torch.tensor(float(speed_up_of_bf16(device) > 1.2))
    if dist.is_initialized():
        dist.broadcast(faster, 0)
    return bool(faster)


def speed_up_of_bf16(device, n=256, turns=5):
    """How many times faster an (n, n) product is in bf16: the best of a few turns of each."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for turn in range(turns + 1):
        for dtype in best:
            x = torch.ones(n, n, dtype=dtype, device=device)
            begin = clock(device)
            x @ x
            seconds = clock(device) - begin
            if turn:  # the first is a warm-up
                best[dtype] = min(best[dtype], seconds)
            elif dtype == torch.bfloat16 and seconds > 0.1:  # emulated: no need to look again
                return 0.0
    return best[torch.float32] / best[torch.bfloat16]


# --- state, memory and speed ---------------------------------------------------------------------


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
    resident; None where the system doesn't tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def flop_per_token(cfg, matrix_parameters, context):
    """FLOP that training spends per token: 6 per parameter, and 12 * layers * H * D * T / 2 for
    causal attention.

    Kaplan et al. 2020 (arXiv:2001.08361), table 1; Chowdhery et al. 2022 (2204.02311), appendix B.
    """
    attention = cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim * context
    return 6 * matrix_parameters + 6 * attention


def clock(device):
    """Seconds, after the device has finished what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
