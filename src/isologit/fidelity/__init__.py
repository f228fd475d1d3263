"""Proof that a run's logits are the reference's: capture plan, reference, comparison, certificate, logits files."""

from __future__ import annotations

from isologit.fidelity.capture_file import CAPTURES, Captures, read_captures, write_captures
from isologit.fidelity.certificate import Certificate, GreedyCheck, RequestCounts
from isologit.fidelity.certifier import certify
from isologit.fidelity.compare import ATOL, Comparison, ComparisonAccumulator, compare_rows
from isologit.fidelity.contest import contest_positions, write_contest_logits
from isologit.fidelity.files import LogitsFileError, code_hash, token_hash
from isologit.fidelity.folders import FolderComparison, compare_folders
from isologit.fidelity.plan import LAST, draw_capture_plan, resolve_capture
from isologit.fidelity.reference import NoiseFloor, Reference
from isologit.fidelity.rescore import Divergence, ScoredRequest
from isologit.fidelity.rows import CapturedRow
from isologit.fidelity.streamed import StreamedReference

__all__ = [
    "ATOL",
    "CAPTURES",
    "LAST",
    "CapturedRow",
    "Captures",
    "Certificate",
    "Comparison",
    "ComparisonAccumulator",
    "Divergence",
    "FolderComparison",
    "GreedyCheck",
    "LogitsFileError",
    "NoiseFloor",
    "Reference",
    "RequestCounts",
    "ScoredRequest",
    "StreamedReference",
    "certify",
    "code_hash",
    "compare_folders",
    "compare_rows",
    "contest_positions",
    "draw_capture_plan",
    "read_captures",
    "resolve_capture",
    "token_hash",
    "write_captures",
    "write_contest_logits",
]
