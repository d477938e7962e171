"""What a kind of corpus has to say: its options, its items, what they hold, and its classes if it has any."""

from dataclasses import dataclass
from pathlib import Path

from mmcl_data.build.items import Contents, Item, Read


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A kind of corpus with its options, which are the fields; the strings under them are their help."""

    several = False
    """Whether samples have several captions as a rule: then `captions` is in the json of each."""

    def read(self, root: Path) -> Read:
        """The items below `root`, in the same order each time.

        Raises:
            ConfigError, DataError: the options or the corpus make no sense.
        """
        raise NotImplementedError

    def load(self, root: Path, item: Item) -> Contents:
        """The contents of one item.

        Raises:
            DataError: a file is missing, too large or outside of `root`; the item is left out.
        """
        from mmcl_data.build.contents import read_files

        return read_files(root, item)

    def classes(self, root: Path) -> list[str]:
        """Names of the classes by number; none if the corpus is not labelled."""
        return []
