"""R2-dLLM's fine-tuning (arXiv 2604.18995), in kind: a model learns from its own least redundant answers.

In the paper a model answers by its quick commit rules. The answers are ranked by how redundant their decoding
was, and the model is trained on the best of them, each masked twice, with a mask and its complement. The
paper's score (Eq. 5) is not public. Here it is passes per token. No right answer is read.
"""
