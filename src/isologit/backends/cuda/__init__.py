"""LLaMA on NVIDIA GPUs: Triton kernels, CUDA graphs, float16 weights with activations in two float16 terms."""
