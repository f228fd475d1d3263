"""The plain backend: LLaMA in eager torch, on any torch device. The template for further backends."""
