"""`vqcore index`: list the files of a folder, or the members of tar shards, so that nothing looks for them again."""

import argparse
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vqcore.console import ProgressLine, say
from vqcore.data.inventory import Inventory, inventory
from vqcore.data.listing import counted, require_folder
from vqcore.data.shards import expand, indices_of, place_of
from vqcore.errors import ConfigError, DataError, cause, in_bytes, listed, plural
from vqcore.files import aside, local

SHOWN = 3


def run(args: argparse.Namespace) -> int:
    """Print what there is. Status 2 if something cannot be read."""
    if args.path.endswith(".tar"):
        if args.hash or args.out:
            raise ConfigError("--hash and --out are for folders of files, not for shards.")
        return _shards(args.path)
    root = local(args.path)
    require_folder(root, "index")
    if args.out and not args.out.endswith(".parquet"):
        raise ConfigError(
            f"--out {args.out}: the list is a Parquet file. Give a name that ends with .parquet."
        )
    if args.out and local(args.out).exists():
        raise ConfigError(f"--out {args.out}: exists already. Name another file, or remove this one.")
    line: ProgressLine | None = None

    def tick(done: int, total: int) -> None:
        nonlocal line
        line = line or ProgressLine("index", total, unit="file").__enter__()
        line.update(done)

    try:
        found = inventory(root, hashes=args.hash, tick=tick)
    except OSError as error:
        raise DataError(f"{os.fsdecode(error.filename or root)}: {cause(error)}") from error
    finally:
        if line:
            line.__exit__(None, None, None)
    _print(found)
    if args.out:
        _write(found, local(args.out))
        say(f"written   {args.out}")
    return 2 if found.failed else 0


def _print(found: Inventory) -> None:
    files, folders = plural(len(found.names), "file"), plural(found.folders, "folder")
    say(f"{found.root}: {files}, {in_bytes(found.bytes)}, in {folders}")
    say(f"kinds     {counted(dict(found.kinds.most_common())) or 'none'}")
    say(f"read      {plural(found.read, 'folder')}; {found.folders - found.read:,} as they were")
    if found.hashes is not None:
        say(f"hashed    {plural(found.hashed, 'file')}; {len(found.names) - found.hashed:,} as they were")
        groups = list(found.copies())
        for group in groups[:SHOWN]:
            say(f"copies    {listed(group, 4)}")
        if len(groups) > SHOWN:
            say(f"          and {len(groups) - SHOWN:,} more groups of files with equal contents")
    for name, error in list(found.failed.items())[:SHOWN]:
        say(f"unread    {name}: {cause(error)}")
    if len(found.failed) > SHOWN:
        say(f"          and {len(found.failed) - SHOWN:,} more")


def _write(found: Inventory, path: Path) -> None:
    """The list as a table: path below the folder, bytes, time of the last change, hash."""
    columns = {
        "path": pa.array([name.decode("utf-8", "backslashreplace") for name in found.names], pa.string()),
        "bytes": pa.array(found.stamps[:, 0]),
        "modified": pa.array(found.stamps[:, 1] // 1000, pa.timestamp("us", "UTC")),
    }
    if found.hashes is not None:
        columns["sha256"] = pa.array([each.tobytes().hex() for each in found.hashes], pa.string())
    with aside(path, new=True) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _shards(pattern: str) -> int:
    """Read the headers of tar shards, if they are not remembered, and say what is in them."""
    names = expand(pattern, "index")
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    count, used = 0, 0
    with ProgressLine("index", len(names), unit="shard") as line:
        for number, (name, found) in enumerate(zip(names, indices_of([place_of(each) for each in names]))):
            if isinstance(found, DataError):
                wrong.append(f"unread    {found}")
                continue
            if found.damage:
                wrong.append(f"damaged   {name}: {found.damage}")
            count, used = count + len(found.names), used + int(found.sizes.sum())
            kinds.update(f".{each.rpartition('/')[2].partition('.')[2].lower()}" for each in found.names)
            line.update(number + 1)
    say(f"{pattern}: {plural(count, 'file')}, {in_bytes(used)}, in {plural(len(names), 'shard')}")
    say(f"kinds     {counted(dict(kinds.most_common())) or 'none'}")
    for text in wrong[:SHOWN]:
        say(text)
    if len(wrong) > SHOWN:
        say(f"          and {len(wrong) - SHOWN:,} more")
    return 2 if wrong else 0
