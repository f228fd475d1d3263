"""Prompt files, replay files, and the built-in demo model and prompts. Knows no engine."""

from isologit.workload.dataset import load_dataset
from isologit.workload.demo import DEMO_NAME, builtin_requests, contest_lengths, demo_model_path
from isologit.workload.replay import load_replay
from isologit.workload.requests import BadRequest, RequestSpec

__all__ = [
    "DEMO_NAME",
    "BadRequest",
    "RequestSpec",
    "builtin_requests",
    "contest_lengths",
    "demo_model_path",
    "load_dataset",
    "load_replay",
]
