"""Run prompts through a LLaMA-family model in the least total time, and prove that the logits did not change."""
