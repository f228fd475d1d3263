"""Configs and weights of a LLaMA, whichever files they come from, under one naming."""
