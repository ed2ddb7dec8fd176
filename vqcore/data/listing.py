"""Sorted names of files, a few bytes each, and the listing of a folder."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vqcore.data.hints import readers_of
from vqcore.data.tree import Contents, Tree
from vqcore.errors import DataError, cause, did_you_mean, listed

_AGAIN = "folder listed under another name"


class Names:
    """Keys of files in sorted order, in one bytes object: a path with slashes, cut at its suffix.

    `paths` come in the order of their keys, `cuts` are the lengths of the suffixes.
    """

    setting: str
    suffixes: tuple[str, ...]
    _left_out: Counter[str]

    def __init__(self, paths: Iterable[tuple[bytes, int]]):
        blob, ends, cuts = bytearray(), [0], bytearray()
        for path, cut in paths:
            blob += path
            ends.append(len(blob))
            cuts.append(cut)
        self._blob, self._cuts = bytes(blob), bytes(cuts)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._cuts)

    @property
    def left_out(self) -> dict[str, int]:
        """How many entries are no samples, by kind: a suffix, or words; the most frequent kind first."""
        return dict((+self._left_out).most_common())

    def name(self, index: int) -> str:
        """The name of file `index`: its key with its suffix."""
        return os.fsdecode(self._blob[self._ends[index] : self._ends[index + 1]])

    def key(self, index: int) -> str:
        """The name of file `index` without suffix."""
        return os.fsdecode(self._key(index))

    def find(self, key: str) -> int | None:
        """The index of the file with this key, or None."""
        wanted = os.fsencode(key)
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._key(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self._key(low) == wanted else None

    def without_partner(self, other: "Names") -> list[int]:
        """The indices of the files whose key is not in the other listing."""
        lonely, place = [], 0
        for index in range(len(self)):
            key = self._key(index)
            while place < len(other) and other._key(place) < key:
                place += 1
            if place == len(other) or other._key(place) != key:
                lonely.append(index)
        return lonely

    def _key(self, index: int) -> bytes:
        return self._blob[self._ends[index] : self._ends[index + 1] - self._cuts[index]]


class Listing(Names):
    """The files below `root` with one of `suffixes`, sorted by key. The key is the path below `root` without suffix.

    Upper and lower case are equal in suffixes, which are plain ASCII. Left out, and counted by kind in `left_out`, are
    files with other suffixes, hidden files and folders, what is no file (a pipe), and links to folders that are listed
    under another name. A dead link counts as a file, which cannot be read. `setting` is the config key for error
    messages. Raises `DataError` if the folder does not exist, if no file has one of the suffixes, or if two files have
    the same key.
    """

    def __init__(self, root: str, suffixes: Sequence[str], setting: str):
        self.root, self.suffixes, self.setting = Path(root), tuple(suffixes), setting
        self._left_out: Counter[str] = Counter()
        require_folder(self.root, setting)
        try:
            self._list(Tree(self.root))
        except OSError as error:
            raise DataError(f"{setting}: {os.fsdecode(error.filename or root)}: {cause(error)}") from error
        if not len(self):
            raise DataError(self._nothing())

    def path(self, index: int) -> Path:
        """The path of file `index`."""
        return self.root / self.name(index)

    def source(self, index: int) -> Path:
        """What a modality reads."""
        return self.path(index)

    def where(self, index: int) -> str:
        """Where a file is, for messages."""
        return str(self.path(index))

    def wanted(self, key: str) -> str:
        """What a file with this key would be called, for messages."""
        return f"{self.root / key}{'|'.join(self.suffixes)}"

    def bytes_of(self, index: int) -> int:
        """The bytes of file `index`. Raises `OSError`."""
        return os.stat(f"{self.root}/{self.name(index)}").st_size  # noqa: PTH116  (a Path would take twice as long)

    def _list(self, tree: Tree) -> None:
        self._left_out.clear()
        self._seen: set[tuple[int, int]] = set()
        self._endings = _Endings(self.suffixes)
        try:
            super().__init__(self._below(tree, self.root, b""))
        except OSError:
            if not tree.known:
                raise
            self._list(
                Tree(self.root, fresh=True)
            )  # a link may lead elsewhere while its folder stays as it is
            return
        tree.keep()
        del self._seen, self._endings

    def _below(self, tree: Tree, folder: Path, prefix: bytes) -> Iterator[tuple[bytes, int]]:
        """Yield `(path below the root, length of the suffix)` in the order of keys."""
        status = folder.stat()
        if (status.st_dev, status.st_ino) in self._seen:
            self._left_out[_AGAIN] += 1
            return
        self._seen.add((status.st_dev, status.st_ino))
        for _, name, cut in self._entries(folder, tree.contents(prefix, status)):
            if cut:
                yield prefix + name, cut
            elif self._listed_elsewhere(folder / os.fsdecode(name)):
                self._left_out[_AGAIN] += 1
            else:
                yield from self._below(tree, folder / os.fsdecode(name), prefix + name + b"/")

    def _entries(self, folder: Path, found: Contents) -> list[tuple[bytes, bytes, int]]:
        """The entries of a folder in order, as `(key, name, length of suffix)`. For a folder the length is 0."""
        # The slash puts a folder in the position of its files in the order of all keys.
        entries = [(name + b"/", name, 0) for name in found.below]
        for name in found.names:
            if cut := self._endings.cut(name):
                entries.append((name[:-cut], name, cut))
        self._left_out.update({"hidden": found.hidden, "no file": found.special})
        self._left_out.update(self._endings.left_out())
        entries.sort()
        for one, other in itertools.pairwise(entries):
            if one[0] == other[0]:
                raise DataError(self._same_key(folder, os.fsdecode(one[1]), os.fsdecode(other[1])))
        return entries

    def _listed_elsewhere(self, folder: Path) -> bool:
        """Whether this is a link to a folder below the root that is also listed under its own name."""
        if not folder.is_symlink():
            return False
        target, root = folder.resolve(), self.root.resolve()
        if not target.is_relative_to(root):
            return False
        return not any(part.startswith(".") for part in target.relative_to(root).parts)

    def _same_key(self, folder: Path, first: str, second: str) -> str:
        one, two = sorted((first, second))
        return (
            f"{self.setting}: {folder}: {one} and {two} differ in their suffix only, "
            "so their outputs would have the same name. Rename or move one of the two files, or read one kind of "
            "files alone (modality array: data.modality.reader)"
        )

    def _nothing(self) -> str:
        found = counted(self.left_out)
        text = (
            f"{self.setting}: {self.root}: contains no file of a readable type "
            f"({', '.join(self.suffixes)}). Found: {found or 'nothing'}."
        )
        return f"{text} {readers_of(list(self.left_out))}".rstrip().rstrip(".")


def suffix_length(name: str, suffixes: Sequence[str]) -> int:
    """The length of the longest of `suffixes` that ends a name, in upper or lower case; 0 if there is none."""
    lower = name.lower()
    return max((len(each) for each in suffixes if lower.endswith(each)), default=0)


def counted(kinds: Mapping[str, int]) -> str:
    """Counts by kind as text: `2 x .txt, 1 x hidden`."""
    return listed(f"{count} x {kind}" for kind, count in kinds.items())


class _Endings:
    """Where names of files end before their suffix. What follows the last dot is looked at first, and only once."""

    def __init__(self, suffixes: Sequence[str]):
        self.suffixes = [os.fsencode(each) for each in sorted(suffixes, key=len, reverse=True)]
        self.fitting: dict[bytes, list[bytes]] = {}
        self.others: Counter[str] = Counter()

    def cut(self, name: bytes) -> int:
        """The length of the longest suffix that ends a name; 0 for a name that is left out, and counted."""
        _, dot, last = name.rpartition(b".")
        fitting = self.fitting.get(last)
        if fitting is None:
            ending = (dot + last).lower()
            fitting = [each for each in self.suffixes if dot and each.endswith(ending)]
            if fitting:
                self.fitting[last] = fitting
        for each in fitting:
            if name.lower().endswith(each):
                return len(each)
        self.others[os.fsdecode(dot + last.lower()) if dot else "no suffix"] += 1
        return 0

    def left_out(self) -> Counter[str]:
        """How many names were left out since the last time, by what follows the last dot."""
        found, self.others = self.others, Counter()
        return found


def require_folder(path: Path, setting: str) -> None:
    """Raise `DataError` if there is no folder at a path."""
    if path.is_dir():
        return
    if path.exists():
        raise DataError(
            f"{setting}: {path}: this is a file, not a folder. Give the folder that contains the file"
        )
    raise DataError(f"{setting}: {path}: there is no such folder.{nearest_sibling(path)}")


def nearest_sibling(path: Path) -> str:
    """` Did you mean 'x'?` with the entry in the same folder whose name is closest, or an empty text."""
    if not path.parent.is_dir():
        return ""
    names = {entry.name: str(path.parent / entry.name) for entry in path.parent.iterdir()}
    hint = did_you_mean(path.name, names)
    for name, full in names.items():
        if hint == f" Did you mean '{name}'?":
            return f" Did you mean '{full}'?"
    return ""
