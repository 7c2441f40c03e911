"""What the families add to the sampler: their own decoding loops, and the options of zoo.decoding.

The loops are written out from their descriptions one token at a time. Their forwards are those of the classes
in `transformers`, over everything that the loop may see and without a cache. Ours run on batches of unequal
rows, with the cache where there is one. One liberty: no loop here may draw the mask or a padded row of the
table.
"""

import functools
import math
from dataclasses import replace

import peers
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampler import (BUDGETS, CANVASES, CHOICES, CLOSE, KINDS, P, algorithm_2, choose, decoding, drain,
                          follows_a_budget, follows_algorithm_2, frequencies, host_waits_once_a_step,
                          logits_of, positions_are_written_once, rows_are_independent, same,
                          work_does_not_grow)  # fmt: skip
from tiny_checkpoints import (LLADA, LLADA2, MASK, SIZES, full_head_llama, glm, llada2_tensors, llada_tensors,
                              randomise, their_logits, write)  # fmt: skip

import rcd
import zoo
from rcd import RULES, Candidates, Residual
from zoo import rivals
from zoo.decoding import Carry, Decoding
from zoo.dream import entropies

LONG = {**SIZES, "max_position_embeddings": 160}


def checkpoint(folder, family: str, sharpness: float, **changes):
    """A random checkpoint: (forward, loaded). forward: tokens -> logits (T, V) in float64 by its original
    class. loaded: what it is here."""
    if family == "llada2":
        model, name = glm(), "LLaDA2.0-mini"
        how = dict(tensors=llada2_tensors, values=LLADA2, num_hidden_layers=3)
    elif family == "llada":
        model, name, how = full_head_llama(), "LLaDA-8B-Instruct", dict(tensors=llada_tensors, values=LLADA)
    elif family in ("Dream", "Fast_dLLM_Qwen"):
        config = transformers.Qwen2Config(**LONG, tie_word_embeddings=False)
        model, name, how = randomise(transformers.Qwen2ForCausalLM(config)), family, dict(model_type=family)
    else:
        config = transformers.Qwen3Config(**LONG, head_dim=16, tie_word_embeddings=False)
        model, how = randomise(transformers.Qwen3ForCausalLM(config)), dict(model_type=family)
        name = {"sdar": "SDAR", "a2d-qwen3": "bd3lm" if changes.get("block_size") else "mdlm"}[family]
    model.lm_head.weight.data *= sharpness
    if "tensors" in how:
        how["tensors"] = how["tensors"](model)
    loaded = zoo.load(write(folder / name, model, **how, **changes))
    block = loaded.model.config.block_size

    def forward(tokens: list[int]) -> torch.Tensor:
        z = their_logits(model, torch.tensor([tokens]), block)[0].double()
        z[:, MASK:] = -math.inf
        return z

    return forward, loaded


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def argmax(z: torch.Tensor, _cells: list[int]) -> list[int]:
    return z.argmax(-1).tolist()


def top(scores: dict[int, float], k: int) -> list[int]:
    return sorted(sorted(scores, key=lambda i: -scores[i])[:k])


def ours(loaded: zoo.Loaded, rows: list, lengths: list[int], s: Decoding, generator=None) -> list:
    """For every row: (canvas, cells committed) after each of its forwards."""
    canvas = torch.full((len(rows), max(lengths)), MASK)
    for i, row in enumerate(rows):
        canvas[i, : len(row)] = torch.tensor(row)
    records: list[list[tuple]] = [[] for _ in rows]
    for step in rcd.denoise(loaded.model, canvas, s, lengths=torch.tensor(lengths), generator=generator):
        for i, n in enumerate(lengths):
            if step.committed[i].any():
                records[i].append((step.tokens[i, :n].tolist(), step.committed[i].nonzero()[:, 0].tolist()))
        nfe = step.nfe.tolist()
    guided = 2 if s.guidance else 1
    assert nfe == [guided * len(r) for r in records]
    return records


def says_something(records: list[list[tuple]], several: bool = True) -> None:
    """Not always the same token; and some forwards commit one, some several."""
    counts = {len(committed) for record in records for _, committed in record}
    assert not several or len(counts) > 1, counts
    drawn = {tokens[i] for record in records for tokens, committed in record for i in committed}
    assert len(drawn) > 4, drawn


@pytest.mark.parametrize("family, changes", [
    ("sdar", dict(block_size=4)), ("llada", {}), ("llada2", dict(block_size=4)), ("Dream", {}),
    ("Fast_dLLM_Qwen", dict(bd_size=8)), ("a2d-qwen3", {}), ("a2d-qwen3", dict(block_size=8)),
])  # fmt: skip
def test_probabilities_with_padding_and_cache(tmp_path, family, changes):
    """Every probability that a run on a padded batch looks at is that of the original's forward on the one
    row, to 1e-5."""
    forward, loaded = checkpoint(tmp_path, family, 2, **changes)
    c, rows = loaded.model.config, prompts(3, 8, 13)
    b, spread = c.block_size or 1, []
    lengths = [-(-(len(row) + 12) // b) * b for row in rows]
    before = [row + [MASK] * (n - len(row)) for row, n in zip(rows, lengths)]
    canvas = torch.tensor([row + [7] * (max(lengths) - len(row)) for row in before])
    s = replace(Decoding(**loaded.defaults), rule="static", steps=10)
    for step in rcd.denoise(loaded.model, canvas, s, lengths=torch.tensor(lengths)):
        for i, n in enumerate(lengths):
            cells = step.confidence[i].nonzero()[:, 0]
            if len(cells):
                z = forward(before[i][: (int(cells[-1]) // b + 1) * b] if c.block_size else before[i])
                expected = z[cells - int(c.logit_shift)].softmax(-1).amax(-1)
                assert torch.allclose(step.confidence[i, cells].double(), expected, atol=1e-5, rtol=0)
                spread.append(expected)
            before[i] = step.tokens[i, :n].tolist()
    assert len(torch.cat(spread)) > 50 and torch.cat(spread).std() > 0.01  # or the oracle says nothing


# ---- SDAR and LLaDA2: block by block, dynamic (threshold, else n[s]) or static


def sdar(forward, prompt, gen, B, steps, dynamic, threshold, stops, draw=argmax):
    total = -(-(len(prompt) + gen) // B) * B
    x, records = prompt + [MASK] * (total - len(prompt)), []
    schedule = [B // steps + (s < B % steps) for s in range(steps)]
    for start in range(len(prompt) // B * B, total, B):
        for n in schedule:
            cells = [i for i in range(start, start + B) if x[i] == MASK]
            if not cells:
                break
            z = forward(x[: start + B])[cells]
            token = dict(zip(cells, draw(z, cells)))
            p = z.softmax(-1)
            confidence = {i: p[k, token[i]].item() for k, i in enumerate(cells)}
            sure = [i for i in cells if confidence[i] > threshold]
            commit = sure if dynamic and len(sure) >= n else top(confidence, n)
            for i in commit:
                x[i] = token[i]
            records.append((list(x), commit))
        if any(t in stops for t in x[len(prompt) : start + B]):
            break
    return records


@pytest.mark.parametrize("family, rule, B", [
    ("sdar", "threshold", 4), ("sdar", "static", 4), ("sdar", "threshold", 8), ("llada2", "threshold", 4),
])  # fmt: skip
def test_sdar_and_llada2(tmp_path, family, rule, B):
    forward, loaded = checkpoint(tmp_path, family, 8, block_size=B)
    rows, stops = prompts(3, 8, 13), [256]
    s = replace(Decoding(**loaded.defaults), rule=rule, threshold=0.5)
    for _ in range(2):
        expected = [sdar(forward, row, 18, B, B, rule == "threshold", 0.5, stops) for row in rows]
        got = ours(loaded, rows, [-(-(len(row) + 18) // B) * B for row in rows], s)
        for row, mine, theirs in zip(rows, got, expected):
            assert [commit for _, commit in mine] == [commit for _, commit in theirs]
            answer = theirs[-1][0]
            end = next((i for i, t in enumerate(answer) if i >= len(row) and t in stops), len(answer))
            assert mine[-1][0][:end] == answer[:end]
        says_something(got, rule == "threshold")
        stops = [expected[2][-1][0][20]]  # once more, where the seventh token of the third answer ends it
        loaded.model.config.eos_ids = tuple(stops)
        assert stops[0] not in rows[2]
    assert len(got[2]) < 18  # it did


def test_sdar_draws_from_a_shared_stream(tmp_path):
    """Temperature 1: the multinomial draw of the original, on the masked cells, from the same generator.
    top_k = 1 is greedy."""
    forward, loaded = checkpoint(tmp_path, "sdar", 8)
    for row in prompts(6, 8):
        mine, theirs = (torch.Generator().manual_seed(3) for _ in range(2))

        def draw(z: torch.Tensor, _cells: list[int]) -> list[int]:
            return z.float().softmax(-1).multinomial(1, generator=theirs)[:, 0].tolist()  # noqa: B023

        s = replace(Decoding(**loaded.defaults), temperature=1.0, threshold=0.5)
        lengths = [-(-(len(row) + 16) // 4) * 4]
        [got] = ours(loaded, [row], lengths, s, mine)
        expected = sdar(forward, row, 16, 4, 4, True, 0.5, (256,), draw)
        greedy = sdar(forward, row, 16, 4, 4, True, 0.5, (256,))
        assert got == expected and got != greedy
        assert ours(loaded, [row], lengths, replace(s, top_k=1), mine) == [greedy]


# ---- LLaDA, and dllm's mdlm, whose loop is LLaDA's: block by block, low-confidence remasking on a schedule


def llada(forward, prompt, gen, block, steps, draw=argmax, cfg=0.0):
    x, records = prompt + [MASK] * gen, []
    for start in range(len(prompt), len(x), block):
        masks, n_steps = block, steps // (gen // block)
        for n in [masks // n_steps + (k < masks % n_steps) for k in range(n_steps)]:
            cells = [i for i in range(start, start + block) if x[i] == MASK]
            z = forward(x)[cells]
            if cfg:
                u = forward([MASK] * len(prompt) + x[len(prompt) :])[cells]
                z = (u + (cfg + 1) * (z - u)).nan_to_num(nan=-math.inf)
            token, p = dict(zip(cells, draw(z, cells))), z.softmax(-1)
            commit = top({i: p[k, token[i]].item() for k, i in enumerate(cells)}, n)
            for i in commit:
                x[i] = token[i]
            records.append((list(x), commit))
    return records


@pytest.mark.parametrize("family, block, steps, cfg", [
    ("llada", 8, 24, 0.0), ("llada", 8, 15, 0.0), ("llada", 24, 7, 0.0), ("llada", 8, 15, 0.7),
    ("a2d-qwen3", 8, 24, 0.0),
])  # fmt: skip
def test_llada(tmp_path, family, block, steps, cfg):
    forward, loaded = checkpoint(tmp_path, family, 8)
    rows = prompts(3, 8, 13)
    defaults = Decoding(**loaded.defaults)
    s = replace(defaults, rule="static", steps=steps, block_size=block, guidance=cfg)
    loaded.model.config.eos_ids = ()  # the original goes on behind an end token
    expected = [llada(forward, row, 24, block, steps, cfg=cfg) for row in rows]
    assert ours(loaded, rows, [len(row) + 24 for row in rows], s) == expected
    says_something(expected, steps < 24)
    assert defaults.block_size == 32 and (family == "llada" or defaults.steps == 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_llada_draws_from_a_shared_stream(tmp_path, temperature):
    """Its Gumbel noise is exp(logits) / (-log u)^T in float64. -log u is exponentially distributed: e of our
    stream is u = exp(-e)."""
    forward, loaded = checkpoint(tmp_path, "llada", 2)
    loaded.model.config.eos_ids = ()
    for row in prompts(3, 8):
        streams = [torch.Generator().manual_seed(3) for _ in range(2)]

        def gumbel(z: torch.Tensor, cells: list[int]) -> list[int]:
            u = torch.empty(z.shape).exponential_(generator=streams[1]).double().neg().exp()  # noqa: B023
            return (z.exp() / (-u.log()) ** temperature).argmax(-1).tolist()

        s = replace(Decoding(**loaded.defaults), rule="static", steps=12, block_size=8)
        s = replace(s, temperature=temperature)
        expected = llada(forward, row, 16, 8, 12, gumbel)
        assert ours(loaded, [row], [len(row) + 16], s, streams[0]) == [expected]
        assert expected != llada(forward, row, 16, 8, 12)


def test_bd3lm_pads_on_the_left(tmp_path):
    """A prompt of whole blocks: the original's loop, one token a step. Any other: its padding moves the
    blocks, and so the logits."""
    forward, loaded = checkpoint(tmp_path, "a2d-qwen3", 8, block_size=8)
    loaded.model.config.eos_ids = ()
    whole, other = prompts(16, 13)
    expected = sdar(forward, whole, 16, 8, 8, False, 0, ())
    assert ours(loaded, [whole], [32], Decoding(**loaded.defaults)) == [expected]
    z = forward(other + [MASK] * 3)[13].softmax(-1)
    # The padded original: blocks of [5 (behind 3 pads), 8, 8 masks], positions without the pads.
    with torch.no_grad():
        model, at = loaded.model, torch.arange(21)[None]
        mask = peers.block_causal_mask(at + 3, at + 3, 8)[:, None]
        hidden = model(model.embed_tokens(torch.tensor([other + [MASK] * 8])), at, mask)
        padded = model.logits(hidden[0, 13:14]).softmax(-1)[0]
    assert (z - padded).abs().max() > 0.01


# ---- Dream: the whole canvas on a time schedule, ranked by one of three measures


def dream(forward, prompt, gen, steps, alg, eps=1e-3):
    x, records = prompt + [MASK] * gen, []
    time = torch.linspace(1, eps, steps + 1).tolist()
    for k in range(steps):
        cells = [i for i in range(len(x)) if x[i] == MASK]
        z = forward(x)
        z = torch.cat([z[:1], z[:-1]])[cells]
        p = z.softmax(-1)
        two = p.topk(2).values
        score = {"maskgit_plus": p.amax(-1), "topk_margin": two[:, 0] - two[:, 1],
                 "entropy": (p * (p + 1e-10).log()).sum(-1)}[alg]  # fmt: skip
        n = int(len(cells) * (1 - time[k + 1] / time[k])) if k < steps - 1 else len(cells)
        commit = top(dict(zip(cells, score.tolist())), n)
        for i in commit:
            x[i] = int(z[cells.index(i)].argmax())
        records.append((list(x), commit))
    return records


# Their alg, our rule.
DREAM = {"entropy": "lowest-entropy", "topk_margin": "margin", "maskgit_plus": "static"}


def test_dream(tmp_path):
    """As many steps as tokens. Theirs: none in the first, two in the last, one in every other. Ours: one in
    each."""
    forward, loaded = checkpoint(tmp_path, "Dream", 4)
    loaded.model.config.eos_ids = ()
    rows, orders = prompts(3, 8, 13), {alg: [] for alg in DREAM}
    for alg, rule in DREAM.items():
        s = replace(Decoding(**loaded.defaults), rule=rule, block_size=0)
        for row, mine in zip(rows, ours(loaded, rows, [len(row) + 16 for row in rows], s)):
            theirs = dream(forward, row, 16, 16, alg)
            assert [len(commit) for _, commit in theirs] == [0] + [1] * 14 + [2]
            assert mine[:-2] == theirs[1:-1]
            [first], [second] = mine[-2][1], mine[-1][1]  # the last two cells
            assert sorted([first, second]) == theirs[-1][1] and mine[-2][0][first] == theirs[-1][0][first]
            orders[alg].append([commit for _, commit in theirs])
        says_something([theirs])
    a, b, c = orders.values()
    assert a != b and b != c and c != a  # three measures, three orders


# ---- Fast-dLLM v2: sub-blocks inside a block, the first token of a block from the row before


def fast_dllm(forward, prompt, max_new, block, small, threshold, stop):
    def prediction(row: torch.Tensor) -> tuple[int, float]:
        return int(row.argmax()), row.softmax(-1).max().item()

    def ended(x: list[int]) -> bool:
        return stop in x[len(prompt) :] and MASK not in x[: x.index(stop, len(prompt))]

    x, records = list(prompt), []
    assert len(prompt) != block  # theirs would not read it
    if len(x) % block == 0:
        x.append(prediction(forward(x)[-1])[0])
        records.append((list(x), [len(x) - 1]))
    for _ in range(max_new // block):
        if stop in x[len(prompt) :]:
            break
        start = len(x) // block * block
        x += [MASK] * (start + block - len(x))
        for a in range(start, start + block, small):
            while MASK in x[a : a + small] and not ended(x):
                z = forward(x)
                guess = {i: prediction(z[i - 1]) for i in range(a, a + small) if x[i] == MASK}
                best = max(guess, key=lambda i: guess[i][1])
                commit = [i for i in guess if guess[i][1] > threshold or i == best]
                for i in commit:
                    x[i] = guess[i][0]
                records.append((list(x), commit))
        if ended(x):
            break
        x.append(prediction(forward(x)[-1])[0])
        records.append((list(x), [len(x) - 1]))
    return records


@pytest.mark.parametrize("bd_size, lengths", [(8, (3, 12, 16, 23)), (32, (5, 37, 64))])
def test_fast_dllm_v2(tmp_path, bd_size, lengths):
    forward, loaded = checkpoint(tmp_path, "Fast_dLLM_Qwen", 6, bd_size=bd_size)
    s, rows, stop = Decoding(**loaded.defaults), prompts(*lengths), -1
    assert s.sub_block == 8 and s.threshold == 0.9
    s = replace(s, threshold=0.5, sub_block=bd_size // 4)
    for _ in range(2):
        got = ours(loaded, rows, [(len(row) // bd_size + 2) * bd_size for row in rows], s)
        for row, mine in zip(rows, got):
            length = (len(row) // bd_size + 2) * bd_size
            theirs = fast_dllm(forward, row, 2 * bd_size, bd_size, bd_size // 4, 0.5, stop)
            theirs = [record for record in theirs if record[1][0] < length]
            assert [commit for _, commit in mine[: len(theirs)]] == [commit for _, commit in theirs]
            mine, theirs = mine[-1][0][len(row) :], theirs[-1][0][len(row) :]
            end = theirs.index(stop) if stop in theirs else length
            assert mine[:end] == theirs[:end] and (stop in theirs) == (stop in mine)
        says_something(got)
        stop = got[1][-1][0][len(rows[1]) + bd_size // 2 + 1]  # once more, where this token ends an answer
        loaded.model.config.eos_ids = (stop,)
    assert any(len(r) < bd_size for r in got)


def test_sub_blocks_of_any_model(tiny):
    """Left to right in sub-blocks of so many. The last of a block may be shorter."""
    canvas = torch.tensor([[1, 2] + [11] * 14, [1] * 9 + [11] * 7])
    for shift in (False, True):
        model = tiny(block_size=8, logit_shift=shift)
        steps = list(rcd.denoise(model, canvas, Decoding("threshold", threshold=0.0, sub_block=3)))
        second = [[8], [9, 10]] if shift else [[8, 9, 10]]
        expected = [[2], [3, 4, 5], [6, 7], *second, [11, 12, 13], [14, 15]]
        committed = [step.committed[0].nonzero()[:, 0].tolist() for step in steps]
        assert [cells for cells in committed if cells] == expected
        assert steps[-1].nfe.tolist() == [6 + shift, 3]
    with pytest.raises(ValueError, match="steps=5 is fewer than the 6 blocks or sub-blocks"):
        next(rcd.denoise(tiny(block_size=8), canvas, Decoding(steps=5, sub_block=3)))
    *_x, last = rcd.denoise(tiny(block_size=8), canvas, Decoding(steps=6, sub_block=3))
    assert last.nfe.tolist() == [6, 6]


def test_a_record_names_the_block_and_not_the_sub_block(tiny):
    steps = rcd.denoise(tiny(block_size=8), torch.full((1, 16), 11), Decoding(steps=6, sub_block=3))
    assert [step.block for step in steps] == [0] * 3 + [1] * 3


# ---- The options of zoo.decoding, against the transcription of Algorithm 2

_ = 11  # the mask of the tiny models; MASK is that of the checkpoints above
GUIDED_SELF = Decoding("threshold", threshold=0.7, guidance=0.5, start="self"), Residual(t_res=1.3)
OPTIONS = {
    "entropy-bounded": (Decoding(rule="entropy-bounded", entropy_bound=1.2), Residual()),
    "lowest-entropy": (Decoding(rule="lowest-entropy"), Residual()),
    "margin": (Decoding(rule="margin"), Residual()),
    "left-to-right": (Decoding(rule="left-to-right"), Residual()),
    "self": (Decoding(rule="threshold", threshold=0.6, start="self"), Residual()),
    "self, three passes": (Decoding("threshold", threshold=0.6, start="self", self_passes=3), Residual()),
    "temper_delta": (Decoding(start="warm"), Carry(t_res=0.7, temper_delta=True)),
    "guidance": (Decoding(guidance=0.8), Residual()),
    "guidance, self": GUIDED_SELF,
    "guidance, seqd": (Decoding(guidance=1.5, carry="none"), Residual()),
}


@pytest.mark.parametrize("kind, option", [
    (kind, option) for option, (s, _r) in OPTIONS.items() for kind in KINDS
    if s.guidance or s.self_passes > 1 or kind in ("full shifted", "blocks")  # the others change no forward
])  # fmt: skip
def test_algorithm_2_with_options(tiny, kind, option):
    follows_algorithm_2(tiny, kind, *OPTIONS[option])


@pytest.mark.parametrize("rule", ["entropy-bounded", "left-to-right", "margin"])
@pytest.mark.parametrize("kind, steps, shares", BUDGETS)
def test_rules_on_a_step_budget(tiny, rule, kind, steps, shares):
    follows_a_budget(tiny, kind, Decoding(rule, steps=steps, block_size=4, entropy_bound=0.3), shares)


@functools.cache
def without_an_approximate_cache(tiny, kind, choice):
    """The models, the choice, and of each canvas the transcription and a run in which a block is all of it:
    the same for both caches."""
    s, r = (CHOICES | OPTIONS)[choice]
    s = decoding(s, block_size=3)
    model, reference = tiny(seed=25, **KINDS[kind]), tiny(seed=44, d_model=8, n_layer=1, **KINDS[kind])
    exact = [algorithm_2(model, canvas, s, r, reference)[0] for canvas in CANVASES.values()]
    s = replace(s, block_size=0)
    whole = [drain(model, torch.tensor([x]), s, r, reference=reference) for x in CANVASES.values()]
    return model, reference, s, r, exact, whole


@pytest.mark.parametrize("choice", ["rcd", "threshold, seqd", "warm", "guidance, self"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("kind", ["full", "full shifted"])
@torch.no_grad()
def test_algorithm_2_on_approximate_caches(tiny, kind, cache, choice):
    model, reference, s, r, all_exact, all_whole = without_an_approximate_cache(tiny, kind, choice)
    apart, s = 0.0, replace(s, cache=cache, block_size=3)
    for canvas, exact, whole in zip(CANVASES.values(), all_exact, all_whole, strict=True):
        expected, margin = algorithm_2(model, canvas, s, r, reference)
        assert margin > CLOSE  # or choose another seed
        same(drain(model, torch.tensor([canvas]), s, r, reference=reference), expected)
        for (_t, _c, a, *_a), (_t, _c, b, *_b) in zip(expected, exact):  # confidence by cell
            apart = max([apart, *(abs(a[i] - b[i]) for i in a.keys() & b.keys())])
        kept = drain(model, torch.tensor([canvas]), replace(s, block_size=0), r, reference=reference)
        for one, other in zip(kept, whole, strict=True):  # a block that is the whole canvas: nothing to keep
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.nfe, other.nfe)
            torch.testing.assert_close(one.confidence, other.confidence)
            torch.testing.assert_close(one.alpha, other.alpha)
    assert apart > 0.01  # it is an approximation: what is kept would have changed


@pytest.mark.parametrize("kind, cache, s, r", [
    *((kind, "exact", *GUIDED_SELF) for kind in KINDS),
    *((kind, cache, *GUIDED_SELF) for kind in ("full", "full shifted") for cache in ("prefix", "dual")),
    ("full", "dual", *CHOICES["rcd"]), ("full shifted", "prefix", *CHOICES["rcd"]),
])  # fmt: skip
def test_rows_are_independent_with_options(tiny, kind, cache, s, r):
    block_sizes = (0,) if "blocks" in kind else (0, 4) if cache == "exact" else (4, 15)
    rows_are_independent(tiny, kind, decoding(s, cache=cache), r, block_sizes)  # 15: the canvas, but no row


def test_work_of_a_dual_cache_does_not_grow_with_the_canvas(tiny, monkeypatch):
    work_does_not_grow(tiny, "full", Decoding(cache="dual"), monkeypatch)


@pytest.mark.parametrize("s, r", [
    (Decoding(start="self", steps=3, block_size=4), Carry(t_res=0.8, weight="1-confidence")),
    (Decoding(rule="entropy-bounded", guidance=0.5), Residual()),
    (Decoding(rule="margin", cache="dual", block_size=4), Carry(residual_top_k=3)),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["full shifted", "blocks shifted"])
def test_the_host_waits_once_a_step_with_options(tiny, kind, s, r, monkeypatch):
    s = replace(s, cache="exact") if "blocks" in kind else s
    host_waits_once_a_step(tiny, kind, s, r, monkeypatch)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_position_of_an_approximate_cache_is_written_once_by_a_forward(tiny, cache, monkeypatch):
    positions_are_written_once(tiny, 0, Decoding(block_size=4, cache=cache), monkeypatch)


@pytest.mark.parametrize("kind, cache", [
    ("full", "exact"), ("full", "dual"), ("full shifted", "prefix"), ("blocks", "exact"),
    ("blocks shifted", "exact"),
])  # fmt: skip
@pytest.mark.parametrize("s, r", [CHOICES["threshold"], CHOICES["warm"], GUIDED_SELF])
@torch.no_grad()
def test_fixed_shapes_change_nothing_but_shapes(tiny, kind, cache, s, r):
    """Rows that end early, are half given, or have nothing to fill stay in the batch and disturb nobody."""
    s = decoding(s, cache=cache, block_size=4)
    model, reference = tiny(seed=26, **KINDS[kind]), tiny(seed=44, d_model=8, n_layer=1, **KINDS[kind])
    shapes = set()
    rows = [1] * 5 + [_] * 11, [1, 2] + [_] * 14, [1] * 16, [1] * 8 + [_] + [2] * 4 + [_] * 3
    canvas = torch.tensor(rows)
    lengths = torch.tensor([16, 10, 16, 16])
    plain = drain(model, canvas, s, r, lengths=lengths, reference=reference)

    def note(_model, inputs):
        x, mask = inputs[0], inputs[2]
        shapes.add((*x.shape[:2], *(mask.shape if mask is not None else ())))

    for m in (model, reference):
        m.register_forward_pre_hook(note)
    fixed = drain(model, canvas, replace(s, fixed_shapes=True), r, lengths=lengths, reference=reference)
    assert len(shapes) <= 5 and {shape[0] for shape in shapes} == {4}
    shapes.clear()
    drain(model, canvas[:2], replace(s, fixed_shapes=True), r, lengths=lengths[:2], reference=reference)
    assert {shape[-1] for shape in shapes if len(shape) > 2} <= {16}  # all keys, also of blocks to come
    for one, other in zip(plain, fixed, strict=True):
        for name in ("tokens", "committed", "nfe"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        torch.testing.assert_close(one.confidence, other.confidence, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.alpha, other.alpha, atol=1e-5, rtol=1e-4)


# ---- The draw, the commit rules and the first residual


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 6, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.7, 0.65, 0.6, 0.3, 1e-9])
def test_nucleus_and_top_k_by_brute_force(top_k, top_p):
    order = sorted(range(6), key=lambda j: -P[j])[:top_k]
    kept, mass, total = [], 0.0, sum(P[j] for j in order)
    for j in order:  # the likeliest tokens until they hold the mass top_p (of what top_k left)
        if kept and mass / total >= top_p - 1e-9:
            break
        kept.append(j)
        mass += P[j]
    expected = torch.tensor([P[j] if j in kept else 0.0 for j in range(6)])
    expected /= expected.sum()
    seen = frequencies(Decoding(temperature=1.0, top_k=top_k, top_p=top_p), 10_000)
    assert {j for j in range(6) if seen[j]} == {j for j in range(6) if expected[j]}
    assert (seen - expected).abs().max() < 0.02  # 4 standard deviations


@given(st.integers(0, 999), st.floats(0.1, 5), st.integers(0, 12), st.floats(0.05, 1))
def test_the_draw_does_not_change_the_confidence(seed, temperature, top_k, top_p):
    z = 4 * torch.randn(20, 12, generator=torch.Generator().manual_seed(seed))
    z[:, _] = -math.inf
    s = Decoding(temperature=temperature, top_k=top_k, top_p=top_p)
    token, confidence = rcd.predict(z, s, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(confidence, z.softmax(-1).gather(1, token[:, None])[:, 0])
    assert not (token == _).any()
    for narrow in (replace(s, top_k=1), replace(s, top_p=1e-9)):  # one token is left
        assert torch.equal(rcd.predict(z, narrow, torch.Generator().manual_seed(seed))[0], z.argmax(-1))


@settings(max_examples=200)
@given(st.data())
def test_commit_rules_by_brute_force(data):
    """Rows with different numbers of cells and quotas, each on its own. Scores come from p, cell by cell."""
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    cells = [(row, column) for row, n in enumerate(counts) for column in range(2, 2 + n)]
    quota = data.draw(st.lists(st.integers(1, 6), min_size=len(counts), max_size=len(counts)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = 3 * torch.rand(len(cells), 1, generator=g) * torch.randn(len(cells), 5, generator=g)
    p = [sorted(row, reverse=True) for row in logits.double().softmax(-1).tolist()]
    confidence = torch.rand(len(cells), generator=g)  # of the drawn token, which need not be the likeliest
    rule = data.draw(st.sampled_from(sorted(set(RULES) - {"random", *rivals.RULES})))
    s = Decoding(rule=rule, threshold=data.draw(st.floats(0, 1)), entropy_bound=data.draw(st.floats(0, 4)))
    accept = choose(s, cells, confidence, quota, logits)
    entropy = [-sum(q * math.log(q) for q in row) for row in p]
    score = {
        "static": confidence.tolist(), "threshold": confidence.tolist(),
        "left-to-right": [-column for _row, column in cells],
        "lowest-entropy": [-h for h in entropy], "entropy-bounded": [-h for h in entropy],
        "margin": [row[0] - row[1] for row in p],
    }[rule]  # fmt: skip
    for row, m in enumerate(quota):
        mine = [i for i, (r, _column) in enumerate(cells) if r == row]
        best = sorted(mine, key=lambda i: -score[i])
        if min((score[i] - score[j] for i, j in zip(best, best[1:])), default=1) < 1e-5:
            continue  # a tie in float32
        expected = set(best[:m])
        if rule == "threshold":
            expected |= {i for i in mine if confidence[i] > torch.tensor(s.threshold)}
        if rule == "entropy-bounded":
            sums = [sum(entropy[i] for i in best[:k]) for k in range(len(best))]  # of those before the k-th
            if min((abs(x - s.entropy_bound) for x in sums[1:]), default=1) < 1e-5:
                continue
            expected |= {i for i, before in zip(best, sums) if before <= s.entropy_bound}
        assert {i for i in mine if accept[i]} == expected


def test_the_sum_of_entropies_may_reach_its_bound():
    cells, confidence = [(0, 0), (0, 1), (0, 2)], torch.tensor([0.5, 0.75, 1.0])
    z = torch.cat([logits_of([1 / n] * n + [0] * (4 - n)) for n in (2, 3, 4)])  # uniform over n tokens
    h = entropies(Candidates(*torch.tensor(cells).T, confidence, torch.tensor([1]), z, None))
    assert h.tolist() == pytest.approx([math.log(2), math.log(3), math.log(4)])
    bounds = (h[0], [True, True, False]), (h[0] + h[1], [True] * 3), (h[0] * 0, [True, False, False])
    for bound, expected in bounds:
        s = Decoding(rule="entropy-bounded", entropy_bound=bound.item())
        assert choose(s, cells, confidence, [1], z) == expected


def test_the_random_rule_takes_every_cell_equally_often():
    pair = [(0, 3), (0, 4), (0, 5), (0, 9), (1, 0), (1, 1)]
    cells = [(row + 2 * k, column) for k in range(60) for row, column in pair]
    confidence = torch.tensor([0.9, 0.1, 0.1, 0.1, 0.1, 0.9] * 60)
    g, taken = torch.Generator().manual_seed(0), torch.zeros(6)
    for _i in range(50):
        accept = torch.tensor(choose(Decoding(rule="random"), cells, confidence, [3, 1] * 60, generator=g))
        accept = accept.view(60, 6)
        assert (accept[:, :4].sum(1) == 3).all() and (accept[:, 4:].sum(1) == 1).all()
        taken += accept.sum(0)
    draws = [choose(Decoding(rule="random"), cells, confidence, [3, 1] * 60,
                    generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]  # fmt: skip
    assert draws[0] == draws[1] != draws[2]
    assert ((taken / 3000 - torch.tensor([0.75] * 4 + [0.5] * 2)).abs() < 0.035).all()


def test_the_dirichlet_start_is_uniform_over_distributions(tiny):
    """Dirichlet(1, ..., 1) over what can be drawn: the mean entropy is the harmonic number H_n - 1."""
    model = tiny(seed=1, real_vocab=9, max_len=4000)
    seen = []

    class Spy(Residual):
        def __call__(self, logits, *rest):
            seen.append(logits)
            return super().__call__(logits, *rest)

    canvas = torch.full((2, 1500), _)
    s = Decoding(start="dirichlet", rule="threshold", threshold=0)
    step = next(rcd.denoise(model, canvas, s, Spy(), generator=torch.Generator().manual_seed(0)))
    p = seen[0].softmax(-1)  # (3000, 12)
    assert p.shape == (3000, 12) and not p[:, 9:].any() and step.nfe.tolist() == [1, 1]
    assert (p[:, :9].mean(0) - 1 / 9).abs().max() < 0.01
    assert (p[:, :9].square().mean(0) - 2 / 90).abs().max() < 0.003  # E p_i^2 = 2 / (n (n + 1))
    entropy = torch.special.entr(p).sum(-1).mean().item()
    assert entropy == pytest.approx(sum(1 / k for k in range(2, 10)), rel=0.01)


# ---- Mistakes


@pytest.mark.parametrize("options, says", [
    (dict(cache="all"), "cache='all': choose from exact, prefix, dual"), (dict(sub_block=-1), "sub_block=-1"),
    (dict(self_passes=0), "self_passes=0"), (dict(steps=-1), "steps=-1"),
    (dict(block_size=-4), "block_size=-4"), (dict(top_k=-1), "top_k=-1"),
    (dict(guidance=-0.5), "guidance=-0.5"), (dict(guidance=math.nan), "guidance=nan"),
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(temperature=math.nan), "temperature=nan"),
    (dict(temperature=math.inf), "temperature=inf"),
    (dict(entropy_bound=-0.1), "entropy_bound=-0.1"), (dict(entropy_bound=math.nan), "entropy_bound=nan"),
    (dict(top_p=0.0), "top_p=0.0"), (dict(top_p=1.5), "top_p=1.5"), (dict(top_p=math.nan), "top_p=nan"),
    (dict(threshold=1.2), "threshold=1.2"), (dict(threshold=-0.1), "threshold=-0.1"),
    (dict(threshold=math.nan), "threshold=nan"),
])  # fmt: skip
def test_bad_numbers(options, says):
    with pytest.raises(ValueError, match=says) as error:
        Decoding(**options)
    assert "\n" not in str(error.value)


def test_the_cache_of_a_block_causal_model_is_exact(tiny):
    with pytest.raises(ValueError, match="cache=dual: a block-causal") as error:
        next(rcd.denoise(tiny(block_size=3), torch.tensor([[_] * 9]), Decoding(cache="dual")))
    assert "\n" not in str(error.value)
