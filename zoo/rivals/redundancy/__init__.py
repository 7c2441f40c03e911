"""R2-dLLM's fine-tuning (arXiv 2604.18995), in kind: a model learns from its own least redundant answers.

In the paper a model answers by its quick commit rules. The answers are ranked by how redundant their decoding
was, and the model is trained on the best of them, each masked twice, with a mask and its complement. The
paper's score (Eq. 5) is not public. Here it is passes per token. No right answer is read.
"""

import numpy as np
import torch
from torch import Generator, Tensor

from rcd import Residual, Transformer, denoise
from zoo.decoding import Decoding
from zoo.progress import progress


def answers(model: Transformer, tokens: Tensor, response: Tensor, s: Decoding, residual: Residual,
            batch: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """tokens, response (N, L) -> what the model fills in (N, L), and its passes per filled token (N,)."""
    filled, scores, device = [], [], model.embedding.device
    with progress(len(tokens), "answers", "canvases") as bar:
        for x, fill in zip(tokens.split(batch), response.split(batch)):
            canvas = x.masked_fill(fill, model.config.mask_id)
            *_, last = denoise(model, canvas, s, residual, generator=Generator(device).manual_seed(0))
            filled.append(last.tokens)
            scores.append(last.nfe / fill.sum(1))
            bar.update(len(x))
    return torch.cat(filled), torch.cat(scores)


def least_redundant(scores: Tensor, keep: float, seed: int) -> Tensor:
    """The rows (n,) of the lowest scores, in order; which of two equal ones is decided by the seed."""
    tie = torch.rand(len(scores), generator=Generator().manual_seed(seed), dtype=torch.float64)
    order = np.lexsort((tie.numpy(), scores.numpy()))[: max(1, round(keep * len(scores)))]
    return torch.from_numpy(np.sort(order))
