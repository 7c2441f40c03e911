"""What the families of the zoo, and the paper's ablations, add to the sampler and the residual of rcd.py.

The command line and the settings that a family recommends are of the two classes Decoding and Carry. All of
it enters through the seams of rcd.py: rules in RULES, weights in WEIGHTS, readers through Sampler.reader and
Sampler.start_readers, the order of filling through Sampler.turns.
"""

import math
from collections import ChainMap
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rcd import (CHUNK, RULES, WEIGHTS, Candidates, Config, Reader, Residual, Sampler, Transformer, by_rows,
                 check, padded, softmax, tile)  # fmt: skip
from zoo import dream, fastdllm, llada, rivals, speed

DEPTH = 256  # tokens that residual_epsilon looks at: a row that needs more takes the exact product
GROUP = 32  # tokens of which the likeliest stands for all, in the first step of a search
CACHES = {"exact": Reader, "prefix": fastdllm.PrefixCache, "dual": fastdllm.DualCache}


def entropy_bounded(c: Candidates, s: "Decoding") -> Tensor:
    """EB-sampler (arXiv 2505.24857): the k surest cells with H_1 + ... + H_(k-1) <= entropy_bound."""
    entropy = dream.entropies(c)  # (N,)
    rank = c.rank(-entropy)
    order = (c.row * len(rank) + rank).argsort()  # row by row, the surest first
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    before = entropy[order].double().cumsum(0) - entropy[order]  # of all that stand earlier in that order
    before = (before[place] - before[place - rank]).float()  # of those in the same row
    return c.best(-entropy) | (before <= s.entropy_bound)


def at_random(c: Candidates, s: Sampler) -> Tensor:
    """LLaDA's random remasking: any cells, as many as the quota."""
    device = c.generator.device if c.generator else None
    return c.best(torch.rand(len(c.row), generator=c.generator, device=device).to(c.row.device))


def left_to_right(c: Candidates, s: Sampler) -> Tensor:
    return c.best(-c.column.float())


RULES |= {
    "left-to-right": left_to_right,
    "random": at_random,
    "entropy-bounded": entropy_bounded,
    "lowest-entropy": dream.lowest_entropy,
    "margin": dream.margin,
    **rivals.RULES,
}
WEIGHTS |= {
    "1-entropy": lambda z, p, r: 1 - WEIGHTS["entropy"](z, p, r),
    "1-confidence": lambda z, p, r: 1 - WEIGHTS["confidence"](z, p, r),
    "one": lambda z, p, r: z.new_ones(len(z)),
}


def top_1(logits: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """Carry.weight=top-1: alpha = 1, and Delta = E[argmax]. logits (N, V), E (V, D) -> (N,), (N, D)."""
    return torch.ones(len(logits), device=E.device), E[logits.argmax(-1)]


def likeliest(p: Tensor, k: int, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest tokens, or all V, of each row of p (N, V): their p, the largest first, and ids, both
    (n, k), and which n rows.

    Each of these tokens lies in one of the k groups of 32 with the largest maxima. A row is left out if the
    maxima of its other groups already sum up to more than epsilon."""
    if p.shape[1] <= GROUP * k:
        return *p.topk(min(k, p.shape[1])), torch.arange(len(p), device=p.device)
    if p.shape[1] % GROUP:
        p = F.pad(p, (0, -p.shape[1] % GROUP), value=-1)  # behind a p of 0: no padding is ever among the k
    highest = p.unflatten(-1, (-1, GROUP)).amax(-1)  # (N, V / 32)
    best = highest.topk(k, sorted=False)
    rows = (highest.sum(-1) - best.values.sum(-1) <= epsilon).nonzero()[:, 0]
    ids = best.indices[rows, :, None] * GROUP + torch.arange(GROUP, device=p.device)  # (n, k, 32)
    values, at = p[rows[:, None], ids.flatten(1)].topk(k)
    return values, ids.flatten(1).gather(1, at), rows


CARRIES = {"top-1": top_1, **rivals.CARRIES}  # weights that bring a Delta of their own


@dataclass(frozen=True)
class Decoding(Sampler):
    """How a canvas is denoised: the commit rule, the carry, the first residual, the draw, the cache"""

    rule: str = "static"  # what to commit: static (the most confident, on a step budget) | threshold |
    # entropy-bounded | lowest-entropy | margin | random | left-to-right (the last four on a step budget) |
    # factor | klass | r2 | r2-spatial | r2-temporal | wino | policy (zoo/rivals; the last two ignore --steps)
    entropy_bound: float = 0.1  # rule=entropy-bounded: the k surest with H_1 + ... + H_(k-1) <= this, in nats
    factor: float = 1.0  # rule=factor: the n surest with (n + 1)(1 - c_n) < this
    kl_bound: float = 0.01  # rule=klass: a cell is calm if its p moved by less, KL in nats
    rescue: float = 0.8  # rule=r2: confidence of a window, of a run or of a stable cell that is enough
    revoke: float = 0.9  # rule=wino: a filled cell must keep this much p (with --threshold=0.6)
    policy: str = ""  # rule=policy: the file of a policy that python -m zoo.rivals.policy trained
    policy_speed: float = 1.0  # rule=policy: its chances to commit are multiplied by this
    js_reset: float = 0.0  # drop the residual of a cell whose p moved further, JS in nats (ReMix: 0.3);
    # 0 = never
    start: str = "cold"  # first residual of a block: cold (none) | warm (the reference's) | self (its own) |
    # dirichlet (of a random p)
    self_passes: int = 1  # passes of start=self, each on the residual of the one before; none commits
    top_k: int = 0  # draw among the k likeliest tokens; 0 = all
    top_p: float = 1.0  # draw among the likeliest tokens that hold this mass (of the 1,024 likeliest)
    sub_block: int = 0  # fill each block in sub-blocks of so many tokens, left to right (Fast-dLLM v2: 8);
    # 0 = in one
    cache: str = "exact"  # keys and values of a bidirectional model: exact (none kept) | prefix | dual
    # (approximate: Fast-dLLM)
    fixed_shapes: bool = False  # forwards in a few shapes, for CUDA graphs
    guidance: float = 0.0  # classifier-free guidance w (LLaDA): u + (w + 1)(z - u), where u does not see the
    # prompt; doubles the NFE

    starts = ("cold", "warm", "self", "dirichlet")  # no annotation: not a field

    def __post_init__(self):
        super().__post_init__()
        check(self.cache in CACHES, f"cache={self.cache!r}: choose from {', '.join(CACHES)}")
        for name in ("sub_block", "top_k", "guidance", "entropy_bound", "factor", "kl_bound", "rescue",
                     "revoke", "js_reset", "policy_speed"):  # fmt: skip
            value = getattr(self, name)
            check(0 <= value < math.inf, f"{name}={value} must be finite and not negative")
        passes = self.self_passes
        says = "must lie between 1 and 1,000; start=cold has no such pass"
        check(1 <= passes <= 1000, f"self_passes={passes} {says}")
        check(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        check(0 <= self.threshold <= 1, f"threshold={self.threshold} must lie in [0, 1]")

    def reader(self, model: Transformer, tokens: Tensor, lengths: Tensor, b: int, fill: Tensor) -> Reader:
        exact = self.cache == "exact" or not model.config.block_size
        check(exact, f"cache={self.cache}: a block-causal model's cache is exact, choose cache=exact")
        kind = speed.fixed_shapes(CACHES[self.cache]) if self.fixed_shapes else CACHES[self.cache]
        read = kind(model, tokens, lengths, b)
        if self.guidance:
            prompt = (torch.arange(tokens.shape[1]) < lengths[:, None]) & ~fill  # (B, T)
            read = llada.Guided(read, kind(model, tokens, lengths, b), prompt, self.guidance)
        if self.carry == "residual" and rivals.carries.of(model):
            read = rivals.carries.Carrying(read, self)
        if self.carry == "residual" and self.js_reset:
            read = rivals.Reset(read, self)
        return rivals.NOTES[self.rule](read, self) if self.rule in rivals.NOTES else read

    def start_readers(self, read: Reader, reference: Transformer | None, generator: Generator | None) -> list:
        if self.start == "self":
            return [read] * self.self_passes
        if self.start == "dirichlet":
            return [Dirichlet(read, generator)]
        if self.start == "warm" and self.fixed_shapes:
            return [speed.fixed_shapes(Reader)(reference, read.tokens, read.lengths, read.b)]
        return super().start_readers(read, reference, generator)

    def turns(self, at: Tensor, b: int, c: Config) -> tuple[Tensor, int]:
        return fastdllm.sub_blocks(at, b, self.sub_block, c) if self.sub_block else super().turns(at, b, c)

    def draw(self, z: Tensor, generator: Generator | None) -> Tensor:
        """As in rcd.Sampler, among the top_k and top_p likeliest tokens. No sort of the whole vocabulary."""
        V = z.shape[1]
        k = min(self.top_k or V, V, 1024 if self.top_p < 1 else V)
        if k == V and self.top_p == 1:
            return super().draw(z, generator)
        values, ids = (z / self.temperature).topk(k)  # (n, k)
        if self.top_p < 1:
            p = values.softmax(-1)
            values = values.masked_fill(p.cumsum(-1) - p >= self.top_p, -math.inf)  # the likeliest stays
        exponential = torch.empty_like(values).exponential_(generator=generator)
        chosen = (values.softmax(-1) / exponential).argmax(-1, keepdim=True)
        return ids.gather(-1, chosen)[:, 0]


class Dirichlet:
    """start=dirichlet (the paper's table of starts): p drawn from Dirichlet(1, ..., 1). It costs no pass."""

    passes = 0

    def __init__(self, read: Reader, generator: Generator | None):
        self.c, self.device, self.generator = read.model.config, read.model.head.device, generator

    def __call__(self, begin: Tensor, end: Tensor, cells: Tensor, alpha: None, delta: None) -> Tensor:
        """Logits (N, V) whose softmax is such a p: Exp(1) draws, normalised, are a draw from it."""
        c, weights = self.c, torch.empty(len(cells), self.c.vocab_size, device=self.device)
        weights.exponential_(generator=self.generator)
        weights[:, c.mask_id], weights[:, c.real_vocab or c.vocab_size :] = 0, 0
        return weights.log()


@dataclass(frozen=True)
class Carry(Residual):
    """What is carried from step to step: alpha and Delta. [Defaults] give way to the recipe's or model's"""

    weight: str = "entropy"  # alpha: entropy (Eq. 3) | confidence | fixed | one | 1-entropy | 1-confidence |
    # top-1 (one, and Delta = E[argmax]) | remix (zoo/rivals) | learned (the model's own carry)
    temper_delta: bool = False  # T_res tempers Delta too (section 3.3 can be read so, Algorithm 2 not)
    residual_top_k: int = 0  # Delta from the k likeliest tokens alone (approximate, quick); 0 = exact
    residual_epsilon: float = 0.0  # Delta from the fewest tokens that hold 1 - this of p (approximate, quick,
    # with a bound); 0 = exact

    weights = ChainMap(CARRIES, WEIGHTS)  # no annotation: not a field

    def __post_init__(self):
        super().__post_init__()
        check(self.residual_top_k >= 0, f"residual_top_k={self.residual_top_k} must not be negative")
        epsilon = self.residual_epsilon
        check(0 <= epsilon < 1, f"residual_epsilon={epsilon} must lie in [0, 1)")
        check(not (self.residual_top_k and epsilon), "choose one of residual_top_k and residual_epsilon")
        own = self.weight in CARRIES and (self.residual_top_k or epsilon)
        unread = "residual_top_k and residual_epsilon must be 0"
        check(not own, f"weight={self.weight} brings its own Delta: {unread}")

    def alpha_and_p(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if not self.temper_delta:
            return super().alpha_and_p(logits)
        z, p = softmax(logits, self.t_res)
        return WEIGHTS[self.weight](z, p, self).detach(), p

    def __call__(self, logits: Tensor, E: Tensor, grad: bool = False) -> tuple[Tensor, Tensor]:
        """As in rcd.Residual. With residual_top_k or residual_epsilon, Delta is the expectation over the
        likeliest tokens alone.

        Let m be their mass: Delta = sum p_j E_j / m, and |Delta - exact| <= 2 (1 - m) max |E_j|. The tokens
        left out add at most (1 - m) max |E_j|, and division by m moves the others by no more.
        """
        if self.weight in CARRIES:
            with torch.set_grad_enabled(grad):
                return CARRIES[self.weight](logits, E)
        with torch.set_grad_enabled(grad):
            if self.residual_epsilon:
                return self.fewest(logits, E)
            if 0 < self.residual_top_k < logits.shape[1]:
                return self.top(logits, E)
        return super().__call__(logits, E, grad)

    def top(self, logits: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
        """residual_top_k: each row takes its k likeliest tokens. logits (N, V), E (V, D) -> (N,), (N, D)."""
        if self.weight in ("fixed", "one"):  # these read no p
            alpha = WEIGHTS[self.weight](logits.float()[:, :1], None, self)
        else:
            (alpha,) = by_rows(lambda z: self.alpha_and_p(z)[:1], tile(logits), logits)
        top, ids = logits.topk(self.residual_top_k)  # (N, k)
        p = softmax(top, self.t_res if self.temper_delta else 1.0)[1].to(E.dtype)
        return alpha, F.embedding_bag(ids, E, per_sample_weights=p, mode="sum")

    def fewest(self, logits: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
        """residual_epsilon: each row takes the fewest tokens that hold 1 - epsilon of its p. A row for which
        DEPTH tokens are too few takes the exact product. logits (N, V), E (V, D) -> (N,), (N, D). On a GPU
        the host waits here more often in a step: how many tokens there are, only p can say."""
        least, dtype = 1 - self.residual_epsilon, F.linear(E[:0], E[:0]).dtype

        def chunk(logits: Tensor) -> tuple[Tensor, Tensor]:
            whole, kept = torch.empty_like(logits, dtype=dtype), 0  # p of rows that take the exact product

            def rows(logits: Tensor) -> tuple[Tensor, ...]:  # (n, V)
                nonlocal kept
                alpha, p = self.alpha_and_p(logits)
                top, ids, found = likeliest(p, DEPTH, self.residual_epsilon)  # (f, k), (f, k), (f,)
                holds = top.sum(-1) >= least
                enough = torch.zeros_like(alpha, dtype=torch.bool).index_put((found,), holds)  # (n,)
                rest = p[~enough]
                whole[kept : kept + len(rest)] = rest
                kept += len(rest)
                return alpha, enough, top[holds], ids[holds]

            alpha, enough, p, ids = by_rows(rows, tile(logits), logits)
            taken = p.cumsum(-1) - p < least  # (f, k) those before hold less
            p = p * taken
            p = (p / p.sum(-1, keepdim=True)).to(E.dtype)
            begin = taken.sum(-1).cumsum(0) - taken.sum(-1)  # (f,) where the tokens of each row begin
            bags = F.embedding_bag(ids[taken], E, begin, per_sample_weights=p[taken], mode="sum")  # (f, D)
            delta = E.new_zeros(len(logits), E.shape[1]).index_put((enough,), bags)
            if kept:  # the exact product
                delta = delta.index_put((~enough,), padded(lambda p: p @ E, whole[:kept]).to(E.dtype))
            return alpha, delta

        return by_rows(chunk, CHUNK // logits.shape[1], logits)

    def bound(self, E: Tensor) -> float:
        """The most by which residual_epsilon moves a Delta, in the length of embeddings E (V, D)."""
        return 2 * self.residual_epsilon * E.detach().float().norm(dim=1).max().item()


RENAMED = {"pool": "buffer", "terms": "residual_top_k"}  # options by their names in earlier versions


def carry_options(values: dict) -> dict:
    """Residual options of a train.json: the names of earlier versions become today's."""
    return {RENAMED.get(name, name): value for name, value in values.items()}
