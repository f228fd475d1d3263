"""Requests, block accounting, scheduling, planning, speculation, and the loop that steps a model."""
