"""Other papers' ways to decode in few passes, behind the seams of rcd.py: the same loop, the same loss.

| method | file | what it says | source |
|---|---|---|---|
| *commit rules*: `--rule=NAME`, with any carry | | | |
| `factor`, Fast-dLLM | rules.py | the n surest with (n + 1)(1 - c_n) < f | arXiv 2505.22618 |
| `klass`, KLASS | rules.py | c > 0.9, and KL(p_t, p_(t-1)) < 0.01 twice in a row | arXiv 2511.05664 |
| `r2`, `r2-spatial`, `r2-temporal` | r2.py | c >= 0.9; window, run, streak at 0.8 | arXiv 2604.18995 |
| `wino`, WINO | wino.py | commit c > 0.6, revoke p < 0.9 by a shadow block | arXiv 2507.18578 |
| `policy`, learned unmasking | policy/ | Bernoulli(s_i) of a small network, by GRPO | arXiv 2512.09106 |
| `entropy-bounded`, EB-sampler | ../decoding.py | H_1 + ... + H_(k-1) <= bound | arXiv 2505.24857 |
| *carries without training*: `--weight=NAME` | | | |
| `remix`, `--js_reset`, ReMix | remix.py | half of a nucleus's E, none where JS > 0.3 | arXiv 2602.22868 |
| `fixed`, EvoToken's soft state | ../decoding.py | `--fixed=0.25 --residual_top_k=3` | arXiv 2601.07351 |
| *carries that are trained*: `train.py --recipe=NAME` | | | |
| `soft-mask` | softmask.py | lambda = w_s sigmoid(w_a (-H - w_b)), top 3 | arXiv 2510.17206 |
| `loopholing`, Loopholing | loopholing.py | E[MASK] + LayerNorm(h) | arXiv 2510.19304 |
| `relay`, in kind | loopholing.py | E[MASK] + RMSNorm(h), gradient through 2 steps | arXiv 2605.22967 |
| `gemma`, DiffusionGemma | gemma.py | E[MASK] + FFN(norm(p.E)) | arXiv 2608.00146 |
| `loop`, LoopMDM, in kind | looped.py | layers n/4 to n/2 applied twice; no carry | arXiv 2605.26106 |
| `scmdm`, self-conditioned | ../../rcd.py | own p.E at the same noise level, half of the rows | SCMDM |
| `trajectory`, as PUMBA trains | ../recipes.py | own steps, gradient through --window | Apple, 2026 |

Numbers are the papers': the rules read --threshold, --factor and so on.
A trained carry is part of the model (carries.py): every Decoding of it uses it. It can also be trained as RCD
is by default, on own trajectories: `--recipe=NAME-trajectory`; `loop-trajectory` is RCD with looped layers.
Where a paper is read with a liberty, its file says so. R2-dLLM's fine-tuning, in kind, is redundancy/. Not
here: tokens that stay revisable (EvoToken, DMax).
"""

from zoo.rivals import carries
from zoo.rivals.policy import Acting
from zoo.rivals.r2 import R2, Spatial, Temporal
from zoo.rivals.remix import Reset, remix  # noqa: F401 (Reset is for zoo.decoding)
from zoo.rivals.rules import Klass, Notes, factor, looks_back
from zoo.rivals.wino import Wino

# Commit rules: those that look back, by the reader that remembers for them, and all of them.
NOTES: dict[str, type[Notes]] = {
    "klass": Klass, "r2": R2, "r2-spatial": Spatial, "r2-temporal": Temporal, "wino": Wino, "policy": Acting,
}  # fmt: skip
RULES = {"factor": factor} | dict.fromkeys(NOTES, looks_back)

# Carries by the name of their weight, instead of alpha and p.E: (logits, E) -> alpha, Delta.
CARRIES = {"remix": remix, "learned": carries.learned}

# Recipes of train.py: the weight that the sampler is told, and the share of rows that read no residual.
RECIPES = {name + way: {"weight": "learned"} for name in carries.OWN for way in ("", "-trajectory")}
RECIPES |= {"scmdm": {"weight": "fixed", "fixed": 0.5}, "loop": {"weight": "fixed", "fixed": 0.0}}
RECIPES |= {"loop-trajectory": {"weight": "entropy"}}  # as RCD's own recipe has it
ABSENT = {"soft-mask": 0.2, "loopholing": 0.3, "relay": 0.3, "gemma": 0.5, "scmdm": 0.5}
