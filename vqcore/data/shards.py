"""Tar shards: what lies in them, by name, and the members as files of their own.

A shard is indexed once, by its headers, and the index is kept with the size and time of the shard. After that any
sample is one read, so shuffling, resuming, processes and workers are those of every other data source.
"""

import hashlib
import io
import itertools
import logging
import os
import re
import tarfile
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.data import remembered
from vqcore.data.held import Held
from vqcore.data.lent import Content
from vqcore.data.listing import Names, counted, nearest_sibling
from vqcore.data.remote import REQUESTS, Remote
from vqcore.data.tars import Member
from vqcore.errors import DataError, cause
from vqcore.files import local
from vqcore.protocols import Blocks

log = logging.getLogger(__name__)

MOST_SHARDS = 1_000_000
"""Most shards of a pattern."""
OPEN = 16
"""So many shards are open in each process."""
PIECE = 8 << 20
"""Most bytes of members of a shard at an address that are fetched by one request, unless one member has more."""
AHEAD = 4
"""So many pieces of the largest size are on their way while another one is used."""
AT_ONCE = 8
"""So many shards at addresses are looked at, or indexed, at a time."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"[\[{]([^\[\]{}]+)[\]}]")
_DAMAGE = (tarfile.TarError, OSError, ValueError, EOFError)


def expand(pattern: str, where: str) -> list[str]:
    """The paths or addresses of a pattern: `shard-{00000..00099}.tar`, `{a,b}/x.tar`, on disk also `shard-*.tar`.

    Raises `DataError`.
    """
    if pattern.startswith("pipe:"):
        raise DataError(
            f"{where}: {pattern}: 'pipe:' would run a command, which is never done. Give a path or an address "
            "(s3://, https://)"
        )
    if "://" not in pattern and any(sign in pattern for sign in "*?"):
        path = local(pattern)
        names = sorted(str(each) for each in path.parent.glob(path.name))
        if not names:
            raise DataError(f"{where}: {pattern}: no file has such a name")
        return names
    parts: list[list[str]] = []
    rest, count = pattern, 1
    while found := _next(rest):
        parts += [[rest[: found.start()]], _values(found, where)]
        rest = rest[found.end() :]
        count *= len(parts[-1])
        if count > MOST_SHARDS:
            raise DataError(f"{where}: {pattern}: stands for more than {MOST_SHARDS:,} shards")
    return ["".join(each) for each in itertools.product(*parts, [rest])]


def _next(text: str) -> "re.Match[str] | None":
    found = [match for match in (_RANGE.search(text), _CHOICE.search(text)) if match]
    return min(found, key=lambda match: match.start(), default=None)


def _values(found: "re.Match[str]", where: str) -> list[str]:
    if found.re is _CHOICE:
        return [part.strip() for part in found[1].split(",")]
    first, last = found[1], found[2]
    if int(first) > int(last):
        raise DataError(f"{where}: {found[0]}: the range ends before it begins")
    if int(last) - int(first) >= MOST_SHARDS:
        raise DataError(f"{where}: {found[0]}: stands for more than {MOST_SHARDS:,} shards")
    width = len(first) if len(first) == len(last) or first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


@dataclass
class OnDisk:
    """A shard in a file."""

    name: str
    handle: int = -1

    def stamp(self) -> str:
        """Size and time of the file."""
        return remembered.stamp_of(Path(self.name))

    def file(self) -> Any:
        """The open file."""
        return Path(self.name).open("rb")

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file; the file stays open."""
        if self.handle < 0:
            self.handle = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self.handle, size, offset)

    def close(self) -> None:
        """Close the file until it is read again."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "handle": -1}


def place_of(name: str) -> OnDisk | Remote:
    """A path, or an address with `://`."""
    return Remote(name) if "://" in name else OnDisk(str(local(name)))


@dataclass(frozen=True)
class Index:
    """The regular members of a shard: names, one a line; where the bytes begin; how many there are."""

    names: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    left_out: dict[str, int]
    damage: str = ""


def index_of(place: OnDisk | Remote) -> Index:
    """The index of a shard, from the cache if the shard is as it was. Raises `DataError` if there is no such shard."""
    try:
        stamp = place.stamp()
    except FileNotFoundError:
        hint = nearest_sibling(Path(place.name)) if isinstance(place, OnDisk) else ""
        raise DataError(f"{place.name}: there is no such shard.{hint}") from None
    except OSError as error:
        raise DataError(f"{place.name}: {cause(error)}") from error
    name = str(Path(place.name).resolve()) if isinstance(place, OnDisk) else place.name
    cache = remembered.place_of("shards", name, stamp)
    # A cache that does not hold an index only costs time.
    with suppress(ValueError, KeyError):
        if stamp and (held := remembered.recall(cache)):
            return _index(held)
    found = _scan(place)
    if stamp and not found.damage:
        remembered.remember(cache, _arrays(found))
    return found


def indices_of(places: Sequence[OnDisk | Remote]) -> Iterator[Index | DataError]:
    """The index of each shard, or what is wrong with it. Shards at addresses are looked at `AT_ONCE` at a time."""

    def found(place: OnDisk | Remote) -> Index | DataError:
        try:
            return index_of(place)
        except DataError as error:
            return error

    if not any(isinstance(place, Remote) for place in places):
        yield from map(found, places)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(found, places)


def _index(held: Mapping[str, np.ndarray]) -> Index:
    names, kinds = remembered.unpacked(held["names"]), remembered.unpacked(held["kinds"])
    left = dict(zip(kinds, held["counts"].tolist()))
    index = Index(tuple(names), held["offsets"], held["sizes"], left)
    if not len(index.names) == len(index.offsets) == len(index.sizes):
        raise ValueError("damaged")
    return index


def _arrays(index: Index) -> dict[str, np.ndarray]:
    return {
        "names": remembered.packed(index.names),
        "offsets": index.offsets,
        "sizes": index.sizes,
        "kinds": remembered.packed(tuple(index.left_out)),
        "counts": np.array(list(index.left_out.values()), np.int64),
    }


def _scan(place: OnDisk | Remote) -> Index:
    """The members up to the end of the shard, or up to where it is damaged."""
    names: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    left: Counter[str] = Counter()
    damage = ""
    try:
        with place.file() as file:
            end = file.seek(0, io.SEEK_END)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as shard:
                for member in shard:
                    shard.members = []  # type: ignore[attr-defined]  # else they all stay in memory
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse() or not _is_plain(member.name):
                        left["no plain file"] += 1
                    elif member.offset_data + member.size > end:
                        damage = f"ends inside {member.name}"
                        break
                    else:
                        names.append(member.name)
                        offsets.append(member.offset_data)
                        sizes.append(member.size)
    except _DAMAGE as error:
        damage = _reason(place, error)
    return Index(tuple(names), np.array(offsets, np.int64), np.array(sizes, np.int64), dict(left), damage)


def _is_plain(name: str) -> bool:
    """Whether a name stays below the folder to which it is joined."""
    return "\n" not in name and not name.startswith("/") and ".." not in name.split("/")


def _reason(place: OnDisk | Remote, error: Exception) -> str:
    with suppress(OSError), place.file() as file:
        begin = file.read(6)
        for magic, word in (
            (b"\x1f\x8b", "gzip"),
            (b"BZh", "bzip2"),
            (b"\xfd7zXZ", "xz"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
        ):
            if begin.startswith(magic):
                return f"is packed with {word}, and a packed shard can only be read from its start: unpack it"
    return f"is damaged: {cause(error)}"


class Shards(Names):
    """The members of tar shards with one of `suffixes`. The key is `shard name/member name`, both without suffix.

    The name of a member ends at its first dot, what follows is its field: `000123.depth.png` is the field `depth.png`
    of `000123`. `fields` are the fields to take, by default one of `suffixes`; those that end with one of `streams` are
    given in memory. A shard that is damaged counts up to the
    damage, and is named in a warning. Raises `DataError` if a shard does not exist, if all are damaged, if nothing has
    one of the suffixes, or if two members have the same key.
    """

    def __init__(
        self,
        pattern: str,
        suffixes: Sequence[str],
        setting: str,
        fields: Sequence[str] = (),
        room: int = 256 << 20,
        streams: tuple[str, ...] = (),
    ):
        self.pattern, self.suffixes, self.setting = pattern, tuple(suffixes), setting
        self.streams = streams
        self.fields = tuple(f".{each.lstrip('.').lower()}" for each in fields) or self.suffixes
        self.places = [place_of(name) for name in expand(pattern, setting)]
        self._left_out: Counter[str] = Counter()
        stems = [_stem(place.name) for place in self.places]
        if again := [stem for stem, times in Counter(stems).items() if times > 1]:
            hint = (
                ". Where brackets name modalities, as in 4M, give the shards of each: data.path and data.extra_path"
                if "[" in pattern
                else ""
            )
            raise DataError(
                f"{setting}: {pattern}: two shards are called {again[0]}; keys begin with this name{hint}"
            )
        order = sorted(range(len(stems)), key=lambda number: os.fsencode(f"{stems[number]}/"))
        self.places = [self.places[number] for number in order]
        self._marks = [hashlib.sha256(os.fsencode(place.name)).hexdigest()[:8] for place in self.places]
        found = self._indices()
        places: list[tuple[int, int, int]] = []
        super().__init__(self._members(found, [stems[number] for number in order], places))
        self._places = np.array(places, np.int64).reshape(-1, 3)
        is_remote = any(isinstance(each, Remote) for each in self.places)
        self._pieces = _Pieces(self.places, self._places, room) if is_remote else None
        if not len(self):
            raise DataError(
                f"{setting}: {pattern}: contains no {' or '.join(self.fields)}. Found: "
                f"{counted(self.left_out) or 'nothing'}"
            )

    def _indices(self) -> list[Index]:
        looked = list(indices_of(self.places))
        found = [each for each in looked if isinstance(each, Index)]
        if missing := [each for each in looked if isinstance(each, DataError)]:
            count = (
                f"{len(missing)} of {len(self.places)} shards cannot be read. " if len(missing) > 1 else ""
            )
            raise DataError(f"{self.setting}: {count}{missing[0]}")
        damaged = {place.name: each.damage for place, each in zip(self.places, found) if each.damage}
        empty = [place.name for place, each in zip(self.places, found) if each.damage and not each.names]
        if empty and not any(each.names for each in found):
            raise DataError(f"{self.setting}: {empty[0]}: {damaged[empty[0]]}")
        for name, damage in damaged.items():
            log.warning("shard %s: %s; what comes before counts.", name, damage)
        if damaged:
            self._left_out["damaged shard"] += len(damaged)
        return found

    def _members(
        self, found: Sequence[Index], stems: Sequence[str], places: list[tuple[int, int, int]]
    ) -> Iterator[tuple[bytes, int]]:
        """Yield `(name, length of the suffix)` in the order of keys, and append shard, offset and size to `places`."""
        for number, (index, stem) in enumerate(zip(found, stems)):
            mine: dict[bytes, tuple[str, int, int]] = {}
            self._left_out.update(index.left_out)
            for name, offset, size in zip(index.names, index.offsets.tolist(), index.sizes.tolist()):
                folder, _, base = name.removeprefix("./").rpartition("/")
                first, dot, rest = base.partition(".")
                suffix = f".{rest.lower()}"
                if not first or suffix not in self.fields:
                    self._left_out[
                        f".{rest.lower()}" if dot and first else "no suffix" if first else "hidden"
                    ] += 1
                    continue
                inner = os.fsencode("/".join(filter(None, (stem, folder, first))))
                if inner in mine:
                    raise DataError(
                        f"{self.setting}: {self.places[number].name}: two members are called {name[: -len(rest)]} "
                        f"with a suffix of {', '.join(self.fields)}. Name the field to take"
                    )
                mine[inner] = dot + rest, offset, size
            for inner in sorted(mine):
                ending, offset, size = mine[inner]
                places.append((number, offset, size))
                yield inner + os.fsencode(ending), len(os.fsencode(ending))

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The name of each shard, and how many members it has, in their order."""
        counts = np.bincount(self._places[:, 0], minlength=len(self.places)).tolist()
        return [(_stem(place.name), count) for place, count in zip(self.places, counts)]

    @property
    def blocks(self) -> Blocks | None:
        """The pieces in which shards at addresses are read; None if all shards are on disk."""
        if self._pieces is None:
            return None
        needed = int(self._pieces.sizes.sum())
        return Blocks(self._pieces.counts, max(1, self._pieces.held.room * len(self) // needed))

    def expect(self, indices: Iterable[int], *, alone: bool = False) -> None:
        """Members that will be asked for, in this order: from addresses, the first of them are fetched from now on."""
        if self._pieces is not None:
            self._pieces.expect(indices, alone)

    def bytes_of(self, index: int) -> int:
        """The bytes of a member."""
        return int(self._places[index, 2])

    def where(self, index: int) -> str:
        """Where a member is, for messages."""
        shard = self.places[int(self._places[index, 0])].name
        return f"{shard}: {self.name(index).partition('/')[2]}"

    def wanted(self, key: str) -> str:
        """What a member with this key would be called, for messages."""
        return f"{key}{'|'.join(self.fields)} in {self.pattern}"

    def content(self, index: int) -> bytes:
        """The bytes of a member. Raises `DataError` if they are not there any more."""
        shard, offset, size = self._places[index].tolist()
        place = self.places[shard]
        try:
            content = self._pieces.read(index) if self._pieces else place.read(offset, size)
        except OSError as error:
            raise DataError(f"{place.name}: {cause(error)}") from error
        if len(content) != size:
            raise DataError(f"{self.where(index)}: {size - len(content):,} bytes are missing")
        _handles.used(place)
        return content

    def source(self, index: int) -> Path | Content:
        """What a modality reads."""
        return self._member(index).for_reader(self.streams)

    def path(self, index: int) -> Path:
        """A file with the content of a member, which stays for the next `KEPT` members that this process asks for."""
        return self._member(index).as_file()

    def _member(self, index: int) -> Content:
        number = int(self._places[index, 0])
        shard, (_, _, name) = self.places[number].name, self.name(index).partition("/")
        return Content(
            self.content(index), f"{shard}: {name}", f"{self._marks[number]}/{_base(shard)}/{name}"
        )


def _base(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _stem(name: str) -> str:
    return _base(name).removesuffix(".tar")


class _Pieces:
    """Members of shards that follow each other, fetched together: one request for each member would take too long.

    What is expected is on its way before it is needed, up to `AHEAD` times `PIECE` bytes: pieces, or members alone. A
    number stands for a piece, and its complement (`~index`) for a member.
    """

    def __init__(self, shards: Sequence[OnDisk | Remote], places: np.ndarray, room: int):
        self.shards, self.held = shards, Held(room)
        starts, ends = places[:, 1], places[:, 1] + places[:, 2]
        first = [0]
        for index in range(1, len(places)):
            begin = first[-1]
            follows = places[index, 0] == places[index - 1, 0] and starts[index] >= ends[index - 1]
            if not follows or ends[index] - starts[begin] > PIECE:
                first.append(index)
        self.first, self.members = np.array(first), places
        self.counts = np.diff(self.first, append=len(places))
        self.sizes = ends[self.first + self.counts - 1] - starts[self.first]
        self._clear()

    def _clear(self) -> None:
        self.process, self.alone = os.getpid(), False
        self.plan: deque[int] = deque()
        self.coming: dict[int, Future[bytes]] = {}

    def expect(self, indices: Iterable[int], alone: bool) -> None:
        """Members that will be asked for, in this order; `alone`, without their neighbours."""
        self._check_process()
        self.alone = alone
        found = np.fromiter(indices, np.int64)
        wanted = dict.fromkeys((~found if alone else self._piece(found)).tolist())
        for number in [each for each in self.coming if each not in wanted]:
            self.coming.pop(number).cancel()
        self.plan = deque(wanted)
        self._go_on()

    def read(self, index: int) -> bytes:
        """The bytes of a member. Raises `OSError` and `DataError`."""
        self._check_process()
        piece = int(self._piece(index))
        if self.alone and piece not in self.held:
            return self._fetched(~index)[0]
        content = self.held.get(piece, int(self.counts[piece]), lambda: self._fetched(piece))
        _, offset, size = self.members[index].tolist()
        start = offset - int(self.members[self.first[piece], 1])
        return bytes(content[start : start + size])

    def _piece(self, index: Any) -> Any:
        return np.searchsorted(self.first, index, "right") - 1

    def _span(self, number: int) -> tuple[OnDisk | Remote, int, int]:
        """The shard of a piece or member, where in it the bytes begin, and how many there are."""
        shard, start, size = self.members[~number if number < 0 else self.first[number]].tolist()
        return self.shards[shard], start, size if number < 0 else int(self.sizes[number])

    def _fetched(self, number: int) -> tuple[bytes, int]:
        coming = self.coming.pop(number, None)
        self._go_on()
        if coming is not None:
            content = coming.result()
        else:
            place, start, size = self._span(number)
            content = place.read(start, size)
        return content, len(content)

    def _go_on(self) -> None:
        """Ask for what is expected next, as far as there is room."""
        while self.plan:
            number = self.plan[0]
            place, start, size = self._span(number)
            held = int(self._piece(~number)) if number < 0 else number
            if isinstance(place, Remote) and held not in self.held and number not in self.coming:
                under_way = sum(self._span(each)[2] for each in self.coming)
                if len(self.coming) >= 2 * REQUESTS or (self.coming and under_way + size > AHEAD * PIECE):
                    return
                self.coming[number] = place.ahead(start, size)
            self.plan.popleft()

    def _check_process(self) -> None:
        """After a fork nobody brings what the other process has asked for."""
        if self.process != os.getpid():
            self._clear()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("plan", "coming")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._clear()


class _Handles:
    """The shards that are open in this process, at most `OPEN`."""

    def __init__(self) -> None:
        self._used: OrderedDict[int, OnDisk | Remote] = OrderedDict()

    def used(self, place: OnDisk | Remote) -> None:
        self._used[id(place)] = place
        self._used.move_to_end(id(place))
        if len(self._used) > OPEN:
            self._used.popitem(last=False)[1].close()


_handles = _Handles()
