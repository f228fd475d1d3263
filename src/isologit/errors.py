"""Typed errors. A `UserError` message is one line that names the place and says what to do; the CLI exits with 2."""

from __future__ import annotations


class IsologitError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(IsologitError):
    """Something the user gave is wrong; the message says what to change."""


class ConfigError(UserError):
    """An option or a configuration value is invalid."""


class ModelError(UserError):
    """A checkpoint, model configuration or tokenizer cannot be used."""


class DatasetError(UserError):
    """A prompt file or replay file cannot be read."""


class OutputFolderError(UserError):
    """The output folder cannot be used."""


class RequestError(UserError):
    """One request can never run (empty, too long, ids outside the vocabulary, bad sampling parameters)."""
