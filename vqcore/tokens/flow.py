"""Parts of files go through a network in batches: what goes in, what comes out, and what a bad file costs."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vqcore.data.listing import counted
from vqcore.errors import DataError

log = logging.getLogger(__name__)


@dataclass
class File:
    """A file in work: its key, and where it lies, for people."""

    where: str
    key: str
    failed: bool = False


@dataclass
class Done:
    """What a pass over a folder did. `failed` says what is wrong with the files whose keys are in `keys`.

    `left_out`: how many entries are no samples, by kind.
    `lost` is the share of each sample that is in no code, added up over `seen` samples. `crops` and `windows` are what
    these samples were cut into.
    """

    written: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    left_out: Mapping[str, int] = field(default_factory=dict)
    lost: float = 0.0
    seen: int = 0
    crops: int = 0
    windows: int = 0

    def fail(self, file: File, error: Exception) -> None:
        """Note, and say, that a file cannot be used."""
        file.failed = True
        text = str(error)
        self.keys.append(file.key)
        self.failed.append(text if file.where in text else f"{file.where}: {text}")
        log.warning("skipped: %s", self.failed[-1])

    def add(self, other: "Done") -> None:
        """Add what another process did."""
        for each in fields(self):
            if each.name != "left_out":
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def taken(self) -> "Done":
        """What is noted so far; from now on all is counted anew."""
        noted, new = replace(self), Done(left_out=self.left_out)
        for each in fields(self):
            setattr(self, each.name, getattr(new, each.name))
        return noted

    @property
    def count(self) -> int:
        """The files that are dealt with."""
        return self.written + self.skipped + len(self.failed)

    @property
    def said(self) -> str:
        """One line for people."""
        rest = f"\nleft out: {counted(self.left_out)}" if self.left_out else ""
        return f"{self.written} written, {self.skipped} existed already, {len(self.failed)} unreadable{rest}"

    @property
    def share_lost(self) -> float:
        """The mean share of a sample that is in no code."""
        return self.lost / max(1, self.seen)


@dataclass(frozen=True)
class Item:
    """One part of a file. Parts that are `alike` go through the network together; `take` takes what comes out.

    The last part of a file has `finish`, which gives the file's output: its codes, or what writes it below a folder.
    """

    file: File
    alike: Any
    given: Any
    take: Callable[[Any], None]
    finish: Callable[..., Any] | None = None


Output = tuple[File, Callable[..., Any]]
"""A file whose parts are all done, and its `finish`."""


class Batches:
    """Does parts in a row that are alike together, at most `size` of them. A bad file costs itself alone."""

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Any]], size: int, done: Done):
        self.work, self.size, self.done = work, size, done
        self.waiting: list[Item] = []

    def put(self, item: Item) -> Iterator[Output]:
        """Take a part; yields the files that are ready."""
        if self.waiting and (len(self.waiting) == self.size or item.alike != self.waiting[0].alike):
            yield from self.end()
        self.waiting.append(item)

    def end(self) -> Iterator[Output]:
        """Do the parts that wait; yields the files that are ready."""
        batch, self.waiting = self.waiting, []
        for item, made in self._apart(batch):
            try:
                item.take(made)
            except (ValueError, DataError) as error:
                self.done.fail(item.file, error)
            if item.finish is not None and not item.file.failed:
                yield item.file, item.finish

    def _apart(self, items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        """Do a batch; if it is refused, one by one, so that a bad file is named and costs itself alone."""
        items = [item for item in items if not item.file.failed]
        if not items:
            return
        try:
            made = self.work(items)
        except (ValueError, DataError) as error:
            if len(items) == 1:
                self.done.fail(items[0].file, error)
            else:
                for one in items:
                    yield from self._apart([one])
            return
        yield from zip(items, made, strict=True)


def through(
    items: Iterable[Item], work: Callable[[Sequence[Item]], Sequence[Any]], batch_size: int, done: Done
) -> Iterator[Output]:
    """Do the parts in batches; yields each file whose parts are all done."""
    batches = Batches(work, batch_size, done)
    for item in items:
        yield from batches.put(item)
    yield from batches.end()
