"""The store `tar`: shards of WebDataset, for its users and for all who read the same names (Energon, 4M).

A file of the data set is a sample of its shard: the member `KEY.npy` has the codes of its only row `(*grid, q)`, or,
where a file gives several rows (crops, windows, samples of an array), those of all rows `(n, *grid, q)`. `KEY.json`
is a list with an object a row: its `key` and its extras; it is left out where there is nothing to say.

Readers of such tars cut a name at the first dot of its last part, and skip what begins with a folder `__name__`. So in
the names of members such dots are `%2E`, as in addresses, and such a folder begins with `%5F`; control characters and
`%` itself are spelled likewise. Where all keys of a shard begin with its own name, as those from a tar do, members are
named without it: so the shard has the names of the tar that it was made of.

Beside a shard stands its index, an Arrow file with the columns of `arrow`; its column `codes` says where in the shard
the codes of a row begin. So keys and extras need no scan, and codes are views of the mapped shard.
"""

import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vqcore.artefacts.codes import by_record, record_of
from vqcore.config import NoSettings
from vqcore.errors import DataError
from vqcore.files import aside
from vqcore.protocols import Coded
from vqcore.reading import size_of
from vqcore.tokens.arrow import ArrowRows, Shard, batch_of, mapped, write_batch

SUFFIX, INDEX = ".tar", ".index.arrow"
_TYPE = b"dtype"
_BYTES = b"bytes"
_SPELLED = re.compile(r"[%\x00-\x1f\x7f]|^_(?=_[^/]*__/)|\.(?=[^/]*$)")


class Tar:
    """Tar shards with the names of WebDataset, and an index beside each."""

    Config = NoSettings

    def __init__(self, cfg: NoSettings):
        pass

    def write(
        self, folder: Path, shard: str, rows: Sequence[Coded], manifest: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """A tar, and then its index. Raises `ValueError` for an extra with the name of a column of ours."""
        shape, dtype = (*manifest["grid"], manifest["num_codebooks"]), np.dtype(manifest["dtype"])
        begins: list[int] = []
        inside = f"{shard}/"  # keys from a tar begin with its name, and there the sample is named without it
        start = len(inside) if all(record_of(row).startswith(inside) for row in rows) else 0
        tar = folder / f"{shard}{SUFFIX}"
        with aside(tar) as temporary, temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as made:
                for key, parts in by_record(rows):
                    several = "record" in parts[0].extras
                    codes = np.stack([row.codes for row in parts]).astype(dtype)
                    if codes.shape[1:] != shape:
                        raise ValueError(f"the codes of '{key}' have shape {codes.shape[1:]}, not {shape}")
                    name, content = member_name(key[start:]), io.BytesIO()
                    np.save(content, codes if several else codes[0])
                    end = _add(made, f"{name}.npy", content.getvalue(), file)
                    begins += [end - codes.nbytes + place * codes[0].nbytes for place in range(len(parts))]
                    if any(row.extras for row in parts):
                        said = json.dumps([{"key": row.key, **row.extras} for row in parts], sort_keys=True)
                        _add(made, f"{name}.json", said.encode(), file)
            size = file.tell()
        batch = batch_of(rows, pa.array(begins, pa.int64()), shape)
        known = {**batch.schema.metadata, _TYPE: str(dtype).encode(), _BYTES: str(size).encode()}
        with aside(folder / f"{shard}{INDEX}") as temporary:
            write_batch(temporary, batch.replace_schema_metadata(known))
        return tar.name, f"{shard}{INDEX}"

    def open(self, folder: Path, manifest: Mapping[str, Any]) -> ArrowRows:
        """The rows of all shards, mapped."""
        shape = (*manifest["grid"], manifest["num_codebooks"])
        shards = [
            TarShard(folder / name, mapped, shard["rows"], shape)
            for shard in manifest["shards"]
            for name in shard["files"]
            if name.endswith(INDEX)
        ]
        return ArrowRows(shards, shape)


def member_name(key: str) -> str:
    """The name of a sample's members without their suffix: `urllib.parse.unquote` of it is the key."""
    return _SPELLED.sub(lambda found: f"%{ord(found[0]):02X}", key)


def _add(tar: tarfile.TarFile, name: str, content: bytes, file: Any) -> int:
    """Add a member without owner and time; returns where its content ends in the file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return int(file.tell()) - -len(content) % tarfile.BLOCKSIZE


class TarShard(Shard):
    """A shard whose record batch is its index. Raises `DataError` also for a tar that is missing or cut off."""

    def __init__(self, path: Path, *args: Any):
        self.tar = path.with_name(f"{path.name.removesuffix(INDEX)}{SUFFIX}")
        self.bytes = size_of(self.tar, DataError)
        super().__init__(path, *args)

    def _codes(self, column: pa.Array, shape: tuple[int, ...]) -> "Members":
        known = self.batch.schema.metadata
        if self.bytes != int(known[_BYTES]):
            raise DataError(
                f"{self.tar}: this shard has {self.bytes} bytes, and {known[_BYTES].decode()} when written"
            )
        with pa.memory_map(str(self.tar)) as file:
            return Members(file.read_buffer(), column.to_numpy(), np.dtype(known[_TYPE].decode()), shape)


class Members:
    """The codes of rows in a mapped tar: views by place, and stacks by arrays of places."""

    def __init__(self, tar: pa.Buffer, begins: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]):
        self.dtype = dtype
        self._tar, self._begins, self._shape, self._count = tar, begins, shape, int(np.prod(shape))

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, which: Any) -> np.ndarray:
        if isinstance(which, np.ndarray):
            made = np.empty((len(which), *self._shape), self.dtype)
            for row, place in zip(made, which.tolist()):
                row[...] = self[place]
            return made
        return np.frombuffer(self._tar, self.dtype, self._count, self._begins[which]).reshape(self._shape)
