"""What the tests share: a tiny random model, one thread, and hypothesis examples that are always the same."""

import functools
import gc
import math
import os

# Tensors this small only lose by threads, and threads that wait for a busy core lose minutes. Processes that
# a test starts read it from the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@functools.cache
def settle() -> None:
    import hypothesis
    import torch

    torch.set_num_threads(1)
    os.fsync = os.fstat  # no test waits for the disk; those that ask whether it is called put their own there
    hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("tests")


def pytest_collectstart():
    """Before a module of tests is imported. Not sooner: the process that starts the others collects nothing,
    they wait for it, and torch takes seconds."""
    settle()


def tiny_model(seed: int = 0, gain: float = 1.5, **options):
    """A random rcd.Transformer. Its predictions differ from position to position, are neither certain nor
    uniform, and have few ties."""
    import torch

    import rcd

    size = dict(vocab_size=12, mask_id=11, n_layer=2, n_head=4, n_kv_head=2, head_dim=6, d_model=16, d_ff=20,
                max_len=64)  # fmt: skip
    model = rcd.Transformer(rcd.Config(**{**size, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif name in ("embed_tokens.weight", "lm_head.weight"):
                p.copy_(0.4 * noise)
            else:
                p.copy_(gain / math.sqrt(p.shape[1]) * noise)
    return model.eval()


def pytest_collection_finish():
    gc.freeze()  # what is imported lives as long as the tests: no collection has to look at it


@pytest.fixture(scope="session")
def tiny():
    return tiny_model
