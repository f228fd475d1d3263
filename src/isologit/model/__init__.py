"""LLaMA over a flat token batch, checkpoint readers, weight names as data, tokenizer."""
