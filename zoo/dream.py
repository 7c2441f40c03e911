"""Dream-7B and DiffuCoder-7B: Qwen2.5-7B made bidirectional.

Logits stay shifted: row i - 1 predicts token i. Queries, keys and values have biases. The mask is 151666;
151665 is <|beginoftext|>, with which no prompt needs to begin. DiffuCoder's licence is not permissive: see
its model card.

Decoding: Fast-dLLM's threshold 0.9 in blocks of 32 loses at most a point on most tasks (arXiv 2505.22618,
Table 2). The authors' own way, one token a step over the whole canvas, is --block_size=0 with
--rule=lowest-entropy (their alg `entropy`), static (`maskgit_plus`) or margin (`topk_margin`). The tokens are
the same at temperature 0, except for the last two: their schedule commits both in one step, and none in the
first. Above temperature 0 theirs ranks by the tempered, filtered distribution. Their `origin` and alg_temp
are not built.
"""

from torch import Tensor

from rcd import Candidates, Sampler, by_rows, entropy_of, softmax, tile
from zoo.family import Family, Plan, Settings, Source, standard_config, standard_name


def entropies(c: Candidates) -> Tensor:
    """H(p) (N,) in nats of each candidate."""
    (entropy,) = by_rows(lambda z: (entropy_of(*softmax(z)),), tile(c.logits), c.logits)
    return entropy.to(c.row.device)


def lowest_entropy(c: Candidates, s: Sampler) -> Tensor:
    """Commit rule: the cells of lowest entropy (Dream's alg `entropy`)."""
    return c.best(-entropies(c))


def margin(c: Candidates, s: Sampler) -> Tensor:
    """Commit rule: the cells whose two likeliest tokens are furthest apart (Dream's alg `topk_margin`)."""
    def difference(z: Tensor) -> tuple[Tensor]:
        return (softmax(z)[1].topk(2).values.diff(dim=-1)[:, 0],)  # p2 - p1

    (negative_margin,) = by_rows(difference, tile(c.logits), c.logits)
    return c.best(-negative_margin.to(c.row.device))


def plan(s: Settings, source: Source) -> Plan:
    s.expect("use_mrope", False)
    config = standard_config(s, source, mask_id=151666, eos_ids=(151643, 151645), pad_id=151643,
                             qkv_bias=True, logit_shift=True)  # fmt: skip
    template = None if "base" in source.label.lower() else "dream"
    defaults = {"rule": "threshold", "threshold": 0.9, "block_size": 32, "carry": "none"}
    return Plan("Dream", config, standard_name, template, defaults)


FAMILY = Family("Dream", ("dream",), plan, {
    "Dream-org/Dream-v0-Base-7B": ("7.6B", "-", "151666"),
    "Dream-org/Dream-v0-Instruct-7B": ("7.6B", "-", "151666"),
    "apple/DiffuCoder-7B-Instruct": ("7.6B", "-", "151666"),
    "apple/DiffuCoder-7B-cpGRPO": ("7.6B", "-", "151666"),
})  # fmt: skip
