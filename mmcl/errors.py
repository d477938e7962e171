"""Every error mmcl raises for its users.

    MmclError
    ├── ConfigError              a field, value or combination that cannot be run
    ├── MissingExtra             an optional package is needed; the message names the extra
    ├── DataError
    │   ├── ShardMissing         a path or pattern that matches no file
    │   ├── ShardDamaged         a tar that is empty, cut off, overwritten or no tar at all
    │   ├── NoIndex              a place where an index should be and is not
    │   ├── IndexStale           a shard was written again after it was indexed
    │   ├── SampleRejected       one sample that cannot be used; streams count and log it
    │   ├── NoUsableSamples      a source from which nothing can be trained on
    │   └── TooManyBadSamples    the share of rejected samples passed the limit
    ├── NonFiniteLoss            the loss became NaN or infinite within the named steps
    ├── CheckpointError          a checkpoint that cannot be written, trusted or resumed from
    ├── ExportError              a model that cannot be represented, or whose export does not match
    ├── RankFailed               a rank of this run ended early; the others were stopped
    └── Stopped                  a signal ended the run before its last step; it can go on

A message says what was expected, what was found, where, and what to do about it.
"""

from pathlib import Path


class MmclError(Exception):
    """Base of all errors that are the user's to mend."""


class ConfigError(MmclError, ValueError):
    """A field, value or combination that cannot be run."""


class MissingExtra(MmclError, ImportError):
    """An optional package is needed and absent."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'mmcl[{extra}]'")
        self.needs = package, extra, purpose

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:  # errors come back from other processes
        return type(self), self.needs


class DataError(MmclError):
    """Data that cannot be used."""


class ShardMissing(DataError, FileNotFoundError):
    """A path or pattern that matches no file."""


class ShardDamaged(DataError):
    """A tar that is empty, cut off, overwritten or no tar at all."""

    def __init__(self, shard: str | Path, offset: int, cause: str) -> None:
        self.shard, self.offset, self.cause = str(shard), offset, cause
        super().__init__(f"{shard}: damaged at byte {offset}: {cause}")

    def __reduce__(self) -> tuple[type, tuple[str, int, str]]:
        return type(self), (self.shard, self.offset, self.cause)


class NoIndex(DataError, FileNotFoundError):
    """A place where an index should be and is not."""


class IndexStale(DataError):
    """A shard was written again after it was indexed."""


class SampleRejected(DataError):
    """One sample that cannot be used: where it lies and why."""

    def __init__(self, shard: str | Path, key: str, cause: str) -> None:
        self.shard, self.key, self.cause = str(shard), key, cause
        super().__init__(f"{shard}: sample {key!r}: {cause}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.shard, self.key, self.cause)


class NoUsableSamples(DataError):
    """A source from which nothing can be trained on."""


class TooManyBadSamples(DataError):
    """The share of rejected samples passed the limit."""


class NonFiniteLoss(MmclError, ArithmeticError):
    """The loss became NaN or infinite within steps [first, last]."""

    def __init__(self, first: int, last: int, values: dict[str, float]) -> None:
        self.first, self.last, self.values = first, last, values
        super().__init__(
            f"the loss became NaN or infinite somewhere within steps [{first}, {last}]: {values}. "
            "Lower the learning rate or resume from an earlier checkpoint; the diverged state was not saved"
        )

    def __reduce__(self) -> tuple[type, tuple[int, int, dict[str, float]]]:
        return type(self), (self.first, self.last, self.values)


class CheckpointError(MmclError):
    """A checkpoint that cannot be written, trusted or resumed from."""


class ExportError(MmclError):
    """A model that cannot be represented in a format, or whose export does not match it."""


class RankFailed(MmclError):
    """A rank of this run ended early; the others were stopped."""


class Stopped(MmclError):
    """A signal ended the run before its last step; it can go on."""
