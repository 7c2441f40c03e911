"""All families, in the order of `python -m zoo list`. The first that knows a model_type takes it."""

from zoo import dllm, dream, fastdllm, llada, llada2, plain, sdar

FAMILIES = (
    sdar.FAMILY, llada.FAMILY, llada2.FAMILY, dream.FAMILY, fastdllm.FAMILY, dllm.FAMILY, plain.FAMILY
)  # fmt: skip
