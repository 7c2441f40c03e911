"""All families, in the order in which a model_type is looked up and `python -m zoo list` shows them."""

from zoo import dllm, dream, fastdllm, llada, llada2, plain, sdar

FAMILIES = (sdar.FAMILY, llada.FAMILY, llada2.FAMILY, dream.FAMILY, fastdllm.FAMILY, dllm.FAMILY, plain.FAMILY)
