"""What train.py does with its options before a stage: defaults, refusals, the lock on a run folder.

`o` and `shape` stand for the dataclasses Train and Shape of train.py: options by name.
"""

import errno
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError

import zoo
from rcd import check
from zoo import tokenizer
from zoo.decoding import RENAMED, Carry, carry_options
from zoo.files import locked
from zoo.rivals import ABSENT, carries
from zoo.rivals import RECIPES as RIVALS
from zoo.tools import distributed

# ---- Options

# A resumed run may change these: where it runs and what it shows. All other options decide its weights.
FREE = {"resume", "overwrite", "force", "name", "stage", "device", "preset", "eval_every", "eval_items",
        "test_items", "options", "log", "plan", "shard", "offload", "save_every"}  # fmt: skip
# Stage -> the options that only later stages read.
LATER = {"target": set(), "reference": {f.name for f in fields(Carry)}}
LATER["reference"] |= {"recipe", "absent", "buffer", "budget", "grow", "window", "reference"}
LATER["base"] = LATER["reference"] | {"steps", "weighting", "lora"}
# What versions did that had no such option.
EARLIER = {"lora": 0, "weighting": "1/t", "adam": "float32", "residual_epsilon": 0.0, "budget": 0,
           "grow": False}  # fmt: skip


def command(resume: bool = False, program: str = "train.py") -> str:
    """The command line of this run, to be typed again. program: train.py, or -m and a module."""
    typed = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite")]
    return shlex.join([*distributed.launcher(), *program.split(), *typed, *(["--resume"] if resume else [])])


def frozen(options: dict, dtype: torch.dtype, unread: Iterable[str]) -> dict[str, str]:
    """The options that must be equal for a resumed stage to give the same weights. unread: it reads none of
    these."""
    kept = {k: str(v) for k, v in options.items() if k not in FREE and k not in unread}
    return kept | {"dtype": str(dtype)}


def options_of(name: str, *groups: type) -> dict:
    """The options of an earlier run from its train.json, as defaults for the fields of these dataclasses.

    name: a folder, a run or a model; "" = no options. A line on stderr names options which this version calls
    otherwise, and those it does not have. Raises ValueError or OSError for what is no such file.
    """
    path = zoo.find(name) / "train.json" if name else None
    stored = zoo.read_json(path).get("options") if name else {}
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: it holds no options")
    kinds = {f.name: type(f.default) for cls in groups for f in fields(cls)}
    values, unknown = carry_options(stored), [k for k in carry_options(stored) if k not in kinds]
    told = [f"{old} is now {new}" for old, new in RENAMED.items() if old in stored]
    told += [f"no option of this version, left out: {k}={values[k]}" for k in unknown]
    for line in told:
        print(f"{path}: {line}", file=sys.stderr)
    values = {k: v for k, v in values.items() if k not in (*unknown, "resume", "overwrite", "options")}
    values = {k: v for k, v in EARLIER.items() if values and k in kinds} | values
    for k, v in values.items():
        if type(v) is not kinds[k] and (type(v), kinds[k]) != (int, float):
            raise ValueError(f"{path} is damaged: {k}={v!r} is no {kinds[k].__name__}")
    return values


def defaults(groups: tuple[type, ...], dataset_of: Callable, typed: dict) -> dict:
    """Defaults of train.py: those of --options, and what they and the typed options imply for the data set.

    A recipe that is typed brings its own residual, not that of --options. dataset_of: name -> data.Dataset.
    Raises ValueError as options_of and implied do.
    """
    given = options_of(typed.get("options", ""), *groups)
    recipe = typed.get("recipe", "paper" if typed.get("reference") else given.get("recipe"))
    if recipe != given.get("recipe"):
        its = {"recipe", "absent", "budget", "grow", "window", "reference"} | {f.name for f in fields(Carry)}
        given = {k: v for k, v in given.items() if k not in its}
    values = given | typed
    return implied(values, dataset_of(values.get("data", groups[0].data))) | given


# Recipe -> the weight of the residual, unless --weight says. Eq. 3's is small for what is nearly sure but not
# committed yet. On trajectories a fixed half needs fewer passes by a threshold, and costs accuracy where
# there are many: ten points where 40 tokens are to fill.
RECIPES = {
    "trajectory": {"weight": "entropy"},
    "paper": {"weight": "entropy"},
    "earlier": {"weight": "fixed", "fixed": 0.5},
    **RIVALS,
}


def implied(typed: dict, dataset) -> dict:
    """Defaults that the typed options and the data.Dataset imply.

    A trajectory takes as many training steps as denoising steps, and the more it takes, the fewer canvases it
    shows. So it has 8 at most, and where 64 tokens or more are to fill there are none. Raises ValueError for
    a weight and a recipe that do not go together.
    """
    response = dataset.response("train")
    short = response is not None and response[:1024].sum(1).mean() < 64
    recipe = typed.get("recipe", "paper" if typed.get("reference") else "trajectory" if short else "earlier")
    budget = 8 if carries.on_trajectories(recipe) else 0
    own, weight = carries.name_of(recipe) in carries.OWN, typed.get("weight", "")
    check(own or weight != "learned", f"weight=learned is for recipes that train a carry, not {recipe}")
    check(not own or weight in ("", "learned"), f"recipe={recipe} trains its own carry: leave --weight out")
    check(weight != "remix" or typed.get("window", 1) == 1,
          "weight=remix passes no gradient on: it goes with --window=1")
    absent, test_items = (ABSENT | {"earlier": 0.3}).get(recipe, 0.0), 500 if short else 16
    more = {"absent": absent, "budget": budget, "test_items": test_items}
    return {"recipe": recipe, **RECIPES.get(recipe, {}), **more}


# The largest values of what is built or run one by one, and of shares. The memory estimate bounds the rest.
LIMITS = {"n_layer": 1000, "buffer": 1000, "window": 1000, "batch_size": 1 << 20, "warmup": 1, "ema": 1}


def fill_zeros(preset: dict, *groups: object) -> None:
    """Set every field that is 0 to the preset's value. Raises ValueError as check_numbers does."""
    for group in groups:
        for f in fields(group):
            if f.name in preset and not getattr(group, f.name):
                setattr(group, f.name, preset[f.name])
        check_numbers(group)


def check_numbers(o) -> None:
    """Raises ValueError for a number below 0 or above its limit, and for a dtype that is not trained in."""
    for f in fields(o):
        value = getattr(o, f.name)
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{f.name}={value} must not be negative")
        if f.name in LIMITS and value > LIMITS[f.name]:
            raise ValueError(f"{f.name}={value} must be at most {LIMITS[f.name]:,}")
    if getattr(o, "dtype", "") == "float16":
        raise ValueError("dtype=float16 would need loss scaling: train in bfloat16 or float32")


def check_choices(o, choices: dict[str, Iterable[str]]) -> None:
    """Raises ValueError for an option that is none of its choices."""
    for name, among in choices.items():
        if getattr(o, name) not in among:
            raise ValueError(f"{name}={getattr(o, name)!r}: choose from {', '.join(filter(None, among))}")


def check_options(o, block_size: int) -> None:
    """Raises ValueError for options that contradict each other. block_size: that of --block_size."""
    trajectory = carries.on_trajectories(o.recipe)
    for wrong, says in (
        (o.reference and o.recipe != "paper",
         f"--reference is read by --recipe=paper; recipe={o.recipe} needs none"),
        (not 1 <= o.accumulate <= o.batch_size,
         f"accumulate={o.accumulate} must lie between 1 and batch_size={o.batch_size}"),
        (o.batch_size // max(1, o.accumulate) < distributed.environment("WORLD_SIZE"),
         f"batch_size={o.batch_size} in {o.accumulate} pieces has no row for each of "
         f"{distributed.environment('WORLD_SIZE')} processes: raise --batch_size, or lower --accumulate"),
        (not 0 <= o.absent < 1, f"absent={o.absent} must lie in [0, 1)"),
        (o.absent and trajectory, f"--absent does nothing for recipe={o.recipe}, which starts without a "
         "residual anyway: leave it out"),
        (o.absent and o.recipe == "loop", "--absent does nothing for recipe=loop, which reads no residual: "
         "leave it out"),
        (min(o.window, o.buffer) < 1, f"window={o.window} and buffer={o.buffer} must be at least 1"),
        (o.weighting == "complementary" and trajectory and o.stage in ("all", "target"),
         "--weighting=complementary masks canvases twice, a trajectory is one: choose another --recipe"),
        (o.budget == 1, "budget=1: a trajectory has at least 2 steps, or with 0 one a token"),
        (o.budget and not trajectory, f"--budget is read by recipes on trajectories, not by {o.recipe}"),
        (o.grow and not trajectory, f"--grow is read by recipes on trajectories, not by {o.recipe}"),
        (o.grow and o.budget == 2, "--grow begins with 2 steps: --budget=2 leaves nothing to grow to"),
        (o.window > 1 and not trajectory, f"--window is read by recipes on trajectories, not by {o.recipe}"),
        (o.t_per == "block" and not (block_size or o.init_from),
         "--t_per=block needs a block-causal model: --block_size=b"),
        (o.shard == "full" and distributed.processes() == 1,
         "--shard=full shares a model out to several processes: torchrun --nproc_per_node=N train.py ..."),
        (o.offload and o.shard != "full",
         "--offload keeps each process's part of a model on the host: it goes with --shard=full"),
        (o.lora and o.shard == "full", "--lora is for a model that fits into a process: choose --shard=none"),
        (carries.name_of(o.recipe) in carries.LEARNED and (o.lora or o.shard == "full"),
         f"recipe={o.recipe} has parameters of its own: it takes neither --lora nor --shard=full"),
        (o.init_from and o.stage == "base",
         "--stage=base trains a base from scratch; with --init_from choose --stage=reference, target or all"),
        (o.log and not find_spec(o.log),
         f"--log={o.log} needs a package that is not here: pip install -e '.[{o.log}]'"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(says)


def check_tokens(dataset, init_from: str, reference: str) -> None:
    """Raises ValueError if the data set is not in the tokens of the models that are named ("" = none)."""
    prepared = dataset.tokenizer.fingerprint
    if init_from and tokenizer.load(zoo.find(init_from)).fingerprint != prepared:
        remedy = f": prepare it again with --tokenizer={zoo.find(init_from)}"
        remedy = "" if isinstance(dataset.tokenizer, tokenizer.CharTokenizer) else remedy
        raise ValueError(f"data set {dataset.name} is not in the tokens of {init_from}{remedy}")
    if reference and tokenizer.load(zoo.find(reference)).fingerprint != prepared:
        raise ValueError(f"data set {dataset.name} is not in the tokens of the reference {reference}")


def check_done(folder: Path, options: dict, other: Iterable[str]) -> None:
    """Raises ValueError if a stage that is there was trained with other options than these; `other` are those
    that its weights do not depend on. A dtype counts if it was typed."""
    meta = zoo.read_json(folder / "train.json")
    then = EARLIER | carry_options(meta.get("options", {}))
    then["dtype"] = meta.get("dtype", then.get("dtype")) if options["dtype"] else ""
    check_same(folder, then, {k: v for k, v in options.items() if k in then and k not in (*FREE, *other)})


def check_same(folder: Path, then: dict, now: dict) -> None:
    """Raises ValueError if a stage was trained with other options than those of `now`."""
    pairs = [(k, str(then.get(k)), str(v)) for k, v in now.items()]
    changed = [f"{k}={old or 'none'} (now {new or 'none'})" for k, old, new in pairs if old != new]
    remedy = "give the same ones, --name=NAME, or --overwrite"
    check(not changed, f"{folder} was trained with other options: {', '.join(changed)}; {remedy}")


# The last state of a stage, and the one before it: a file, or a folder if the model is sharded.
STATE, BEFORE, SHARDS, SHARDS_BEFORE = (
    "state.safetensors", "state.before.safetensors", "state.shards", "state.before.shards",
)  # fmt: skip


def states(folder: Path) -> list[Path]:
    """What a stage can be resumed from, the newest first."""
    found = [folder / n for n in (STATE, SHARDS, BEFORE, SHARDS_BEFORE) if (folder / n).exists()]
    return sorted(found, key=lambda path: ("before" in path.name, -path.stat().st_mtime))


def remove_states(folder: Path) -> None:
    """A stage has ended, or begins anew: nothing resumes it any more."""
    for path in (*states(folder), *folder.glob("not-finite.*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def begin_anew(folder: Path, stages: tuple[str, ...], o) -> None:
    """Without --resume a stage begins anew, and so do the later ones that are asked for: what --overwrite
    left of them would be taken for finished by a later --resume."""
    for stage in stages[stages.index(folder.name) :] if not o.resume else ():
        if o.stage in (stage, "all"):
            (folder.parent / stage / "train.json").unlink(missing_ok=True)  # it marks the end of a stage
            remove_states(folder.parent / stage)


def check_folder(root: Path, stages: list[str], o) -> None:
    """Raises ValueError for stages that are there already, unless they are to be resumed or overwritten."""
    found = ", ".join(s for s in stages if (root / s / "train.json").exists() or states(root / s))
    if found and not (o.resume or o.overwrite):
        ways = "--resume goes on, --overwrite starts again, --name=NAME keeps both"
        raise ValueError(f"{root} already holds {found}: {ways}")
    kept = ", ".join(p.parent.name for p in sorted(root.glob("*/train.json")) if p.parent.name not in stages)
    if kept and o.overwrite and not o.resume and {"base", "dfm"} & {*stages}:
        ways = "--stage=all makes them anew, --name=NAME keeps both"
        raise ValueError(f"{root} holds {kept}, trained from what --overwrite replaces: {ways}")


# What the system says if it will not write: no permission, a read-only file system, no room, no folder.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
           errno.EEXIST, errno.ENOTDIR)  # fmt: skip


@contextmanager
def claimed(root: Path, program: str = "train.py"):
    """The run folder, for this run alone: see locked(), whose ValueError process 0 raises. OSError, in one
    line, if something cannot be written there."""
    remedy = "choose --name=NAME"
    with ExitStack() as held:
        try:
            distributed.once(lambda: held.enter_context(locked(root, command(program=program), remedy)))
            yield
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and error.errno not in REFUSED:
                raise
            kept = "what was saved before is still there; mend that, then go on with"
            raise OSError(f"cannot write to {root}: {error}; {kept}: {command(True, program)}") from None


def quick_attention(device: torch.device, length: int) -> None:
    """For short canvases on a CPU: no fused attention, whose bfloat16 backward is slow there.

    256 canvases of 36 tokens, 4 heads of 32, forward and backward, on two cores of an AMD EPYC, torch 2.13:
    63 ms fused, 7 ms as two matmuls and a softmax.
    """
    if device.type == "cpu" and length <= 512:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
