"""Columns of Parquet files: types, keys, nulls, damage, the cache; the batches of a folder; orders of blocks."""

import io
import pickle
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vqcore.data import order as ordering
from vqcore.data import parquet
from vqcore.data.batches import TrainBatches
from vqcore.data.order import Order
from vqcore.data.split import Side
from vqcore.errors import DataError
from vqcore.protocols import Blocks, blocks
from vqcore.registry import registry
from vqcore.testing.conformance import configured

VALUES = {"name": "array", "channels": 2, "size": [3], "sizing": "resize"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(seed: int, mode: str = "RGB") -> bytes:
    levels = np.random.default_rng(seed).integers(0, 255, (20, 24, len(mode)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.squeeze()).save(file, "PNG")
    return file.getvalue()


def table(path: Path, rows: int = 2, types=(), **columns) -> Path:
    """A file with groups of `rows` rows."""
    made = {name: pa.array(values, dict(types).get(name)) for name, values in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(made), path, row_group_size=rows)
    return path


def parts(name: str, **settings):
    tree = {"modality": {"name": "rgb"}, "input_size": 16, "batch_size": 3, **settings}
    cfg = configured("data", name, tree)
    size = tuple(cfg.modality.size) if hasattr(cfg.modality, "size") else (16, 16)
    modality = registry().build("modality", cfg.modality, size=size)
    extra = {label: registry().build("modality", node, size=(16, 16)) for label, node in cfg.extra.items()}
    return registry().build("data", cfg, split="train", modality=modality, extra=extra), modality, extra, cfg


def rows(path: Path, **settings):
    return parts("parquet", path=str(path), **settings)[0]


def vectors(path: Path, **settings):
    return rows(path, modality=VALUES, input_size=None, **settings)


class TestTypes:
    """What a row gives, for each type of column."""

    NESTED: ClassVar = [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[0.0] * 3] * 2]

    @pytest.mark.parametrize(
        ("kind", "values"),
        [
            (pa.list_(pa.list_(pa.float32())), NESTED),
            (pa.list_(pa.list_(pa.float64(), 3), 2), NESTED),
            (pa.large_list(pa.large_list(pa.float16())), np.float16(NESTED).tolist()),
            (pa.list_(pa.list_(pa.int64())), [[[1, 2, 3], [4, 5, 6]], [[0] * 3] * 2]),
            (pa.list_(pa.list_(pa.bool_())), [[[True, False, True]] * 2, [[False] * 3] * 2]),
        ],
    )
    def test_lists(self, tmp_path, kind, values):
        data = vectors(table(tmp_path / "a.parquet", x=values, types={"x": kind}))
        wanted = np.array(values)
        assert len(data) == 2
        for index in range(2):
            found = data.get(index)
            assert found.shape == (2, 3) and np.array_equal(found, wanted[index])
        leaf = kind.value_type.value_type
        assert data.get(0).dtype == leaf.to_pandas_dtype()

    def test_tensors_of_arrow(self, tmp_path):
        kind = pa.fixed_shape_tensor(pa.float32(), [2, 3])
        held = pa.array([list(range(6)), list(range(6, 12))], pa.list_(pa.float32(), 6))
        pq.write_table(pa.table({"x": pa.ExtensionArray.from_storage(kind, held)}), tmp_path / "a.parquet")
        data = vectors(tmp_path / "a.parquet")
        assert np.array_equal(data.get(1), np.arange(6, 12, dtype=np.float32).reshape(2, 3))

    def test_a_tensor_with_nulls_and_another_layout(self, tmp_path):
        for order, shape in (([0, 1], [2, 3]), ([1, 0], [3, 2])):
            kind = pa.fixed_shape_tensor(pa.float32(), shape, permutation=order)
            held = pa.array([[1, None, 3, 4, 5, None]], pa.list_(pa.float32(), 6))
            pq.write_table(
                pa.table({"x": pa.ExtensionArray.from_storage(kind, held)}), tmp_path / "a.parquet"
            )
            flat = np.ma.masked_equal(np.array([1, 0, 3, 4, 5, 0], np.float32), 0)
            wanted = flat.reshape(shape).transpose(order)
            found = vectors(tmp_path / "a.parquet").get(0)
            assert np.array_equal(found.mask, wanted.mask) and (found == wanted).all()

    def test_a_number_that_is_null_is_missing(self, tmp_path):
        data, modality, *_ = parts(
            "parquet", path=str(table(tmp_path / "a.parquet", x=[[[1.0, None, 3.0], [4.0, 5.0, 6.0]]])),
            modality={**VALUES, "nodata": []}, input_size=None,
        )  # fmt: skip
        found = data.get(0)
        assert np.array_equal(found.mask, [[False, True, False], [False] * 3]) and found[0, 2] == 3
        assert np.isnan(modality.read(found)[0, 1])

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ([[[1.0], [2.0, 3.0]]], "lists of different lengths are no array"),
            ([[[], []]], "an empty list is no array"),
        ],
    )
    def test_what_is_no_array(self, tmp_path, values, reason):
        path = table(tmp_path / "a.parquet", x=values, types={"x": pa.list_(pa.list_(pa.float32()))})
        with pytest.raises(DataError, match=rf"a\.parquet: row 0, column 'x': {reason}"):
            vectors(path).get(0)

    def test_files_as_bytes_and_with_their_paths(self, tmp_path):
        pictures = [png(n) for n in range(3)]
        plain = rows(table(tmp_path / "a.parquet", image=pictures))
        named = rows(
            table(
                tmp_path / "b.parquet",
                image=[{"bytes": each, "path": f"in/x{n}.PNG"} for n, each in enumerate(pictures)],
            )
        )
        assert [plain.get(n).getvalue() for n in range(3)] == pictures
        assert [named.get(n).getvalue() for n in range(3)] == pictures
        assert named.get(1).file.endswith("1.PNG")

    def test_bytes_never_become_objects(self, tmp_path):
        evil = io.BytesIO()
        np.save(evil, np.array([print], object), allow_pickle=True)
        data, modality, *_ = parts(
            "parquet", path=str(table(tmp_path / "a.parquet", x=[evil.getvalue(), pickle.dumps(print)])),
            modality=VALUES, input_size=None,
        )  # fmt: skip
        for index in range(2):
            with pytest.raises(DataError, match=r"only arrays of numbers|no \.npy file"):
                modality.read(data.get(index))


class TestColumns:
    def test_the_only_column_that_can_be_a_sample(self, tmp_path):
        data = rows(table(tmp_path / "a.parquet", label=[1, 2], image=[png(0), png(1)], text=["a", "b"]))
        assert data.get(1).getvalue() == png(1)

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({}, r"several columns can be samples: image, mask\. Name one, .*data\.column=image\..*label \(int64\)"),
            ({"column": "imgae"}, r"data\.column=imgae: .*there is no such column\. Did you mean 'image'\?"),
            ({"column": "label"}, r"data\.column=label: .*holds int64; .*Columns that can be samples: image, mask"),
            ({"column": "image", "key": "nam"}, r"data\.key=nam: .*there is no such column\. Did you mean 'name'\?"),
            ({"column": "image", "key": "image"}, "holds binary; samples are named by texts or whole numbers"),
            ({"column": "image", "key": "label"}, "two samples are called 1. Keys must be unique"),
            ({"column": "image", "key": "up"}, r"row 1 has '\.\./b', which is no relative path"),
            (
                {"column": "image", "extra": {"valid": {"name": "mask"}}, "extra_column": {"valid": "maks"}},
                r"data\.extra_column\.valid=maks: .*Did you mean 'mask'\?",
            ),
        ],
    )  # fmt: skip
    def test_mistakes(self, tmp_path, settings, reason):
        pictures = {"image": [png(0), png(1)], "mask": [png(0, "L"), png(1, "L")]}
        path = table(tmp_path / "a.parquet", label=[1, 1], name=["a", "b"], up=["a", "../b"], **pictures)
        with pytest.raises(DataError, match=reason):
            rows(path, **settings)


class TestKeys:
    def test_files_and_numbers(self, tmp_path):
        table(tmp_path / "d/b/x.parquet", image=[png(0)])
        table(tmp_path / "d/a.parquet", image=[png(1), None, png(2)])
        data = rows(tmp_path / "d")
        assert [data.key(n) for n in range(3)] == ["a/000000000", "a/000000002", "b/x/000000000"]
        assert [data.get(n).getvalue() for n in range(3)] == [png(1), png(2), png(0)]
        assert data.left_out == {"null in 'image'": 1}
        pattern = rows(tmp_path / "d/*.parquet")
        assert [pattern.key(n) for n in range(2)] == ["a/000000000", "a/000000002"]

    def test_a_column(self, tmp_path):
        names = ["cat/1.jpg", "cat/2.PNG", "dog/1.old.png", ".png"]
        path = table(
            tmp_path / "a.parquet", image=[png(n) for n in range(4)], name=names, number=[7, 8, 9, 10]
        )
        for _ in range(2):  # the second time from the cache
            data = rows(path, key="name")
            assert [data.key(n) for n in range(4)] == ["cat/1", "cat/2", "dog/1.old", ".png"]
        assert rows(path, key="number").key(3) == "10"

    def test_files_without_rows_and_names_that_no_file_can_have(self, tmp_path, caplog):
        table(tmp_path / "in/a.parquet", image=[png(0)], name=["x"])
        empty = pa.table({"image": pa.array([], pa.binary()), "name": pa.array([], pa.string())})
        pq.write_table(empty, tmp_path / "in/b.parquet")
        data = rows(tmp_path / "in", key="name", column="image")
        assert len(data) == 1 and not data.left_out and not caplog.text
        table(tmp_path / "long.parquet", image=[png(0)], name=["y" * 300])
        with pytest.raises(DataError, match=r"row 0 has 'yyy.* can name a sample"):
            rows(tmp_path / "long.parquet", key="name")


class TestNulls:
    def test_rows_without_a_sample_are_left_out(self, tmp_path):
        images = [
            None,
            {"bytes": png(1), "path": "x"},
            {"bytes": None, "path": "y.png"},
            {"bytes": png(3), "path": None},
        ]
        masks = [png(0, "L"), png(1, "L"), png(2, "L"), None]
        path = table(tmp_path / "a.parquet", image=images * 2, mask=[*masks[:3], png(3, "L"), *masks])
        both = {"column": "image", "extra": {"valid": {"name": "mask"}}, "extra_column": {"valid": "mask"}}
        for _ in range(2):  # the second time from the cache
            data = rows(path, **both)
            assert data.left_out == {"null in 'image'": 4, "null in 'mask'": 1}
            assert [data.key(n)[-1] for n in range(len(data))] == ["1", "3", "5"]
            assert data.get(1, "valid").getvalue() == png(3, "L")
            assert list(data.blocks.sizes) == [1, 1, 1]

    def test_nothing_but_nulls(self, tmp_path):
        with pytest.raises(DataError, match=r"has no rows\. Left out: 2 x null in 'image'"):
            rows(table(tmp_path / "a.parquet", image=[None, None], types={"image": pa.binary()}))


class TestDamage:
    def test_a_cut_file_is_left_out_and_named(self, tmp_path, caplog):
        whole = table(tmp_path / "d/a.parquet", image=[png(0), png(1)]).read_bytes()
        (tmp_path / "d/b.parquet").write_bytes(whole[:-20])
        data = rows(tmp_path / "d")
        assert len(data) == 2 and data.left_out == {"damaged file": 1}
        assert "b.parquet: damaged, or no Parquet file" in caplog.text
        with pytest.raises(DataError, match=r"data\.path: .*b\.parquet: damaged, or no Parquet file"):
            rows(tmp_path / "d/b.parquet")

    def test_a_damaged_page_costs_its_group(self, tmp_path):
        made = pa.table({"image": [png(n) for n in range(4)]})
        path = tmp_path / "a.parquet"
        pq.write_table(made, path, row_group_size=2, compression="none", write_page_checksum=True)
        content = bytearray(path.read_bytes())
        content[content.index(png(3)) + 100] ^= 255
        path.write_bytes(content)
        data = rows(path)
        assert data.get(1).getvalue() == png(1)
        with pytest.raises(DataError, match=r"a\.parquet: damaged.*could not verify page integrity|CRC"):
            data.get(3)

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("b.parquet", r"there is no such file\. Did you mean '.*a\.parquet'"),
            ("x", "there is no such file"),
            ("*.pq", "no file has such a name"),
            ("pipe:cat x", "never done"),
            ("s3://x/a.parquet", "is an address. Download"),
        ],
    )
    def test_what_is_not_there(self, tmp_path, monkeypatch, path, reason):
        monkeypatch.chdir(tmp_path)
        table(tmp_path / "a.parquet", image=[png(0)])
        with pytest.raises(DataError, match=reason):
            rows(Path(path) if "://" not in path else path)

    def test_groups_beyond_the_bound_are_refused(self, tmp_path, monkeypatch):
        path = table(tmp_path / "a.parquet", rows=4, image=[png(n) for n in range(4)])
        monkeypatch.setattr(parquet, "MOST_GROUP", 2000)
        with pytest.raises(DataError, match=r"a row group has .*Write the file again with smaller groups"):
            rows(path)


def test_a_file_is_scanned_once_until_it_changes(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", image=[png(0), None])
    scans, scan = [], parquet._read_scan

    def counted(file, *rest):
        scans.append(file)
        return scan(file, *rest)

    monkeypatch.setattr(parquet, "_read_scan", counted)
    assert len(rows(path)) == len(rows(path)) == 1 and len(scans) == 1
    table(path, image=[png(0), png(1), png(2)])
    assert len(rows(path)) == 3 and len(scans) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_unpacks_a_group_once_in_bounded_memory(tmp_path, monkeypatch, workers):
    """Batches of 16 are dealt to workers in turn, each of which holds a quarter of all."""
    values = np.arange(2048 * 512, dtype=np.float32).reshape(2048, 512)
    held = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 512)
    path = table(tmp_path / "a.parquet", rows=16, x=held)
    unpacked, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda *args, **kwargs: unpacked.append(args[1]) or read(*args, **kwargs),
    )
    data = vectors(path, memory_mib=1)
    made, most, seen = Order(data, seed=0), 0, Counter()
    for worker in range(workers):
        copied = pickle.loads(pickle.dumps(data))
        for batch in range(worker, 128, workers):
            for place in range(16 * batch, 16 * batch + 16):
                found = copied.get(made(0, place))
                seen[int(found[0]) // 512] += 1
                most = max(most, copied._groups.held.used)
    assert seen == Counter(range(2048)) and most <= 1 << 20
    assert len(unpacked) < 1.2 * 128


def test_batches_are_those_of_a_folder_with_the_same_keys(tmp_path):
    names = [f"{folder}/{n}" for folder in "ab" for n in range(4)]
    for number, name in enumerate(names):
        for kind, content in (("rgb", png(number)), ("mask", png(90 + number, "L"))):
            place = tmp_path / kind / f"{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    columns = {
        "image": [{"bytes": png(n), "path": None} for n in range(8)],
        "mask": [png(90 + n, "L") for n in range(8)],
    }
    for file in range(2):
        here = {name: values[4 * file : 4 * file + 4] for name, values in columns.items()}
        table(tmp_path / f"t/{file}.parquet", rows=3, name=names[4 * file : 4 * file + 4], **here)
    extra = {"valid": {"name": "mask"}}
    folder = parts(
        "folder", path=str(tmp_path / "rgb"), extra=extra, extra_path={"valid": str(tmp_path / "mask")}
    )
    made = parts(
        "parquet",
        path=str(tmp_path / "t"),
        column="image",
        key="name",
        extra=extra,
        extra_column={"valid": "mask"},
    )
    wanted = batches(folder, 0)
    for one, other in zip(batches(made, 0), wanted, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.x, other.x) and torch.equal(one.mask, other.mask)


def batches(built, workers, **place):
    data, modality, extra, cfg = built
    given = {"seed": 0, "start_step": 0, "steps": 4, "accumulate": 1, "rank": 0, "world": 1, **place}
    return [each.batch for each in TrainBatches(data, modality, extra, cfg, workers=workers, **given)]


class Counting:
    """A source whose samples are their numbers."""

    def __init__(self, laid):
        self.blocks = laid

    def __len__(self):
        return int(sum(self.blocks.sizes))


class TestOrder:
    LAID: ClassVar = [
        Blocks([5] * 200, 100),
        Blocks([7, 1, 30, 2, 2, 100, 3] * 20, 150),
        Blocks([1000], 10),
        Blocks([1] * 900, 899),
        Blocks([40] * 40, 1),
        Blocks([3, 4], 2),
    ]

    @pytest.mark.parametrize("laid", LAID, ids=range(len(LAID)))
    def test_every_epoch_has_every_sample_once(self, laid):
        made = Order(Counting(laid), seed=3)
        count, epochs = made.count, []
        for epoch in range(2):
            epochs.append([made(epoch, place) for place in range(count)])
            assert Counter(epochs[-1]) == Counter(range(count))
        assert epochs[0] != epochs[1]
        fresh = Order(Counting(laid), seed=3)
        assert [fresh(1, place) for place in reversed(range(count))] == epochs[1][::-1]

    def test_what_is_held_as_a_whole_is_shuffled_as_a_whole(self):
        laid = Blocks([5] * 20, 100)
        made, plain = Order(Counting(laid), seed=1), Order(range(100), seed=1)
        assert [made(0, place) for place in range(100)] == [plain(0, place) for place in range(100)]

    def test_samples_of_a_batch_come_from_many_blocks(self):
        made = Order(Counting(Blocks([50] * 400, 50 * 80)), seed=0)
        seen = {made(0, place) // 50 for place in range(ordering.TURN * ordering.LANES)}
        assert len(seen) > 60

    def test_a_side_has_the_blocks_of_its_samples(self):
        side = Side(Counting(Blocks([4, 4, 4], 6)), np.array([0, 1, 3, 8, 9]))
        assert list(side.blocks.sizes) == [3, 2] and side.blocks.together == 2
        assert blocks(Side([1, 2], np.array([1]))) is None


@pytest.mark.slow
def test_blocks_change_nothing_with_workers_and_ranks(tmp_path):
    path = table(tmp_path / "a.parquet", rows=4, x=[[[float(n)] * 3] * 2 for n in range(60)])
    data, *rest, cfg = parts("parquet", path=str(path), batch_size=4, modality=VALUES, input_size=None)
    data.blocks = Blocks(data.blocks.sizes, 10)
    built = data, *rest, cfg
    one = [batch.keys for batch in batches(built, 0, steps=18)]
    assert len({key for keys in one[:15] for key in keys}) == 60
    assert [batch.keys for batch in batches(built, 2, start_step=7, steps=18)] == one[7:]
    ranks = [batches(built, 0, steps=9, rank=rank, world=2) for rank in range(2)]
    assert [batch.keys for pair in zip(*ranks) for batch in pair] == one
