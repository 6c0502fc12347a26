"""Every error a user can cause or fix, as one tree.

    JpqError                 exit code 1: the job failed
    ├── UsageError           exit code 2: the command line or a value in it is wrong
    │   └── CapacityError    a text and what shall follow it do not fit into the cache
    ├── ModelError           the model cannot be loaded or is not supported
    │   └── UncoveredError   a causal language model of transformers, but of no family that is described here
    ├── TargetError          a target file is unknown or malformed (exit code 2)
    ├── CalibrationError     the calibration text cannot be used
    ├── BudgetError          the budget cannot be met; says the smallest possible one
    ├── PlanError            a plan file does not fit the model or is malformed
    ├── BundleError          a bundle is damaged or incomplete
    └── StorageError         disk full, folder not writable

A message says what, where, got, expected and the remedy, on one line.
"""

from __future__ import annotations


class JpqError(Exception):
    """Base of all errors the command line shows as one line."""

    exit_code = 1


class UsageError(JpqError):
    """The command line is wrong."""

    exit_code = 2


class CapacityError(UsageError):
    """More tokens than the cache of a loaded bundle, or its model, can hold."""


class TargetError(UsageError):
    """A target is unknown or its file is malformed."""


class ModelError(JpqError):
    """The model cannot be loaded, is damaged, or is not supported."""


class UncoveredError(ModelError):
    """A causal language model that only the fallback through torch.onnx.export takes."""


class CalibrationError(JpqError):
    """The calibration text is empty, unreadable or too short."""


class BudgetError(JpqError):
    """No plan meets the budget."""


class PlanError(JpqError):
    """A plan file is malformed or belongs to another model."""


class BundleError(JpqError):
    """A bundle is damaged or incomplete."""


class StorageError(JpqError):
    """The output folder cannot be written."""
