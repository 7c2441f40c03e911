"""Several processes train one model: `torchrun --nproc_per_node=N train.py ...`, one process for each GPU.

A batch is the same for every number of processes. Each of them draws all of it, with its noise, from the
seeds of the step, and keeps its own rows: process 0 the first ones, and so on. DDP adds up the gradients. So
N processes take the steps that one would take, but for the order in which float32 numbers are added.

Everything here also holds for one process without torchrun: it has all the rows and waits for nobody.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from rcd import Config, Residual, Transformer
from zoo.recipes import Fresh, Trajectories

PATIENCE = datetime.timedelta(hours=2)  # the others wait while process 0 writes a large model


def environment(name: str) -> int:
    """What torchrun says: RANK, WORLD_SIZE, LOCAL_RANK, ...; 0 without it."""
    return int(os.environ.get(name, 0))


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launcher() -> list[str]:
    """The words before train.py that start as many processes as there are now."""
    nodes = environment("GROUP_WORLD_SIZE")
    if environment("WORLD_SIZE") < 2:
        return ["python"]
    machines = [f"--nnodes={nodes}"] if nodes > 1 else []
    return ["torchrun", *machines, f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', processes())}"]


# ---- Start and end


def together(main: Callable[[], None], go_on: str = "") -> Callable[[], None]:
    """main, run side by side by the processes that torchrun started; as it is without torchrun.

    All come to the same messages: process 0 prints them, and the first process of a machine its mistakes.
    torchrun ends all processes when one dies. The first that notices says so, and what to type to go_on.
    """

    def joined() -> None:
        local, gpus = environment("LOCAL_RANK"), torch.cuda.device_count()
        if environment("RANK"):
            sys.stdout = open(os.devnull, "w")
        if local:
            sys.stderr = open(os.devnull, "w")
        if local < gpus:
            torch.cuda.set_device(local)  # which "cuda" is
        elif gpus and "--device=cpu" not in sys.argv:
            wanted = f"--nproc_per_node={environment('LOCAL_WORLD_SIZE')}"
            raise ValueError(f"{wanted}, but this machine has {gpus} GPUs: start one process for each")
        store, number, size = next(rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE, store=store,
                                rank=number, world_size=size)  # fmt: skip
        try:
            main()
        except RuntimeError as error:
            words = ("gloo", "NCCL", "onnection")
            lost = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
            if not lost or store.add("told", 1) == 1:
                sys.stderr = sys.__stderr__
            if lost:
                then = f"; go on with: {go_on}" if go_on else ""
                raise ConnectionError(f"another process of this run has ended{then}") from None
            raise
        except OSError as error:
            if error.errno:  # of this machine alone: what is wrong everywhere has none
                sys.stderr = sys.__stderr__
            raise
        finally:
            dist.destroy_process_group()

    return joined if environment("WORLD_SIZE") > 1 else main


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if processes() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return int(total(torch.tensor(int(flag)))) > 0


def once(work: Callable[[], None]) -> None:
    """Process 0 does it, and the others wait for it. If it fails there, they end without a word."""
    failed = None
    if rank() == 0:
        try:
            work()
        except Exception as error:
            failed = error
    if anyone(failed is not None):
        raise failed or SystemExit(2)


# ---- Rows


def share(n: int, of: int | None = None) -> slice:
    """The rows of n that belong to process `of`, default: this one."""
    r, size = rank() if of is None else of, processes()
    return slice(n * r // size, n * (r + 1) // size)


def own(tokens: Tensor, response: Tensor, positions: Tensor | None, t: Tensor, noise: Generator):
    """This process's rows of a piece (n, T) that all of them drew alike: tokens, response, positions, and t
    and draws by name, as diffusion_loss takes them. Rows of no answer count as answers: they have no weight,
    but the others wait for their gradient."""
    mine, shapes = share(len(tokens)), (tokens.shape, (len(tokens), 2))
    draws = tuple(torch.rand(s, generator=noise, device=tokens.device)[mine] for s in shapes)
    learned = response[mine] if processes() == 1 or response[mine].any() else torch.ones_like(response[mine])
    rows = tokens[mine], learned, None if positions is None else positions[mine]
    return rows, {"t": t[mine], "draws": draws}


def gather(x: Tensor, n: int) -> Tensor | None:
    """All n rows in process 0, on the host; x are those of this process. None in the others."""
    if processes() == 1:
        return x
    if rank():
        dist.send(x.cpu().contiguous(), 0)
        return None
    whole = torch.empty(n, *x.shape[1:], dtype=x.dtype)
    whole[share(n)] = x.cpu()
    for other in range(1, processes()):
        dist.recv(whole[share(n, other)], other)
    return whole


class SharedTrajectories(Trajectories):
    """This process's rows of `rows` trajectories. New canvases are drawn for all processes together, those of
    process 0 first, as one process would draw them."""

    def __init__(self, config: Config, rows: int, length: int, device: torch.device | str = "cpu",
                 packed: bool = False, window: int = 1):  # fmt: skip
        self.rows, self.mine = rows, share(rows)
        super().__init__(config, self.mine.stop - self.mine.start, length, device, packed, window)

    def step(self, model: Transformer, fresh: Fresh, residual: Residual, generator: Generator) -> Tensor:
        if processes() == 1:
            return super().step(model, fresh, residual, generator)
        empty = torch.zeros(processes(), dtype=torch.long)
        empty[rank()] = int((~self.state["masked"].any(dim=1)).sum())
        empty = total(empty).tolist()  # in every process
        start, n = sum(empty[: rank()]), sum(empty)
        new, mine = fresh(n) if n else (), slice(start, start + empty[rank()])
        self.drawn = super().draws(n, generator)[:, mine]
        rows = [x if x is None else x[mine] for x in new]
        return super().step(model, lambda _: rows, residual, generator)

    def draws(self, n: int, generator: Generator) -> Tensor:
        return super().draws(n, generator) if processes() == 1 else self.drawn

    def size(self) -> Tensor:
        return total(super().size())


# ---- Gradients


class Loss(nn.Module):
    """A loss as the forward of a module, so that DDP sees every use of the weights."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[[], Tensor]) -> Tensor:
        return loss()


def parallel(model: Transformer) -> Callable[[Callable[[], Tensor], bool], Tensor]:
    """f(loss, last) -> loss(), whose backward sums the gradients over all processes. last: of its batch;
    before it nothing is exchanged."""
    if processes() == 1:
        return lambda loss, last: loss()
    if model.embedding.device.type == "mps":
        raise ValueError("several processes need CUDA, or --device=cpu")
    experts = any(hasattr(layer.mlp, "experts") for layer in model.layers)  # not all of them meet a token
    module = DistributedDataParallel(Loss(model), gradient_as_bucket_view=True,
                                     find_unused_parameters=experts)  # fmt: skip

    module.register_comm_hook(None, summed)

    def forward(loss: Callable[[], Tensor], last: bool) -> Tensor:
        with contextlib.nullcontext() if last else module.no_sync():
            return module(loss)

    return forward


def summed(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's exchange of some gradients: their sum, not their mean. Each loss is its part of the whole one."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])
