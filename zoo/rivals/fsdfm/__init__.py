"""FS-DFM, few-step discrete flow matching (arXiv 2509.20624): a text in a handful of jumps.

Time runs from t = 0, noise, to t = 1, data. On the way each token of x_t is the clean one with probability t,
else one of the source x_0: a uniform draw (or a mask). The network reads x_t, t and the size h of the step to
come, and predicts p, the distribution of each clean token. No position is ever final: while t < 1 each may
jump from its token z to another one, x, with the rate

    u_t(x, z) = g(t) (p(x) - 1{x = z}),   g(t) = 1 / (1 - t)                                    (velocity)

A step is finite, and g grows within it. FS-DFM takes the mean of g over the step, so that a step of any size
jumps as often as many small ones would, if p stayed the same:

    gbar(t, h) = 1/h integral of g from t to t + h = 1/h log((1 - t) / (1 - t - h))   (cumulative scalar, 4.3)
    P(jump) = 1 - exp(-h gbar(t, h) (1 - p(z))),   to x != z with probability p(x) / (1 - p(z))         (jump)

Training has two stages:

    dfm   ordinary flow matching by the path loss (Eq. 3.8), for many small steps
    few   the student, from stage dfm. It learns to do in one step of size h what its own moving average does
          in steps of h/2: the logits of four evaluations, with jumps in between, are averaged (RK-4 shortcut
          teacher), and the loss is KL(teacher, student). The smallest step learns from data: path loss.

Sampling takes S steps of 1/S. The last is no jump: every token is drawn from p.

`python -m zoo.rivals.fsdfm train` and `sample` are in __main__.py, the network in dit.py.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rcd import check
from zoo.rivals.fsdfm.dit import DiT, DiTConfig

GRID = 1024  # the smallest step is 1/1024, and times are multiples of it
Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, T), t (B,), h (B,) -> logits (B, T, V)

# ---- 1. Path, velocity and jump ----------------------------------------------------------------------------


def source(c: DiTConfig, like: Tensor, generator: Generator | None) -> Tensor:
    """x_0 in the shape (B, T) of `like`: masks, or uniform draws of all tokens but the mask."""
    if c.source == "mask":
        return torch.full_like(like, c.mask_id)
    x = torch.randint(c.vocab_size - 1, like.shape, generator=generator, device=like.device)
    return x + (x >= c.mask_id)


def path(c: DiTConfig, x_1: Tensor, t: Tensor, generator: Generator | None) -> Tensor:
    """x_t (B, T): each token of x_1 (B, T) with probability t (B,), else one of x_0. Linear: kappa(t) = t."""
    kept = torch.rand(x_1.shape, generator=generator, device=x_1.device) < t[:, None]
    return torch.where(kept, x_1, source(c, x_1, generator))


def movable(c: DiTConfig, x: Tensor) -> Tensor:
    """Where x (B, T) may change, bool (B, T): everywhere, or if the source is made of masks, only they."""
    return (x == c.mask_id) | (c.source == "uniform")


def instantaneous(t: Tensor, h: Tensor) -> Tensor:
    """g(t) = kappa'(t) / (1 - kappa(t)), whatever the step is."""
    return 1 / (1 - t).clamp(min=1e-8)


def cumulative(t: Tensor, h: Tensor) -> Tensor:
    """gbar(t, h), the mean of g over [t, t + h]."""
    return ((1 - t).clamp(min=1e-8) / (1 - t - h).clamp(min=1e-8)).log() / h


# The scalar in front of the velocity: t, h (B,) -> (B,). "one": h times it is 1 (mixture_euler in the
# authors' code), so that small steps jump far too often.
RATES = {"cumulative": cumulative, "instantaneous": instantaneous, "one": lambda t, h: 1 / h}


def draw(p: Tensor, generator: Generator | None) -> Tensor:
    """Tokens (B, T) drawn from p (B, T, V), which need not sum to 1: argmax p / Exp(1) is such a draw."""
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def probabilities(logits: Tensor) -> Tensor:
    """Softmax in float64, where small probabilities are drawn as often as they should be. MPS has none."""
    return logits.softmax(-1, dtype=torch.float32 if logits.device.type == "mps" else torch.float64)


def jump(c: DiTConfig, logits: Tensor, x: Tensor, t: Tensor, h: Tensor, generator: Generator | None,
         rate: str = "cumulative") -> Tensor:  # fmt: skip
    """x_{t+h} (B, T) from x = x_t (B, T), logits (B, T, V) and t, h (B,)."""
    others = probabilities(logits).scatter(-1, x[..., None], 0)  # p without the current token
    leave = -torch.expm1(-(h * RATES[rate](t, h))[:, None] * others.sum(-1))  # (B, T)
    jumps = torch.rand(x.shape, generator=generator, device=x.device, dtype=leave.dtype) < leave
    return torch.where(jumps & movable(c, x), draw(others, generator), x)


# ---- 2. Losses ---------------------------------------------------------------------------------------------


def path_loss(logits: Tensor, x: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """The generalized KL of the path (Eq. 3.8), mean over positions -> (B,). Least where p is the posterior:

    -g(t) (p(x_t) - 1{x_t = x_1} + 1{x_t != x_1} log p(x_1)).   logits (B, T, V); x = x_t, x_1 (B, T); t (B,)
    """
    log_p, same = logits.log_softmax(-1), (x == x_1).float()
    log_p_1, p_t = (log_p.gather(-1, token[..., None])[..., 0] for token in (x_1, x))  # (B, T)
    return -instantaneous(t, t) * (p_t.exp() - same + (1 - same) * log_p_1).mean(-1)


def rk4(c: DiTConfig, teacher: Network, x: Tensor, t: Tensor, h: Tensor, generator: Generator | None,
        rate: str = "cumulative") -> Tensor:  # fmt: skip
    """Algorithm 1: logits (B, T, V) for the step from t to t + h, by four evaluations at h/2. Each starts
    where the jump of the one before it has led. Textbook RK-4 would start each anew from x_t."""
    half, middle = h / 2, t + h / 2
    z_1 = teacher(x, t, half)
    x = jump(c, z_1, x, t, half, generator, rate)
    z_2 = teacher(x, middle, half)
    x = jump(c, z_2, x, middle, half, generator, rate)
    z_3 = teacher(x, middle, half)
    x = jump(c, z_3, x, middle, half, generator, rate)
    z_4 = teacher(x, t + h, half)
    return (z_1 + 2 * z_2 + 2 * z_3 + z_4) / 6


def rk2(c: DiTConfig, teacher: Network, x: Tensor, t: Tensor, h: Tensor, generator: Generator | None,
        rate: str = "cumulative") -> Tensor:  # fmt: skip
    """The cheaper teacher: two evaluations."""
    z_1 = teacher(x, t, h / 2)
    x = jump(c, z_1, x, t, h / 2, generator, rate)
    return (z_1 + teacher(x, t + h / 2, h / 2)) / 2


TEACHERS = {"rk4": rk4, "rk2": rk2}


def step_sizes(rows: int, done: float, generator: Generator | None, device: torch.device | str = "cpu"):
    """h (B,), one of 1, 1/2, ..., 1/1024, and t (B,) on the grid, t + h <= 1. Small steps come first: 2^-k
    has the weight 2^k, doubled ten times while `done` goes from 0 to 1, but never above 1,024."""
    k = torch.arange(11, device=device)
    weight = (2.0 ** (k + int(10 * done))).clamp(max=GRID)
    h = 0.5 ** k[torch.multinomial(weight, rows, replacement=True, generator=generator)]
    u = torch.rand(rows, generator=generator, device=device)
    return h, (u * ((1 - h) * GRID + 1)).floor() / GRID


def few_step_loss(model: DiT, teacher: Network, x_1: Tensor, generator: Generator | None, done: float = 0.0,
                  rule: str = "rk4", rate: str = "cumulative") -> Tensor:  # fmt: skip
    """Stage few (Eq. 4.5): KL(teacher, student) over the vocabulary, and the path loss at h = 1/1024."""
    h, t = step_sizes(len(x_1), done, generator, x_1.device)
    x = path(model.config, x_1, t, generator)
    logits, least = model(x, t, h), h * GRID < 2  # (B, T, V), (B,)
    with torch.no_grad():
        rows = x[~least], t[~least], h[~least]
        target = TEACHERS[rule](model.config, teacher, *rows, generator, rate).log_softmax(-1)
    kl = F.kl_div(logits[~least].log_softmax(-1), target, log_target=True, reduction="none").sum(-1).mean(-1)
    return torch.cat([kl, path_loss(logits[least], x[least], x_1[least], t[least])]).mean()


# ---- 3. Sampling -------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: Network, c: DiTConfig, canvas: Tensor, steps: int, generator: Generator | None = None,
           rate: str = "cumulative", temperature: float = 1.0) -> Iterator[Tensor]:  # fmt: skip
    """Fill every [MASK] of canvas (B, T) in so many forward passes. Yields x (B, T) after each. Given tokens
    stay. temperature: p is softmax(logits / temperature), in jumps and in the last draw. Raises ValueError
    for more steps than the 1,024 that were trained."""
    check(1 <= steps <= GRID, f"steps={steps} must lie between 1 and {GRID}")
    fill, h = canvas == c.mask_id, torch.full((len(canvas),), 1 / steps, device=canvas.device)
    x = torch.where(fill, source(c, canvas, generator), canvas)
    for s in range(steps):
        logits, t = model(x, s * h, h) / temperature, s * h
        last = s == steps - 1
        new = draw(probabilities(logits), generator) if last else jump(c, logits, x, t, h, generator, rate)
        x = torch.where(fill & movable(c, x), new, x)
        yield x
