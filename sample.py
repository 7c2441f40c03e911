"""Fill the masks of a canvas and watch it.

What is filled. A --prompt is continued, or completed where it has masks. In a vocabulary of characters "_"
and "." are masks if they are not in it, and white space does not matter: a puzzle is typed cell by cell.
Elsewhere a mask is the character that --infill names. Without --prompt, a model that was trained on examples
gets new ones from its data set, drawn with --seed, and its answers are checked.

What is seen. Tokens in the colour of the step that committed them, the newest inverted. Masks shaded by
alpha, the weight of the residual that they carry. One line of text per step where stdout is no terminal, with
--plain and with NO_COLOR. The answer of a chat model, or of any that was not trained here, is text that
appears block by block, with the numbers on stderr; --no-stream shows its steps instead.

--prompts fills a file of prompts, one JSON object a line ({"prompt": "..."}, perhaps with a "seed"), and
writes a record of each to --out. The same command goes on where a run was killed. Where nothing is drawn at
random, lines of like length share a batch; else only the --num_samples of a line do, on the line's own seed,
so that what a line gets does not depend on the others.

--eval prints accuracy against forward passes instead: on the test split of a data set, or on a file with a
puzzle per line (the canvas with "_" for the cells to fill, white space, its solution). It tries step budgets
and thresholds, or with --rule=factor, klass, r2, wino, policy, ... values of that rule: leave these out.

A default in [brackets] gives way to what the model recommends. Without --rule, an option implies its rule:
--steps static, --threshold threshold, --entropy_bound entropy-bounded, --factor factor, --kl_bound klass,
--rescue r2, --revoke wino, --policy policy.

Examples:
  python sample.py --steps 8                            new Sudoku puzzles for the model that is shipped
  python sample.py --steps 8 --compare                  SeqD and RCD side by side
  python sample.py --steps 8 --compare --html run.html  and as a page that plays (--svg: a moving picture)
  python sample.py --prompt puzzle.txt                  a puzzle of your own, "_" or "." for an empty cell
  python sample.py --eval sudoku --plot curve.png       accuracy against forward passes
  python sample.py --prompts in.jsonl --out out.jsonl   a file of prompts
  python sample.py --model JetLM/SDAR-1.7B-Chat --prompt "Why is the sky blue?"
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages (Linux): half of a step's time is page faults

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

import data
import zoo
from data.canvases import Puzzles, canvas_of, canvases, task_of
from rcd import Step, Transformer, denoise
from zoo import speed
from zoo.decoding import Carry, Decoding
from zoo.files import check_writable, write_atomic
from zoo.rivals import carries
from zoo.tools import distributed, volume
from zoo.tools.animation import animation
from zoo.tools.command import arguments, autocast, pick_device, run
from zoo.tools.evaluate import Setting, evaluate, load_reference, plot, recommended, sweep, table
from zoo.tools.viewers import Stream, Terminal, Trace, Watched, page


@dataclass
class Options:
    """what is filled, by which model, and how it is shown"""

    model: str = "sudoku/target"  # run folder, name of a run under out/ or of a model in zoo/, or id on the
    # Hugging Face hub
    prompt: str = ""  # a text, a file, or - for stdin
    prompts: str = ""  # a file of prompts, one JSON object a line; instead of sampling to the screen
    out: str = ""  # --prompts: the file of records, one JSON object a line
    infill: str = ""  # a character of the prompt that stands for one masked token
    max_new: int = 0  # tokens to add to a prompt without masks; 0 = as many as the canvas holds, at most 256
    num_samples: int = 1  # how many canvases; --prompts: of each line
    batch_size: int = 16  # canvases that are filled at once (--eval: eight times as many)
    reference: str = ""  # the model of --start=warm and of --compare; default: the one that train.json names
    compare: bool = False  # SeqD and RCD side by side on the same canvas
    html: str = ""  # also write the run to this file, a page that plays it and shows what each mask might be
    svg: str = ""  # also write what the terminal shows to this file, a moving picture of the first canvas
    plain: bool = False  # one line of text per step, no colours
    stream: bool = True  # of a chat model, or one not trained here: the answer as text instead of its steps
    eval: str = ""  # instead of sampling: accuracy against forward passes, on the test split of a data set or
    # on a file of puzzles
    limit: int = 200  # --eval: only the first canvases, so many
    plot: str = ""  # --eval: also draw the table into this file (PNG, SVG or PDF)
    seed: int = 1337  # of the examples and of every random draw; --prompts: plus the number of the line
    compile: bool = False  # torch.compile the models: a minute or so first, then quicker steps; on CUDA it
    # implies --fixed_shapes and captures CUDA graphs
    device: str = ""  # cuda | mps | cpu; default: the best one found
    dtype: str = ""  # bfloat16 | float16 | float32, of the matmuls; default: bfloat16 if the processor has it

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("batch_size", 1), ("limit", 1), ("max_new", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.num_samples > 10_000:
            raise ValueError(f"num_samples={self.num_samples} must be at most 10,000: all are made first")
        if len(self.infill) > 1:
            raise ValueError(f"infill={self.infill!r} must be one character")
        if bool(self.prompts) != bool(self.out):
            raise ValueError("--prompts=FILE and --out=FILE belong together")
        if self.prompts and (self.prompt or self.eval or self.compare or self.html or self.svg):
            raise ValueError("--prompts excludes --prompt, --eval, --compare, --html and --svg")
        if self.eval and (self.prompt or self.compare or self.html or self.svg):
            raise ValueError("--eval excludes --prompt, --compare, --html and --svg")
        written = [path for path in (self.html, self.svg, self.plot, self.out) if path]
        seen = {os.path.realpath(path) for path in (self.prompt, self.prompts, self.eval) if path}
        for path in written:
            if os.path.realpath(path) in seen:
                raise ValueError(f"{path} would be overwritten: name another file")
            seen.add(os.path.realpath(path))
        if Path(self.eval).suffix and not Path(self.eval).exists():
            raise ValueError(f"--eval={self.eval}: there is no such file")
        if self.plot and not self.eval:
            raise ValueError(f"--plot={self.plot} draws what --eval measures: give both")
        if Path(self.plot).suffix.lower() not in ("", ".png", ".svg", ".pdf"):
            raise ValueError(f"--plot={self.plot}: name a .png, .svg or .pdf file")
        for path in written:
            check_writable(path)


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark

    # Load the model. What it recommends are the defaults of the options that were not typed.
    o, _, _ = arguments(__doc__, Options, Decoding, Carry)
    device, dtype, reason = pick_device(o.device, o.dtype)
    stored = torch.float32 if o.dtype == "float32" else None
    loaded = zoo.load(o.model, device, stored)
    presets = partial(recommended, loaded)
    o, sampler, residual = arguments(__doc__, Options, Decoding, Carry, presets=presets)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    print(f"{loaded.folder}: {parameters:,} parameters\n{reason}", file=sys.stderr)
    if residual.residual_epsilon:
        bound = residual.bound(loaded.model.embedding)
        print(f"|Delta - exact| is at most {bound:.2g}, 2 epsilon of the longest embedding", file=sys.stderr)

    # Load the reference if it is needed: for a warm start, and as SeqD.
    name, carried = carries.label(loaded.model), sampler.carry == "residual"
    needed = o.compare or o.eval or carried and sampler.start == "warm"
    if o.reference and not needed:
        raise ValueError("--reference is read by --compare, --eval and --start=warm: leave it out")
    reference = load_reference(loaded, o.reference, device, stored) if needed else None
    warm = reference and reference.model
    # A fair SeqD had as much training without a residual: the reference, if it has the model's shape.
    seqd = reference if reference and reference.model.config == loaded.model.config else loaded
    if o.compare or o.eval:
        which = f"the reference, {seqd.folder}"
        which = "the model's own weights, no reference of its shape is there" if seqd is loaded else which
        print(f"SeqD runs on {which}", file=sys.stderr)
    if o.compile:
        sampler = compiled({loaded.model, seqd.model, warm} - {None}, sampler, device)

    task = task_of(loaded)
    if o.eval:
        dataset = Puzzles.read(o.eval, loaded, task) if Path(o.eval).is_file() else data.load(o.eval)
        if dataset.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
            raise ValueError(f"data set {o.eval} is not in the tokens of {loaded.folder}")
        if dataset.check is None:
            raise ValueError(f"data set {o.eval} has no right answers to count")
        response = dataset.response("test")[: o.limit]  # (N, L)
        block = sampler.block_size or loaded.model.config.block_size
        blocks = -(-response.shape[1] // block) if block else 1
        tokens = float(response.sum(1).mean())
        if sampler.start != "warm" and carries.on_trajectories(loaded.meta.get("recipe", "")):
            warm = None  # no row of its own: the model never learned to read a reference's residual
        settings = sweep(seqd.model, loaded.model, warm, sampler, residual, tokens, blocks=blocks)
        rows = evaluate(settings, dataset, "test", o.limit, 8 * o.batch_size, dtype, o.seed)
        print(table(rows))
        if o.plot:
            plot(rows, o.plot, f"{o.model} on {o.eval}")
        return

    settings = [Setting(name if carried else "SeqD", loaded.model, warm, sampler, residual)]
    if o.prompts:
        return fill_file(o, settings[0], loaded, task, dtype)
    if o.compare:
        label = f"SeqD ({'same weights' if seqd is loaded else 'reference'})"
        plain, carrying = replace(sampler, carry="none"), replace(sampler, carry="residual")
        settings = [Setting(label, seqd.model, None, plain, residual)]
        settings += [Setting(name, loaded.model, warm, carrying, residual)]
    watch(o, settings, loaded, task, device, dtype)


def watch(o: Options, settings: list[Setting], loaded: zoo.Loaded, task: data.Dataset, device: torch.device,
          dtype: torch.dtype) -> None:  # fmt: skip
    """Fill the canvases under every setting, a step of each in turn. Show them and their numbers."""
    sampler = settings[0].sampler
    canvas, lengths, solutions = canvases(loaded, task, o.prompt, o.infill, o.num_samples, o.max_new,
                                          sampler.block_size, o.seed)  # fmt: skip
    dumb = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    plain = o.plain or dumb or not sys.stdout.isatty()
    foreign = bool(loaded.template or not loaded.meta)  # a chat model, or not trained here
    stream = o.stream and bool(o.prompt) and not o.infill and not o.compare and foreign
    traces, seconds = [], [0.0] * len(settings)
    if o.html:
        settings = [s._replace(sampler=Watched(**vars(s.sampler))) for s in settings]
    for s in settings:
        names = [f"{s.label} {i + 1}" if len(canvas) > 1 else s.label for i in range(len(canvas))]
        rows = zip(names, canvas.tolist(), lengths.tolist())
        traces.append([Trace(name, loaded, ids[:length]) for name, ids, length in rows])

    for start in range(0, len(canvas), o.batch_size):
        rows = slice(start, start + o.batch_size)
        runs: list[Iterator[Step] | None] = []
        for s in settings:
            generator = torch.Generator(device).manual_seed(o.seed + start)
            runs.append(denoise(s.model, canvas[rows], s.sampler, s.residual, lengths=lengths[rows],
                                reference=s.reference, generator=generator))  # fmt: skip
        if stream:
            viewer = Stream(traces[0][rows], single=len(canvas) == 1)
        else:
            viewer = Terminal([t[start] for t in traces], task.layout, plain, sampler.steps)
        while any(runs):
            for k, steps in enumerate(runs):
                if steps is None:  # this setting is done
                    continue
                begin = time.perf_counter()
                with autocast(device, dtype):
                    step = next(steps, None)
                seconds[k] += time.perf_counter() - begin
                runs[k] = steps if step else None
                top = settings[k].sampler.top if o.html else {}
                for row, trace in enumerate(traces[k][rows] if step else ()):
                    trace.add(step, row, top)
            viewer.show(last=not any(runs))
        for trace in (t for batch in zip(*(t[rows] for t in traces)) for t in batch):
            if not viewer.shown(trace):
                label = f"{trace.label}:\n" if len(settings) * len(canvas) > 1 else ""
                print(f"\n{label}{viewer.text(trace)}")

    out, stats = sys.stderr if stream else sys.stdout, []
    print(file=out)
    for s, row, took in zip(settings, traces, seconds):
        tokens, nfe = sum(at > 0 for t in row for at in t.committed_at), sum(t.nfe for t in row)
        text = f"{tokens} tokens, {nfe} NFE, {tokens / nfe:.2f} tokens/step, {tokens / took:,.0f} tokens/s"
        if solutions is not None:
            right = [task.correct(t.ids, solution, t.to_fill) for t, solution in zip(row, solutions)]
            text += f", {sum(right)}/{len(right)} right"
        stats.append(text)
        print(f"{s.label}: {text}" if o.compare else text, file=out)
    if o.html:
        html = page([t for batch in zip(*traces) for t in batch], stats * len(canvas), task.layout)
        write_atomic(Path(o.html), lambda path: path.write_text(html, encoding="utf-8"))
    if o.svg:
        picture = animation([row[0] for row in traces], task.layout, sampler.steps)
        write_atomic(Path(o.svg), lambda path: path.write_text(picture, encoding="utf-8"))


def fill_file(o: Options, setting: Setting, loaded: zoo.Loaded, task: data.Dataset,
              dtype: torch.dtype) -> None:  # fmt: skip
    """Fill the prompts of a file and write their records."""
    lines, block = [], setting.sampler.block_size
    for number, given in enumerate(volume.read_prompts(o.prompts), 1):
        try:
            canvas, begin = canvas_of(given["prompt"], loaded, task, o.infill, o.max_new, block)
        except ValueError as error:
            raise ValueError(f"{o.prompts}, line {number}: {error}") from None
        lines.append(volume.Line(given, canvas, begin, given.get("seed", o.seed + number)))
    named = {"reference": o.reference} if o.reference else {}
    settings = {"model": o.model, **named, "max_new": o.max_new, "infill": o.infill, "dtype": str(dtype)[6:],
                **asdict(setting.sampler), **asdict(setting.residual)}  # fmt: skip
    records = volume.run_file(setting, lines, o.num_samples, o.batch_size, dtype, loaded.tokenizer, settings,
                              Path(o.out))  # fmt: skip
    tokens, nfe = (sum(r[name] for r in records) for name in ("tokens", "nfe"))
    print(f"{len(records)} responses, {tokens} tokens, {nfe} NFE, {tokens / nfe:.2f} tokens/step -> {o.out}")


def compiled(models: set[Transformer], sampler: Decoding, device: torch.device) -> Decoding:
    """Compile the models in place. Returns the sampler for them: CUDA graphs need forwards of few shapes."""
    speed.check_compiler(device)
    torch._dynamo.config.cache_size_limit = 64  # graphs of a function, of all models and shapes
    fixed = sampler.fixed_shapes or device.type == "cuda"
    for model in models:
        # Rows and windows vary from step to step: one graph for all, or one for each of a few fixed shapes.
        model.compile(dynamic=not fixed, mode="reduce-overhead" if device.type == "cuda" else None)
    return replace(sampler, fixed_shapes=fixed)


if __name__ == "__main__":
    run(distributed.together(main))
