"""WINO (arXiv 2507.18578): commit generously, and revoke what a second look does not confirm. No training.

Behind the canvas stands a shadow: the open block once more, all masks, at the same positions. A shadow cell
sees the canvas but for its own position, and the shadow; the canvas does not see the shadow. So one pass
gives p_i for each masked cell i, and for each filled one what p_i would be if it were masked. After it:

    accept   confidence > threshold (0.6), at most min(max(0.7 masks, 5), 20) cells of a row, at least one
    revoke   if more than one was accepted: filled cells whose shadow gives their token less than `revoke`
             (0.9), the least first, and fewer than the pass before accepted, so there is always progress

The loop of rcd.py fixes a cell for good. Here nothing of a block is fixed before all of it is, so what was
accepted lies in a draft, which the reader keeps and reads in place of the masks. The loop commits the draft
of a row when it is full. A pass reads a block more than others do; it counts as one.
"""

import torch
from torch import Tensor

from rcd import Candidates, Reader, Sampler, by_rows, check, mix, softmax, tile
from zoo.rivals.rules import Notes


class Wino(Notes):
    """A Reader of the draft and its shadow. A revoked cell carries on what its shadow predicts."""

    def __init__(self, read: Reader, s: Sampler):
        """Raises ValueError for a model or a sampler that WINO is not made for."""
        super().__init__(read, s)
        plain = type(read) is Reader and read.cache is None and not self.model.config.logit_shift
        needs = "a bidirectional model: no logit shift, cache, fixed_shapes, guidance, js_reset or own carry"
        check(plain, f"rule=wino needs {needs}")
        check(s.temperature == 0, f"rule=wino drafts the likeliest token: temperature=0, not {s.temperature}")
        check(s.start != "self", "rule=wino drafts at every pass, and start=self has passes before the first")
        self.s, self.draft = s, self.tokens.clone()  # (B, T)
        self.accepted = torch.full_like(self.lengths, 30)  # (B,) by the pass before
        self.full = None  # (B,) bool: nothing of the block is masked in the draft

    def __call__(self, begin: Tensor, end: Tensor, cells: Tensor, alpha: Tensor | None, delta: Tensor | None):
        """As Reader: logits (N, V) at the cells (N, 2), masked in the draft or not. A cell whose token stands
        has all its mass there."""
        model, (row, column), mask = self.model, cells.unbind(1), self.model.config.mask_id
        self.draft = torch.where(self.tokens == mask, self.draft, self.tokens)
        drafted = self.draft[row, column] != mask  # (N,)
        hidden = self.forward(begin, end, cells, drafted, alpha, delta)
        logits = model.logits(hidden)
        self.hidden = hidden

        token, confidence = (x.cpu() for x in self.look(logits, self.draft[row, column], drafted))
        masks = row[~drafted].bincount(minlength=len(begin))  # (B,)
        most = (masks * 7 // 10).clamp(5, 20)
        rank = Candidates(row, column, confidence, masks, None, None).rank
        place = rank(confidence.masked_fill(drafted, -1.0))  # the surest masked cell is 0
        accept = ~drafted & ((place == 0) | (confidence > self.s.threshold) & (place < most[row]))
        count = row[accept].bincount(minlength=len(begin))  # (B,)
        lowest = rank((-confidence).masked_fill(~drafted, -2.0))  # the filled cell with least p is 0
        revoke = drafted & (confidence < self.s.revoke) & (count[row] > 1) & (lowest < self.accepted[row] - 1)
        self.accepted = torch.where(count > 0, count, self.accepted)
        self.draft[row[accept], column[accept]] = token[accept]
        self.draft[row[revoke], column[revoke]] = mask
        self.full = masks - count + row[revoke].bincount(minlength=len(begin)) == 0

        stands = (drafted & ~revoke).nonzero()[:, 0].to(logits.device)
        logits[stands] = -torch.inf
        logits[stands, self.draft[row, column].to(logits.device)[stands]] = 0.0
        return logits

    def forward(self, begin, end, cells, drafted, alpha, delta) -> Tensor:
        """Hidden states (N, D) of the cells: on the canvas where they are masked, else in the shadow."""
        model, device, T = self.model, self.model.head.device, self.tokens.shape[1]
        (rows, index), W = cells[:, 0].unique(return_inverse=True), int((end - begin).max())
        at = torch.cat([torch.arange(T).expand(len(rows), T), begin[rows, None] + torch.arange(W)], dim=1)
        shadow = torch.full((len(rows), W), model.config.mask_id)
        x = model.embed_tokens(torch.cat([self.draft[rows], shadow], dim=1).to(device))  # (n, T + W, D)
        if alpha is not None:  # Eq. 2 where the draft has a mask
            masked = (~drafted).nonzero()[:, 0].to(device)
            where = index.to(device)[masked], cells[:, 1].to(device)[masked]
            x = mix(x, where, alpha[masked], delta[masked], model.embedding[model.config.mask_id])
        behind = torch.arange(T + W) >= T  # (T + W,) is it in the shadow?
        stop = torch.where(behind, end[rows, None], self.lengths[rows, None])  # (n, T + W)
        key = (at < stop)[:, None, :] & (behind[:, None] | ~behind)  # (n, T + W, T + W): query, key
        own = (at[:, :, None] == at[:, None, :]) & behind[:, None] & ~behind
        hidden = model(x, at.to(device), (key & ~own)[:, None].to(device))
        column = torch.where(drafted, T + cells[:, 1] - begin[cells[:, 0]], cells[:, 1])
        return hidden[index.to(device), column.to(device)]

    def look(self, logits: Tensor, draft: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """The token of each cell, drafted or likeliest, and its p: (N,) each. logits (N, V)."""

        def rows(logits: Tensor, draft: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
            p = softmax(logits)[1]
            token = torch.where(drafted, draft, p.argmax(-1))
            return token, p.gather(-1, token[:, None])[:, 0]

        device = logits.device
        return by_rows(rows, tile(logits), logits, draft.to(device), drafted.to(device))

    def commit(self, c: Candidates, s: Sampler) -> Tensor:
        return self.full[c.row]
