"""Several processes train one model: `torchrun --nproc_per_node=N train.py ...`, one process for each GPU.

A batch is the same for every number of processes. Each of them draws all of it, with its noise, from the
seeds of the step, but reads the tokens of its own rows only: process 0 of the first ones, and so on. DDP adds
up the gradients, or FSDP2 if the model does not fit into one process. So N processes take the steps that one
would take, but for the order in which float32 numbers are added.

Everything here also holds for one process without torchrun: it has all the rows and waits for nobody.
"""

import contextlib
import datetime
import gc
import itertools
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from rcd import Config, Context, Noised, Residual, Transformer
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
            released(main)
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
            time.sleep(0.1)  # a thread of the group that frees its last tensor wants Python's lock, which the
            dist.destroy_process_group()  # next line may hold until that thread has ended (torch 2.6)

    return joined if environment("WORLD_SIZE") > 1 else main


def released(main: Callable[[], None]) -> None:
    """main, after which nothing of it is alive, even if it raises. A DDP that outlives its process group can
    hang: its end waits, with Python's lock, for a thread of the group that needs it to free a tensor."""
    try:
        main()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # its lines stay
        raise
    finally:
        gc.collect()  # DDP refers to itself


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if processes() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return int(total(torch.tensor(int(flag)))) > 0


def agreed(work: Callable[[], None]) -> None:
    """Every process does it, and they wait for each other. Where it fails says why; the others end without a
    word."""
    failed = None
    try:
        work()
    except Exception as error:
        failed = error
    if anyone(failed is not None):
        raise failed or SystemExit(2)


def once(work: Callable[[], None]) -> None:
    """Process 0 does it, and the others wait for it."""
    agreed(work if rank() == 0 else lambda: None)


# ---- Rows


def share(n: int, of: int | None = None) -> slice:
    """The rows of n that belong to process `of`, default: this one."""
    r, size = rank() if of is None else of, processes()
    return slice(n * r // size, n * (r + 1) // size)


def rows_of(pieces: list[int]) -> np.ndarray:
    """The rows of a batch that belong to this process: its share of each piece, of so many rows."""
    starts = itertools.accumulate(pieces, initial=0)
    return np.concatenate([start + np.arange(n)[share(n)] for start, n in zip(starts, pieces)])


def own(tokens: Tensor, response: Tensor, positions: Tensor | None, t: Tensor, noise: Generator):
    """This process's rows of a piece (n, T) that all of them drew alike: tokens, response, positions, and t
    and draws by name, as diffusion_loss takes them. Rows of no answer count as answers: they have no weight,
    but the others wait for their gradient."""
    mine, shapes = share(len(tokens)), (tokens.shape, (len(tokens), 2))
    draws = tuple(torch.rand(s, generator=noise, device=tokens.device)[mine] for s in shapes)
    learned = response[mine]
    if response.any() and not learned.any():
        learned = torch.ones_like(learned)
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
    process 0 first, as one process would draw them. Each reads its own."""

    def __init__(self, config: Config, rows: int, length: int, device: torch.device | str = "cpu", *how):
        """how: packed, window, bound, advance, budget of Trajectories."""
        self.rows, self.mine = rows, share(rows)
        super().__init__(config, self.mine.stop - self.mine.start, length, device, *how)

    def step(self, model: Transformer, fresh: Fresh, residual: Residual, generator: Generator,
             progress: float) -> Tensor:  # fmt: skip
        if processes() == 1:
            return super().step(model, fresh, residual, generator, progress)
        empty = torch.zeros(processes(), dtype=torch.long)
        empty[rank()] = int((~self.state["masked"].any(dim=1)).sum())
        empty = total(empty).tolist()  # in every process
        start, n = sum(empty[: rank()]), sum(empty)
        mine = slice(start, start + empty[rank()])
        new = fresh(n, mine) if n else ()
        self.drawn = super().draws(n, generator)[:, mine]
        rows = [x if x is None else x[mine] for x in new]
        return super().step(model, lambda _: rows, residual, generator, progress)

    def draws(self, n: int, generator: Generator) -> Tensor:
        return super().draws(n, generator) if processes() == 1 else self.drawn

    def size(self) -> Tensor:
        return total(super().size())


# ---- Weights and gradients


class Loss(nn.Module):
    """A loss as the forward of a module, so that DDP and FSDP2 see every use of the weights."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, part: Callable[[], Any]) -> Any:
        return part()


class Parallel:
    """A model that all processes train: each holds all of it (DDP), or its rows of every matrix (FSDP2).

    sharded: the rows of a process, in float32, come with their gradients and AdamW's moments. A layer is
    gathered, in dtype, while it is read. reference: a frozen model, sharded too. Both are on the meta device
    then, see fill(). offload: between its uses, all of the model that belongs to a process is on the host.
    """

    def __init__(self, model: Transformer, reference: Transformer | None, device: torch.device,
                 dtype: torch.dtype, sharded: bool, offload: bool = False):  # fmt: skip
        self.module, self.sharded = Loss(model), sharded
        experts = any(hasattr(layer.mlp, "experts") for layer in model.layers)  # not all of them meet a token
        if processes() > 1 and device.type == "mps":
            raise ValueError("several processes need CUDA, or --device=cpu")
        if sharded and experts:
            raise ValueError("--shard=full cannot train experts: choose --shard=none")
        if sharded:
            shard(model, self.module, device, dtype, offload)
            if reference is not None:
                shard(reference, reference, device, None)
        elif processes() > 1:
            self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True,
                                                  find_unused_parameters=experts)  # fmt: skip

    def loss(self, part: Callable[[], Tensor], last: bool) -> Tensor:
        """part(): this process's part of a loss. Its backward adds up the gradients of all processes.

        last: of its batch. Before it DDP exchanges nothing.
        """
        if processes() == 1:
            return part()
        with contextlib.nullcontext() if last or self.sharded else self.module.no_sync():
            loss = self.module(part)
        loss.register_hook(lambda gradient: gradient * processes())  # both take the mean over processes
        return loss

    def read(self, part: Callable[[], Any]) -> Any:
        """part(), which reads the weights and takes no gradient; in all processes at once."""
        if not self.sharded:
            return part()
        with torch.no_grad():
            found = self.module(part)
        self.module.reshard()
        return found


def shard(model: Transformer, root: nn.Module, device: torch.device, dtype: torch.dtype | None,
          offload: bool = False) -> None:  # fmt: skip
    """Layer by layer; what is in no layer belongs to the root. dtype: of gathered weights, None = as is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # Inputs keep their dtype: among them are the angles of RoPE. Gradients are added up in float32.
    reduce = None if dtype is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce, cast_forward_inputs=False)
    host = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (processes(),))
    for part in (*model.layers, root):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=host)


def gathered(context: Context, reference: Transformer) -> Context:
    """A context that reads a sharded reference: gather what belongs to no layer, and let go of it again."""

    def read(model: Transformer, n: Noised) -> tuple[Tensor, Tensor]:
        reference.unshard()
        found = context(model, n)
        reference.reshard()
        return found

    return read


def own_rows(p: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """This process's rows of a parameter, as memory to write to; and those rows of its whole value."""
    if not hasattr(p, "to_local"):
        return p, whole
    local, each = p.to_local(), -(-len(p) // processes())
    return local, whole[rank() * each :][: len(local)]


def fill(model: Transformer, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Give a sharded model on the meta device its weights: of every tensor the rows that belong here."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, whole in tensors:
            local, mine = own_rows(model.get_parameter(name), whole)
            local.copy_(mine)


def whole(model: Transformer) -> Transformer:
    """A sharded model as one on the host of process 0, on the meta device in the others."""
    with torch.device("meta"):
        joined = Transformer(model.config)
    for name, p in model.named_parameters():
        value = p.detach().full_tensor()
        if rank() == 0:
            joined.load_state_dict({name: value.cpu()}, strict=False, assign=True)
    return joined


def clip(model: Transformer, most: float) -> Tensor:
    """Scale the gradient down to this norm, over all processes and parameters; returns what it was."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ---- A state in shards: a folder of safetensors, one file of each process, and what process 0 adds


class Shards:
    """Writes a state while training goes on. Every process copies its rows to the host and writes them from
    there. When all of them have, process 0 gives the folder its name; until then the state before it stands.
    """

    def __init__(self):
        self.pending, self.thread = None, ThreadPoolExecutor(1)
        # Its own group: the processes agree on what is written while the default one adds up gradients.
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None

    def save(self, path: Path, before: Path, shards: dict[str, Tensor], more: dict[str, Tensor],
             facts: dict[str, str]) -> None:  # fmt: skip
        """Begin to write `path`; the folder that has the name is called `before` then. One state at a time:
        waits for the last one. Raises its OSError."""
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        self.wait()
        new = path.with_name(path.name + ".new")

        def begin() -> None:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            save_file(more, new / "more.safetensors", metadata=facts | {"files": str(processes() + 1)})

        def end() -> None:
            for file in new.iterdir():
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
            if path.exists():
                shutil.rmtree(before, ignore_errors=True)
                os.replace(path, before)
            os.replace(new, path)

        once(begin)
        writer = HuggingFaceStorageWriter(str(new), save_distributed=True)
        written = async_save(shards, storage_writer=writer, process_group=self.group)

        def finish() -> None:
            written.result()  # process 0 has it when all have written
            if rank() == 0:
                end()

        self.pending = self.thread.submit(finish)

    def wait(self) -> None:
        """Until what was begun is written. If it could not be, process 0 raises why; the others end."""
        from torch.distributed.checkpoint.api import CheckpointException

        def result() -> None:
            try:
                pending.result()
            except CheckpointException as error:  # the same in every process, of any: process 0 says it
                if rank() == 0:
                    raise next(iter(error.failures.values()))[0] from None

        pending, self.pending = self.pending, None
        if pending:
            agreed(result)


def facts_of_shards(path: Path) -> dict[str, str]:
    """What Shards.save() was told. Raises OSError or SafetensorError if a file is missing or was cut off."""
    with safe_open(path / "more.safetensors", "pt") as f:
        facts = f.metadata()
    files = [*path.glob("*.safetensors")]
    for file in files:
        with safe_open(file, "pt"):
            pass
    if len(files) != int(facts["files"]):
        raise OSError(f"{len(files)} of {facts['files']} files are there")
    return facts


def load_shards(path: Path, into: dict[str, Tensor]) -> None:
    """Fill these tensors, sharded over any number of processes or whole."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    load(into, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=processes() == 1)
