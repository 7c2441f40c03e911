"""Commit rules from other papers: Fast-dLLM's factor, KLASS, and what rules that look back have in common.

A rule is RULES[name](Candidates, Sampler) -> (N,) bool. One that looks back needs a memory of earlier passes.
The reader is made once for each run of denoise, so the memory lies there: Notes is a reader around another
one, and Candidates.read leads the rule to it.
"""

import torch
from torch import Tensor

from rcd import Candidates, Reader, Sampler, by_rows, check, softmax, tile


class Notes:
    """A reader that remembers, around `read`. A rule that looks back is a subclass with a method
    commit(Candidates, Sampler) -> (N,) bool, the cells to fix now.

    Notes are (B, T), an entry for every cell: a new block finds its own empty.
    """

    def __init__(self, read: Reader, s: Sampler):
        self.read, self.model, self.passes = read, read.model, read.passes
        self.tokens, self.lengths, self.b = read.tokens, read.lengths, read.b
        self.begin = self.end = None  # (B,) the blocks read last
        self.place = torch.full_like(self.tokens, -1)  # (B, T) see last()

    def __call__(self, begin: Tensor, end: Tensor, cells: Tensor, alpha: Tensor | None, delta: Tensor | None):
        """As Reader: logits (N, V)."""
        self.begin, self.end = begin, end
        return self.read(begin, end, cells, alpha, delta)

    def last(self, row: Tensor, column: Tensor) -> Tensor:
        """(N,) the number of each of these cells among those of the last call, -1 = it was not there."""
        before = self.place[row, column]
        self.place.fill_(-1)
        self.place[row, column] = torch.arange(len(row))
        return before

def looks_back(c: Candidates, s: Sampler) -> Tensor:
    """The entry in RULES of every rule that looks back: its notes decide."""
    check(hasattr(c.read, "commit"), f"rule={s.rule} looks back: sample with zoo.decoding.Decoding")
    return c.read.commit(c, s)


def factor(c: Candidates, s: Sampler) -> Tensor:
    """Fast-dLLM (arXiv 2505.22618): the largest n with (n + 1)(1 - c_(n)) < factor, and at least the quota.

    c_(1) >= c_(2) >= ... are a row's confidences, so (n + 1)(1 - c_(n)) only grows: the test of each cell by
    itself gives the n surest. By Theorem 1, with factor = 1, filling them at once is as good as greedy one by
    one. The authors' loop also commits everything if nothing but the last cell fails the test; this does not.
    """
    n = c.rank(c.confidence) + 1
    return c.best(c.confidence) | ((n + 1) * (1 - c.confidence) < s.factor)


class Klass(Notes):
    """KLASS (arXiv 2511.05664): fix what is sure, and has been calm for the last two passes.

    Sure: confidence > threshold. Calm: KL(p_t || p_(t-1)) < kl_bound, p_(t-1) being that of the pass before.
    A row in which no cell is both commits its quota, the most confident.
    """

    history = 2

    def __init__(self, read: Reader, s: Sampler):
        super().__init__(read, s)
        self.calm = torch.zeros_like(self.tokens)  # (B, T) for how many passes in a row
        self.logits = None  # of the pass before

    def commit(self, c: Candidates, s: Sampler) -> Tensor:
        before, cell = self.last(c.row, c.column), (c.row, c.column)
        known, index = before >= 0, before[before >= 0].to(c.logits.device)
        if known.any():
            kl = divergence(c.logits[known.to(c.logits.device)], self.logits[index]).to(c.row.device)
            seen = c.row[known], c.column[known]
            self.calm[seen] = torch.where(kl < s.kl_bound, self.calm[seen] + 1, 0)
        self.logits = c.logits
        ready = (c.confidence > s.threshold) & (self.calm[cell] >= self.history)  # (N,)
        some = torch.zeros(len(c.quota), dtype=torch.bool).index_put((c.row[ready],), torch.tensor(True))
        return ready | (c.best(c.confidence) & ~some[c.row])


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """KL(p || q) (N,) in nats of p = softmax(logits), q = softmax(others), both (N, V)."""

    def rows(logits: Tensor, others: Tensor) -> tuple[Tensor]:
        (z, p), (other, _) = softmax(logits), softmax(others)
        return ((p * (z.log_softmax(-1) - other.log_softmax(-1))).sum(-1),)

    return by_rows(rows, tile(logits), logits, others)[0]
