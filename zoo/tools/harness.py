"""The model `rcd` for lm-evaluation-harness (lm_eval), which scores language models on hundreds of tasks.

    pip install -e ".[eval]"
    python -m zoo.tools.harness --model rcd --model_args pretrained=FOLDER,carry=residual,threshold=0.85 \
        --tasks gsm8k --batch_size 16

This is lm_eval's own command line with one model more. Versions that look for entry points of installed
packages (those after 0.4.13) need no such start: lm_eval --model rcd ... is the same. --model_args takes
every sampler and residual option of sample.py, and those of Options below.

generate_until   The prompt is continued by max_gen_toks masks, which the sampler fills, and cut at the first
                 stop string. A prompt that is too long loses its beginning. temperature, top_k and top_p are
                 the task's.
loglikelihood    A masked model has no exact one. What is returned is the negative of a bound on -log p, see
                 `bound`: lower than the truth, and comparable between models of the same kind only.
                 is_greedy: the sampler at temperature 0 fills so many masks with exactly this text.
loglikelihood_rolling   The same for a text, in windows of the model's length, each by itself.
"""

import itertools
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import zoo
from rcd import Context, Transformer, canvas_for, diffusion_loss, maskable
from zoo.decoding import Carry, Decoding
from zoo.progress import progress
from zoo.rivals.carries import residual_context
from zoo.templates import encode_chat, render
from zoo.tools.command import arguments, autocast, pick_device, run
from zoo.tools.evaluate import Setting, load_reference, recommended
from zoo.tools.volume import by_length, draws, fill

try:
    from lm_eval.api.model import LM
except ImportError:  # main() says so; `bound` needs nothing of it
    LM = object

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # tasks spell it so


@dataclass
class Options:
    """what --model_args takes besides the sampler's and the residual's options"""

    pretrained: str = ""  # run folder, name of a run or of a model in zoo/, or id on the Hugging Face hub
    reference: str = ""  # the model of start=warm; default: the one that train.json names
    draws: int = 128  # how many maskings the bound on a likelihood is averaged over
    batch_size: int = 1  # rows of a forward pass: lm_eval's own --batch_size
    max_gen_toks: int = 256  # tokens to add to a prompt where the task does not say
    seed: int = 1337  # of the maskings, and of draws at a temperature
    device: str = ""  # cuda | mps | cpu: lm_eval's own --device; default: the best one found
    dtype: str = ""  # bfloat16 | float16 | float32, of the matmuls

    def __post_init__(self):
        for name in ("draws", "batch_size", "max_gen_toks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def bound(model: Transformer, tokens: Tensor, response: Tensor, draws: int, batch: int, dtype: torch.dtype,
          context: Context | None, generator: torch.Generator) -> float:  # fmt: skip
    """A bound on -log p(response | the rest) in nats, as a mean over so many draws of a masking.

    tokens (T,), response (T,) bool with n tokens; context as in rcd.diffusion_loss. With k masked tokens, any
    k of them, S_k the sum of their -log p, the bound is sum over k of E[S_k] / k. (That is the integral of
    diffusion_loss over t: LLaDA, arXiv 2502.09992, draws k in place of t too.) So k is drawn in proportion to
    1/k, evenly over the draws, and the bound is n times the mean -log p of a masked token. One token: exact.
    """
    response = maskable(model.config, response[None])  # (1, T)
    n, device = int(response.sum()), tokens.device
    if not n:
        return 0.0
    share = (1 / torch.arange(1, n + 1, device=device)).cumsum(0)  # of k or fewer, times share[-1]
    u = torch.arange(draws, device=device) + torch.rand(1, generator=generator, device=device)
    k = torch.searchsorted(share / share[-1], u / draws).clamp(max=n - 1) + 1  # (draws,)
    rank = torch.rand(draws, n, generator=generator, device=device).argsort(1).argsort(1)
    t = torch.zeros(draws, len(tokens), device=device)  # noise level of a token: 1 masks it, 0 never does
    t[response.expand_as(t)] = (rank < k[:, None]).float().flatten()
    total = 0.0
    with torch.no_grad(), autocast(device, dtype):
        for some in t.split(batch):  # (rows, T)
            rows = tokens.expand_as(some), response.expand_as(some)
            loss = diffusion_loss(model, *rows, context=context, t=some, generator=generator)
            total += float(loss) * n * len(some)  # sum of -log p over what is masked
    return n * total / int(k.sum())


class Harness(LM):
    """A loaded model under one setting, as lm_eval calls it."""

    def __init__(self, o: Options, loaded: zoo.Loaded, setting: Setting, dtype: torch.dtype):
        super().__init__()
        self.o, self.loaded, self.setting, self.dtype = o, loaded, setting, dtype
        self.config, self._device = loaded.model.config, loaded.model.embedding.device
        self.limit = loaded.meta.get("length") or self.config.max_len  # tokens of a canvas

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "Harness":
        """From --model_args as a dict, and lm_eval's own batch_size and device."""
        argv, own = [], dict(additional_config or {})
        if own.get("device") == "cuda:0" and not torch.cuda.is_available():
            del own["device"]  # lm_eval says so where nobody chose
        for name, value in {**arg_dict, **own}.items():
            flag = {True: [f"--{name}"], False: [f"--no-{name}"], None: []}
            argv += flag[value] if value is None or isinstance(value, bool) else [f"--{name}={value}"]
        options = partial(arguments, __doc__, Options, Decoding, Carry, argv=argv)
        o, _, _ = options()
        device, dtype, reason = pick_device(o.device, o.dtype)
        print(reason, file=sys.stderr)
        stored = torch.float32 if o.dtype == "float32" else None
        loaded = zoo.load(o.pretrained, device, stored)
        o, sampler, residual = options(presets=partial(recommended, loaded))
        warm = sampler.carry == "residual" and sampler.start == "warm"
        reference = load_reference(loaded, o.reference, device, stored) if warm else None
        model = reference and reference.model
        return cls(o, loaded, Setting("rcd", loaded.model, model, sampler, residual), dtype)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "Harness":
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- chat

    @property
    def tokenizer_name(self) -> str:
        return f"{self.loaded.tokenizer.fingerprint}-{self.loaded.template}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.loaded.template or ""

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Without add_generation_prompt its last message is to be continued."""
        if not self.loaded.template:
            raise ValueError(f"{self.loaded.folder} has no chat template: leave out --apply_chat_template")
        encode_chat(self.loaded.tokenizer, self.loaded.template, chat_history)  # raises if it cannot
        text = render(self.loaded.template, chat_history, add_generation_prompt)
        last = chat_history[-1]["content"].strip()
        return text if add_generation_prompt else text[: text.rindex(last) + len(last)]

    def encode(self, text: str) -> list[int]:
        """Names of special tokens are tokens where the model has a chat template, as lm_eval expects it."""
        return self.loaded.tokenizer.encode(text, allow_special=bool(self.loaded.template))

    def start(self) -> list[int]:
        """What stands before an empty context: where logits are shifted, something must."""
        return [*self.config.eos_ids, self.config.pad_id][:1] if self.config.logit_shift else []

    # ---- what lm_eval asks for

    def generate_until(self, requests: list) -> list[str]:
        """A continuation for each (context, generation options)."""
        canvases, begins, stops, samplers, c = [], [], [], [], self.config
        for request in requests:
            until, new, sampler = self.generation(request.args[1])
            block = (sampler.block_size or c.block_size) if c.block_size else 1
            room = self.limit // block * block - new
            if room < 1:
                raise ValueError(f"max_gen_toks={new} leaves no room for a prompt in {self.limit} tokens")
            ids = (self.encode(request.args[0]) or self.start())[-room:]
            canvases.append(canvas_for(c, [ids], new, sampler.block_size)[0][0].tolist())
            begins.append(len(ids))
            stops.append(until)
            samplers.append(sampler)
        out, tokens, nfe = [""] * len(requests), 0, 0
        for i, filled in self.fill("generate_until", canvases, samplers):
            ids = itertools.takewhile(lambda token: token not in c.eos_ids, filled.canvas[begins[i] :])
            out[i] = self.loaded.tokenizer.decode([*ids])
            for stop in filter(None, stops[i]):
                out[i] = out[i].split(stop)[0]
            tokens, nfe = tokens + filled.tokens, nfe + filled.nfe
            self.cache_hook.add_partial("generate_until", requests[i].args, out[i])
        print(f"rcd: {tokens:,} tokens, {nfe:,} NFE, {tokens / max(1, nfe):.2f} tokens/step", file=sys.stderr)
        return out

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """(-bound, is_greedy) for each (context, continuation)."""
        pairs = [self.pair(*r.args) for r in requests]  # ids of the context and of the continuation
        canvases = [before + [self.config.mask_id] * len(ids) for before, ids in pairs]
        samplers = [replace(self.setting.sampler, temperature=0.0)] * len(pairs)
        greedy = {i: filled.canvas for i, filled in self.fill("is_greedy", canvases, samplers)}
        out = []
        with progress(len(pairs), "loglikelihood", "requests") as bar:
            for i, (before, ids) in enumerate(pairs):
                out.append((-self.bound(before, ids), greedy[i] == before + ids))
                self.cache_hook.add_partial("loglikelihood", requests[i].args, out[i])
                bar.update()
        return out

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """-bound for each (text,)."""
        out, size = [], self.limit - len(self.start())
        with progress(len(requests), "loglikelihood_rolling", "requests") as bar:
            for request in requests:
                ids = self.encode(request.args[0])
                windows = [ids[i : i + size] for i in range(0, len(ids), size)]
                out.append(-sum(self.bound(self.start(), window) for window in windows))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, out[-1])
                bar.update()
        return out

    # ---- how

    def fill(self, what: str, canvases: list[list[int]], samplers: list[Decoding]):
        """(index, Filled) of every canvas: like lengths share a batch, or none where something is drawn."""
        groups = {s: [i for i, other in enumerate(samplers) if other == s] for s in {*samplers}}
        with progress(len(canvases), what, "requests") as bar:
            for sampler, members in groups.items():
                setting = self.setting._replace(sampler=sampler)
                size = 1 if draws(sampler) else self.o.batch_size
                for batch in by_length([len(canvases[i]) for i in members], size):
                    batch = [members[j] for j in batch]
                    some = [canvases[i] for i in batch]
                    yield from zip(batch, fill(setting, some, self.dtype, self.o.seed, batch[0]))
                    bar.update(len(batch))

    def generation(self, given: dict) -> tuple[list[str], int, Decoding]:
        """A task's generation options -> stop strings, tokens to add, sampler. ValueError: an unknown one."""
        options, until = {**given}, given.get("until") or []
        new = [int(options.pop(name)) for name in LIMITS if options.get(name) is not None]
        temperature = float(options.pop("temperature", None) or 0.0)
        temperature *= options.pop("do_sample", True) is not False
        drawn = {name: options.pop(name) for name in ("top_k", "top_p") if name in options}
        if unknown := options.keys() - {"until", *LIMITS}:
            raise ValueError(f"the task asks for {min(unknown)}, which this model's generation does not have")
        sampler = replace(self.setting.sampler, temperature=temperature, **(drawn if temperature else {}))
        return [until] if isinstance(until, str) else until, [*new, self.o.max_gen_toks][0], sampler

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Their ids, encoded as one text; white space between them belongs to the continuation."""
        stripped = context.rstrip()
        before, whole = self.encode(stripped), self.encode(context + continuation)
        ids = whole[len(before) :]
        room = self.limit - len(ids)
        before = before or self.start()
        if not ids or room < len(self.start()):
            raise ValueError(f"a continuation of {len(ids)} tokens does not fit into {self.limit}")
        return before[max(0, len(before) - room) :], ids

    def bound(self, before: list[int], ids: list[int]) -> float:
        """bound() of ids behind before, on draws that are the same for every request."""
        tokens = torch.tensor(before + ids, device=self.device)
        response = torch.arange(len(tokens), device=self.device) >= len(before)
        carried, model = self.setting.sampler.carry == "residual", self.setting.model
        context = residual_context(model, self.setting.residual) if carried else None
        generator = torch.Generator(self.device).manual_seed(self.o.seed)
        return bound(model, tokens, response, self.o.draws, self.o.batch_size, self.dtype, context,
                     generator)  # fmt: skip


def main() -> None:
    if LM is object:
        raise ValueError('lm-evaluation-harness is not installed: pip install -e ".[eval]"')
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "rcd" not in model_registry:
        model_registry.register("rcd", target="zoo.tools.harness:Harness")
    cli_evaluate()


if __name__ == "__main__":
    run(main)
