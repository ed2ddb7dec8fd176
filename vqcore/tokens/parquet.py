"""The store `parquet`: a shard is a Parquet file, for tools that know nothing of vqcore. Columns are those of `arrow`.

To read rows, all shards are read into memory: to train on many codes, take `arrow`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vqcore.config import NoSettings
from vqcore.files import aside
from vqcore.protocols import Coded
from vqcore.tokens.arrow import ArrowRows, open_rows, table_of

SUFFIX = ".parquet"


class Parquet:
    """Parquet files: a column of keys and one of lists of one length."""

    Config = NoSettings

    def __init__(self, cfg: NoSettings):
        pass

    def write(
        self, folder: Path, shard: str, rows: Sequence[Coded], manifest: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """One file, compressed."""
        table = pa.Table.from_batches([table_of(rows, manifest)])
        with aside(folder / f"{shard}{SUFFIX}") as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=max(1, len(rows)))
        return (f"{shard}{SUFFIX}",)

    def open(self, folder: Path, manifest: Mapping[str, Any]) -> ArrowRows:
        """The rows of all shards, read into memory."""
        return open_rows(folder, manifest, _read)


def _read(path: Path) -> pa.RecordBatch:
    table = pq.read_table(path, memory_map=False).combine_chunks()
    return table.to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], schema=table.schema)
