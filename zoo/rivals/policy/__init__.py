"""Learned unmasking (arXiv 2512.09106, Apple, ICML 2026): a small network decides which cells to fix now.

Denoising is a decision process. State: the canvas, with the confidence c_i of each masked cell after a pass.
Action: u_i in {0, 1} for each masked cell, u_i ~ Bernoulli(s_i) independently, s_i = sigmoid of the policy's
logit. Transition: the cells with u_i = 1 get their likeliest tokens; if there are none, the cell of largest
s_i does. At the end comes one reward,

    R = r (1 - passes / T)^a,   r: is the answer right? T: its masks, so one pass a mask earns nothing

(a = 0 rewards what is right, a large one few passes.) GRPO: G rollouts of each puzzle; the advantage is the
reward less the mean of its group, A = R - mean R; the gradient is that of A log pi, summed over all passes
and masked cells. Rollouts serve one update, so the paper's clipped ratio is 1 and has no effect; no KL term.

The network sees c_i, whether i is masked, and passes / T, and nothing of the tokens: one transformer block
with adaptive norms, 297 thousand parameters. Ours is the start: the logit of a soft threshold at 0.9 is
added, so training begins from a rule that works, where the paper has 15 thousand problems to find one.
`python -m zoo.rivals.policy` trains one, `--rule=policy --policy=FILE` uses it, with any carry.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rcd import Attention, Candidates, Config, Reader, Sampler, check
from zoo.rivals.rules import Notes

WIDTH, HIDDEN, HEADS = 128, 512, 2
STEEPNESS, START = 40.0, 0.9  # the soft threshold: logit = 40 (c - 0.9), s = 0.98 at c = 1


class Policy(nn.Module):
    """confidence, masked (B, T), time (B,) -> logits (B, T) of committing each cell now."""

    def __init__(self):
        super().__init__()
        self.config = Config(d_model=WIDTH, n_head=HEADS, n_kv_head=HEADS, head_dim=WIDTH // HEADS,
                             qk_norm=False)  # fmt: skip
        self.features, self.attention = nn.Linear(2, WIDTH), Attention(self.config, 0)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)  # AdaLN-zero: shift, scale and gate of both halves
        self.out = nn.Linear(WIDTH, 1)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(self, confidence: Tensor, masked: Tensor, time: Tensor) -> Tensor:
        half, T = WIDTH // 2, confidence.shape[1]
        angles = 1000 * time[:, None] * 10000 ** (-torch.arange(half) / half)  # (B, 64)
        embedded = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, 128)
        first, second = self.modulation(F.silu(embedded))[:, None].chunk(2, dim=-1)  # (B, 1, 3 * 128)
        (shift, scale, gate), (shift2, scale2, gate2) = first.chunk(3, dim=-1), second.chunk(3, dim=-1)
        turns = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-torch.arange(turns) / turns)  # (32,)
        angles = torch.arange(T)[:, None] * frequencies  # (T, 32)
        x = self.features(torch.stack([confidence, masked.float()], dim=-1))  # (B, T, 128)
        h = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.attention(h, angles.cos()[None, None], angles.sin()[None, None], None, None)
        h = self.norm(x) * (1 + scale2) + shift2
        x = x + gate2 * self.down(F.gelu(self.up(h)))
        return STEEPNESS * (confidence - START) + self.out(x)[..., 0]


class Act(NamedTuple):
    """What the policy saw and did after one pass, in the rows that took it."""

    rows: Tensor  # (n,)
    confidence: Tensor  # (n, T) at the masked cells, else 0
    masked: Tensor  # (n, T) bool
    time: Tensor  # (n,) passes before this one, as a share of T
    u: Tensor  # (n, T) bool


class Acting(Notes):
    """The commit rule `policy`. acts: if it is a list, every Act is appended to it."""

    def __init__(self, read: Reader, s: Sampler):
        super().__init__(read, s)
        self.net: Policy | None = None  # default: the one in the file that Decoding.policy names
        self.acts: list[Act] | None = None
        self.count = torch.zeros_like(self.lengths)  # (B,) passes so far
        inside = torch.arange(self.tokens.shape[1]) < self.lengths[:, None]
        self.most = (inside & (self.tokens == self.model.config.mask_id)).sum(1).clamp(min=1)  # (B,) T

    def commit(self, c: Candidates, s: Sampler) -> Tensor:
        self.net = self.net or load(s.policy)
        confidence, masked = torch.zeros(self.tokens.shape), torch.zeros_like(self.tokens, dtype=torch.bool)
        confidence[c.row, c.column], masked[c.row, c.column] = c.confidence, True
        rows, index = c.row.unique(return_inverse=True)
        seen = confidence[rows], masked[rows], self.count[rows] / self.most[rows]
        with torch.autocast("cpu", enabled=False):  # as it will be trained
            chance = self.net(*seen).sigmoid()[index, c.column]  # (N,) s_i
        device = c.generator.device if c.generator else None
        u = torch.rand(len(chance), generator=c.generator, device=device).cpu() < s.policy_speed * chance
        if self.acts is not None:
            on_canvas = torch.zeros_like(seen[1]).index_put((index, c.column), u)
            self.acts.append(Act(rows, *seen, on_canvas))
        self.count[rows] += 1
        some = torch.zeros(len(rows), dtype=torch.bool).index_put((index[u],), torch.tensor(True))
        return u | (~some[index] & (c.rank(chance) == 0))


def reward(right: Tensor, passes: Tensor, most: Tensor, power: float) -> Tensor:
    """R (B,) of right (B,) bool, passes (B,) and T (B,)."""
    return right * (1 - passes / most) ** power


def grpo_loss(net: Policy, acts: list[Act], rewards: Tensor, group: int) -> Tensor:
    """Minus the mean over rollouts of A log pi. rewards (B,): the rollouts of a puzzle, `group` of them, are
    neighbours. If all of a group earned the same, it teaches nothing and is left out."""
    grouped = rewards.view(-1, group)
    advantage, loss = (grouped - grouped.mean(1, keepdim=True)).flatten(), rewards.new_zeros(())
    for act in acts:
        k = advantage[act.rows] != 0
        if k.any():
            logits = net(act.confidence[k], act.masked[k], act.time[k])  # (n, T)
            cost = F.binary_cross_entropy_with_logits(logits, act.u[k].float(), reduction="none")  # -log pi
            loss = loss + (advantage[act.rows[k]] * (cost * act.masked[k]).sum(1)).sum()
    return loss / len(rewards)


def load(path: str | Path) -> Policy:
    """The policy in a file. Raises ValueError that says what is wrong."""
    check(bool(path), "rule=policy needs a policy: --policy=FILE (python -m zoo.rivals.policy trains one)")
    check(Path(path).is_file(), f"there is no policy {path}")
    net = Policy()
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{path} is no policy of this version: {why}") from None
    check(all(bool(p.isfinite().all()) for p in net.parameters()), f"{path} holds what is not a number")
    return net.requires_grad_(False)
