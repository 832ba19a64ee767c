"""The error that a user can act on.

Everything that is the input's, the machine's or the configuration's fault is a :class:`UserError`: the command line prints
it as one message, without a traceback, and exits with code 2. Any other exception is a bug of ours.
"""

from __future__ import annotations


class UserError(Exception):
    """What failed, with the values seen, and the way out.

    Args:
        what: one sentence that names what failed and the values seen, e.g.
            ``"model_type 'llava' is not supported"``.
        fix: what to do about it, e.g. ``"supported: qwen3_vl_moe"``; may be empty where nothing can be done.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}" if self.fix else self.what


class UnsupportedError(UserError):
    """A model, operator, option or target that this version does not handle, refused by name."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete, or not what its config says."""


class BundleError(UserError):
    """A stage directory whose manifest, hashes or paths do not hold."""


class BuildError(UserError):
    """An engine or plugin library that cannot be built or loaded on this machine."""
