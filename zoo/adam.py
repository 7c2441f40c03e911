"""AdamW whose two moments are stored in bfloat16: 4 bytes a parameter in place of 8."""

import torch
from torch import Tensor


def rounded(x: Tensor, seed: int) -> Tensor:
    """x (float32) as bfloat16, up or down by chance: the mean over all seeds is x.

    The next number of bfloat16 is up to 1/128 away. Of smaller changes, such as those of a second moment
    that moves by a fiftieth of its way, nothing would ever arrive if it were rounded to the nearest.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + draws) & ~0xFFFF).view(torch.float32).bfloat16()


def own(x: Tensor) -> Tensor:
    """What this process holds of x: its rows under FSDP2, else all."""
    return x.to_local() if hasattr(x, "to_local") else x


class AdamW(torch.optim.AdamW):
    """Takes the step of torch.optim.AdamW, in float32, from the moments as they are stored. Chance depends on
    the number of the step alone: a resumed run goes on to the same bits."""

    @torch.no_grad()
    def step(self) -> None:
        every = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, p) in enumerate(every):
            if p.grad is None:
                continue
            state, rate, (beta1, beta2) = self.state[p], group["lr"], group["betas"]
            if not state:
                state["step"] = torch.zeros(())
                state |= {k: torch.zeros_like(p, dtype=torch.bfloat16) for k in ("exp_avg", "exp_avg_sq")}
            state["step"] += 1
            n, w, g, m, v = int(state["step"]), *map(own, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
            mean = m.float().lerp_(g, 1 - beta1)
            square = v.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
            spread = (square / (1 - beta2**n)).sqrt_().add_(group["eps"])
            w.mul_(1 - rate * group["weight_decay"]).addcdiv_(mean, spread, value=-rate / (1 - beta1**n))
            m.copy_(mean)
            v.copy_(rounded(square, n * len(every) + i))
