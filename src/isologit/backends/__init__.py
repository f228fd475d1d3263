"""Devices that run a LLaMA over a flat token batch, behind one seam. Knows nothing of requests."""
