"""R2-dLLM (arXiv 2604.18995): three rules that commit more than a threshold does, without training.

Predictions are redundant in space and in time. Each pass commits in this order, and a later rule sees what an
earlier one has just committed:

    0  threshold   every confidence >= threshold (0.9), and at least the quota
    1  spatial     a window of 3 neighbours with at most one filled: if the mean confidence of its masked
                   cells is >= rescue (0.8), all of these
    2  agreement   neighbours that are masked and have the same likeliest token do not know which of them it
                   belongs to: if the surest of such a run is above rescue, this one alone
    3  temporal    a cell with the same likeliest token for 3 passes in a row, and confidence >= rescue now

`r2` has all four, `r2-spatial` the first three, `r2-temporal` the first and the last. The paper's fine-tuning
on redundancy-ranked answers is redundancy/, with a ranking of ours: the paper's (Eq. 5) is not public.
"""

import torch
from torch import Tensor

from rcd import Candidates, Reader, Sampler
from zoo.rivals.rules import Notes

WIDTH, FILLED, STREAK = 3, 1, 3


def spatial(masked: Tensor, confidence: Tensor, inside: Tensor, rescue: float) -> Tensor:
    """Rule 1 on a canvas: masked, confidence, inside (the open block): (B, T) -> what to commit (B, T).

    Every window lies inside the block, and sees the state before this rule.
    """
    marked = torch.zeros_like(masked)
    if masked.shape[1] < WIDTH:
        return marked
    whole, windows = inside.unfold(1, WIDTH, 1).all(-1), masked.unfold(1, WIDTH, 1)  # (B, T - 2), (.., 3)
    count = windows.sum(-1)
    mean = (confidence * masked).unfold(1, WIDTH, 1).sum(-1) / count.clamp(min=1)
    sure = whole & (count >= WIDTH - FILLED) & (mean >= rescue)  # (B, T - 2) the windows by their first cell
    for k in range(WIDTH):
        marked[:, k : k + sure.shape[1]] |= sure
    return marked & masked


def agreement(masked: Tensor, confidence: Tensor, token: Tensor, rescue: float) -> Tensor:
    """Rule 2 on a canvas: masked, confidence, token: (B, T) -> what to commit (B, T), one cell of a run."""
    same = torch.zeros_like(masked)  # as the cell before
    same[:, 1:] = masked[:, 1:] & masked[:, :-1] & (token[:, 1:] == token[:, :-1])
    run = (~same).flatten().cumsum(0) - 1  # (B * T,) runs, numbered through; a filled cell is one by itself
    score = confidence.masked_fill(~masked, -1.0).flatten()
    best = torch.full_like(score, -1.0).scatter_reduce(0, run, score, "amax")[run]
    cell = torch.arange(len(run))
    surest = torch.where(score == best, cell, len(run))  # of two that are equally sure, the first
    first = torch.full_like(run, len(run)).scatter_reduce(0, run, surest, "amin")[run]
    long = run.bincount()[run] >= 2
    return (long & (cell == first) & (best > rescue)).view(masked.shape) & masked


class R2(Notes):
    """The rules one after the other, and the streaks of rule 3."""

    in_space, in_time = True, True

    def __init__(self, read: Reader, s: Sampler):
        super().__init__(read, s)
        self.token = torch.full_like(self.tokens, -1)  # (B, T) the likeliest token of the pass before
        self.streak = torch.zeros_like(self.tokens)  # (B, T) for how many passes it has been that

    def commit(self, c: Candidates, s: Sampler) -> Tensor:
        cell, column = (c.row, c.column), torch.arange(self.tokens.shape[1])
        masked = torch.zeros_like(self.tokens, dtype=torch.bool)  # (B, T) the candidates, on their canvas
        confidence, token = torch.zeros(self.tokens.shape), torch.full_like(self.tokens, -1)
        masked[cell], confidence[cell] = True, c.confidence
        token[cell] = c.logits.argmax(-1).to(c.row.device)
        masked[cell] = ~(c.best(c.confidence) | (c.confidence >= s.threshold))  # 0
        if self.in_space:
            inside = (column >= self.begin[:, None]) & (column < self.end[:, None])
            masked &= ~spatial(masked, confidence, inside, s.rescue)  # 1
            masked &= ~agreement(masked, confidence, token, s.rescue)  # 2
        if self.in_time:
            again = masked & (token == self.token)
            self.streak = torch.where(again, self.streak + 1, masked.long())  # a change starts at 1
            self.token = token
            masked &= ~((self.streak >= STREAK) & (confidence >= s.rescue))  # 3
        return ~masked[cell]


class Spatial(R2):
    in_time = False


class Temporal(R2):
    in_space = False
