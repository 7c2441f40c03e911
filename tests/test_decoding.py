"""The families' own decoding loops, written out from their descriptions one token at a time, against the one sampler of this project.

The forwards are those of the classes in `transformers`, over everything that the loop may see and without a cache; ours run on batches of
unequal rows, with the cache where there is one. The one liberty: no loop here may draw the mask or a padded row of the table.
"""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from test_zoo import LLADA, LLADA2, MASK, SIZES, glm, llada2_tensors, llada_tensors, randomise, their_logits, write

import peers
import rcd
import zoo

LONG = {**SIZES, "max_position_embeddings": 160}


def checkpoint(folder, family: str, sharpness: float, **changes):
    """A random checkpoint, (forward, loaded): tokens -> logits (T, V) in float64 by its original class, and what it is loaded as here."""
    if family == "llada2":
        model = glm()
        model.lm_head.weight.data *= sharpness
        loaded = zoo.load(write(folder / "LLaDA2.0-mini", model, llada2_tensors(model), LLADA2, num_hidden_layers=3, **changes))
    elif family == "llada":
        model = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, rms_norm_eps=1e-5)))
        model.lm_head.weight.data *= sharpness
        loaded = zoo.load(write(folder / "LLaDA-8B-Instruct", model, llada_tensors(model), LLADA, **changes))
    elif family in ("Dream", "Fast_dLLM_Qwen"):
        model = randomise(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LONG, tie_word_embeddings=False)))
        model.lm_head.weight.data *= sharpness
        loaded = zoo.load(write(folder / family, model, model_type=family, **changes))
    else:
        model = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LONG, head_dim=16, tie_word_embeddings=False)))
        model.lm_head.weight.data *= sharpness
        name = {"sdar": "SDAR", "a2d-qwen3": "bd3lm" if changes.get("block_size") else "mdlm"}[family]
        loaded = zoo.load(write(folder / name, model, model_type=family, **changes))
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


def ours(loaded: zoo.Loaded, rows: list[list[int]], lengths: list[int], s: rcd.Sampler, generator=None) -> list[list[tuple]]:
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
    ("sdar", dict(block_size=4)), ("llada", {}), ("llada2", dict(block_size=4)), ("Dream", {}), ("Fast_dLLM_Qwen", dict(bd_size=8)),
    ("a2d-qwen3", {}), ("a2d-qwen3", dict(block_size=8)),
])  # fmt: skip
def test_probabilities_with_padding_and_cache(tmp_path, family, changes):
    """Every probability that a run on a padded batch looks at is that of the original's single forward on the row alone, to 1e-5."""
    forward, loaded = checkpoint(tmp_path, family, 2, **changes)
    c, rows = loaded.model.config, prompts(3, 8, 13)
    b, spread = c.block_size or 1, []
    lengths = [-(-(len(row) + 12) // b) * b for row in rows]
    before = [row + [MASK] * (n - len(row)) for row, n in zip(rows, lengths)]
    canvas = torch.tensor([row + [7] * (max(lengths) - len(row)) for row in before])
    s = replace(rcd.Sampler(**loaded.defaults), rule="static", steps=0)
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


# ---------------------------------------------------------------------------------------------------------------------------------------
# SDAR and LLaDA2: block by block, dynamic (threshold, else n[s]) or static


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


@pytest.mark.parametrize("family, rule, B", [("sdar", "threshold", 4), ("sdar", "static", 4), ("sdar", "threshold", 8),
                                             ("llada2", "threshold", 4)])  # fmt: skip
def test_sdar_and_llada2(tmp_path, family, rule, B):
    forward, loaded = checkpoint(tmp_path, family, 8, block_size=B)
    rows, stops = prompts(3, 8, 13, 22), [256]
    s = replace(rcd.Sampler(**loaded.defaults), rule=rule, threshold=0.5)
    for _ in range(2):
        expected = [sdar(forward, row, 18, B, B, rule == "threshold", 0.5, stops) for row in rows]
        got = ours(loaded, rows, [-(-(len(row) + 18) // B) * B for row in rows], s)
        for row, mine, theirs in zip(rows, got, expected):
            assert [commit for _, commit in mine] == [commit for _, commit in theirs]
            ends = [i for i, t in enumerate(theirs[-1][0]) if i >= len(row) and t in stops] or [len(theirs[-1][0])]
            assert mine[-1][0][: ends[0]] == theirs[-1][0][: ends[0]]
        says_something(got, rule == "threshold")
        stops = [expected[2][-1][0][20]]  # once more, where the seventh token of the third answer ends it
        loaded.model.config.eos_ids = tuple(stops)
        assert stops[0] not in rows[2]
    assert len(got[2]) < 18  # it did


def test_sdar_draws_from_a_shared_stream(tmp_path):
    """Temperature 1: the multinomial draw of the original, on the masked cells, from the same generator; and top_k = 1 is greedy."""
    forward, loaded = checkpoint(tmp_path, "sdar", 8)
    for row in prompts(6, 8):
        streams = [torch.Generator().manual_seed(3) for _ in range(2)]
        s = replace(rcd.Sampler(**loaded.defaults), temperature=1.0, threshold=0.5)
        [got] = ours(loaded, [row], [-(-(len(row) + 16) // 4) * 4], s, streams[0])
        expected = sdar(forward, row, 16, 4, 4, True, 0.5, (256,),
                        lambda z, _: z.float().softmax(-1).multinomial(1, generator=streams[1])[:, 0].tolist())  # noqa: B023  # fmt: skip
        greedy = sdar(forward, row, 16, 4, 4, True, 0.5, (256,))
        assert got == expected and got != greedy
        assert ours(loaded, [row], [-(-(len(row) + 16) // 4) * 4], replace(s, top_k=1), streams[0]) == [greedy]


# ---------------------------------------------------------------------------------------------------------------------------------------
# LLaDA (and dllm's mdlm, whose loop is LLaDA's): semi-autoregressive, low-confidence remasking on a schedule


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
    ("llada", 8, 24, 0.0), ("llada", 8, 15, 0.0), ("llada", 24, 7, 0.0), ("llada", 8, 24, 0.7), ("a2d-qwen3", 8, 24, 0.0),
])  # fmt: skip
def test_llada(tmp_path, family, block, steps, cfg):
    forward, loaded = checkpoint(tmp_path, family, 8)
    rows = prompts(3, 8, 13)
    s = replace(rcd.Sampler(**loaded.defaults), rule="static", steps=steps, block_size=block, guidance=cfg)
    loaded.model.config.eos_ids = ()  # the original goes on behind an end token
    expected = [llada(forward, row, 24, block, steps, cfg=cfg) for row in rows]
    assert ours(loaded, rows, [len(row) + 24 for row in rows], s) == expected
    says_something(expected, steps < 24)
    assert loaded.defaults["block_size"] == 32 and (family == "llada" or rcd.Sampler(**loaded.defaults).steps == 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_llada_draws_from_a_shared_stream(tmp_path, temperature):
    """Its Gumbel noise, exp(logits) / (-log u)^T in float64: -log u is exponentially distributed, so e of our stream is u = exp(-e)."""
    forward, loaded = checkpoint(tmp_path, "llada", 2)
    loaded.model.config.eos_ids = ()
    for row in prompts(3, 8):
        streams = [torch.Generator().manual_seed(3) for _ in range(2)]

        def gumbel(z: torch.Tensor, cells: list[int]) -> list[int]:
            u = torch.empty(z.shape).exponential_(generator=streams[1]).double().neg().exp()  # noqa: B023
            return (z.exp() / (-u.log()) ** temperature).argmax(-1).tolist()

        s = replace(rcd.Sampler(**loaded.defaults), rule="static", steps=12, block_size=8, temperature=temperature)
        expected = llada(forward, row, 16, 8, 12, gumbel)
        assert ours(loaded, [row], [len(row) + 16], s, streams[0]) == [expected] != [llada(forward, row, 16, 8, 12)]


def test_bd3lm_pads_on_the_left(tmp_path):
    """A prompt of whole blocks: the original's loop, one token a step. Any other: its padding moves the blocks, and so the logits."""
    forward, loaded = checkpoint(tmp_path, "a2d-qwen3", 8, block_size=8)
    loaded.model.config.eos_ids = ()
    whole, other = prompts(16, 13)
    expected = sdar(forward, whole, 16, 8, 8, False, 0, ())
    assert ours(loaded, [whole], [32], rcd.Sampler(**loaded.defaults)) == [expected]
    z = forward(other + [MASK] * 3)[13].softmax(-1)
    with torch.no_grad():  # the padded original: blocks of [5 (behind 3 pads), 8, 8 masks], positions without the pads
        model, at = loaded.model, torch.arange(21)[None]
        x = model.embed(torch.tensor([other + [MASK] * 8]))
        padded = model.logits(model(x, at, peers.block_causal_mask(at + 3, at + 3, 8)[:, None])[0, 13:14]).softmax(-1)[0]
    assert (z - padded).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------------------------
# Dream: the whole canvas on a time schedule, ranked by one of three measures


def dream(forward, prompt, gen, steps, alg, eps=1e-3):
    x, records = prompt + [MASK] * gen, []
    time = torch.linspace(1, eps, steps + 1).tolist()
    for k in range(steps):
        cells = [i for i in range(len(x)) if x[i] == MASK]
        z = forward(x)
        z = torch.cat([z[:1], z[:-1]])[cells]
        p = z.softmax(-1)
        two = p.topk(2).values
        score = {"maskgit_plus": p.amax(-1), "topk_margin": two[:, 0] - two[:, 1], "entropy": (p * (p + 1e-10).log()).sum(-1)}[alg]
        n = int(len(cells) * (1 - time[k + 1] / time[k])) if k < steps - 1 else len(cells)
        commit = top(dict(zip(cells, score.tolist())), n)
        for i in commit:
            x[i] = int(z[cells.index(i)].argmax())
        records.append((list(x), commit))
    return records


@pytest.mark.parametrize("alg, certainty", [("entropy", "entropy"), ("topk_margin", "margin"), ("maskgit_plus", "confidence")])
def test_dream(tmp_path, alg, certainty):
    """As many steps as tokens: nothing in the first, two in the last, one in every other; ours one in all of them."""
    forward, loaded = checkpoint(tmp_path, "Dream", 4)
    loaded.model.config.eos_ids = ()
    rows = prompts(3, 8, 13)
    s = replace(rcd.Sampler(**loaded.defaults), rule="static", certainty=certainty, block_size=0)
    for row, mine in zip(rows, ours(loaded, rows, [len(row) + 24 for row in rows], s)):
        theirs = dream(forward, row, 24, 24, alg)
        assert [len(commit) for _, commit in theirs] == [0] + [1] * 22 + [2]
        assert mine[:-2] == theirs[1:-1]
        assert sorted(mine[-2][1] + mine[-1][1]) == theirs[-1][1] and mine[-2][0][mine[-2][1][0]] == theirs[-1][0][mine[-2][1][0]]
    says_something([theirs])
    orders = {a: [commit for _, commit in dream(forward, rows[0], 24, 24, a)] for a in ("entropy", "topk_margin", "maskgit_plus")}
    assert len({str(order) for order in orders.values()}) == 3  # three measures, three orders


# ---------------------------------------------------------------------------------------------------------------------------------------
# Fast-dLLM v2: sub-blocks inside a block, the first token of a block from the row before


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
    s, rows, stop = rcd.Sampler(**loaded.defaults), prompts(*lengths), -1
    assert s.sub_block == 8 and s.threshold == 0.9
    s = replace(s, threshold=0.5, sub_block=bd_size // 4)
    for _ in range(2):
        got = ours(loaded, rows, [(len(row) // bd_size + 2) * bd_size for row in rows], s)
        for row, mine in zip(rows, got):
            length = (len(row) // bd_size + 2) * bd_size
            theirs = [r for r in fast_dllm(forward, row, 2 * bd_size, bd_size, bd_size // 4, 0.5, stop) if r[1][0] < length]
            assert [commit for _, commit in mine[: len(theirs)]] == [commit for _, commit in theirs]
            mine, theirs = mine[-1][0][len(row) :], theirs[-1][0][len(row) :]
            end = theirs.index(stop) if stop in theirs else length
            assert mine[:end] == theirs[:end] and (stop in theirs) == (stop in mine)
        says_something(got)
        stop = got[1][-1][0][len(rows[1]) + bd_size // 2 + 1]  # once more, where this token ends an answer
        loaded.model.config.eos_ids = (stop,)
    assert any(len(r) < bd_size for r in got)


def test_sub_blocks_of_any_model(tiny):
    """Left to right in parts of so many; the last part of a block may be shorter; end tokens end a row at the end of a part."""
    canvas = torch.tensor([[1, 2] + [11] * 14, [1] * 9 + [11] * 7])
    parts = [[2], [3, 4, 5], [6, 7]]
    for options in (dict(block_size=8), dict(block_size=8, logit_shift=True)):
        s = rcd.Sampler(rule="threshold", threshold=0.0, sub_block=3)
        steps = list(rcd.denoise(tiny(**options), canvas, s))
        ahead = [[8]] * ("logit_shift" in options)
        rest = [[9, 10], [11, 12, 13], [14, 15]] if ahead else [[8, 9, 10], [11, 12, 13], [14, 15]]
        assert [step.committed[0].nonzero()[:, 0].tolist() for step in steps if step.committed[0].any()] == parts + ahead + rest
        assert [step.block for step in steps] == [0] * 3 + [1] * (3 + len(ahead))
        assert steps[-1].nfe.tolist() == [6 + len(ahead), 3]
    with pytest.raises(ValueError, match="steps=5 is fewer than the 6 blocks or sub-blocks"):
        next(rcd.denoise(tiny(block_size=8), canvas, rcd.Sampler(steps=5, sub_block=3)))
    *_x, last = rcd.denoise(tiny(block_size=8), canvas, rcd.Sampler(steps=6, sub_block=3))
    assert last.nfe.tolist() == [6, 6]
