"""The engine behind HTTP: one engine thread, three dialects, and the rules for leaving.

Knows the engine through `LLM.open_loop` alone; nothing here computes.
"""
