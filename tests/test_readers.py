"""The readers of files: what they read, what they refuse by name, and how `array` chooses one."""

import builtins
import gzip
import json
import pickle
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tifffile
from toys import run_tree, toy  # noqa: F401

from vqcore.assembly import open_data
from vqcore.compose.build import from_tree
from vqcore.config import deciding
from vqcore.data import readers
from vqcore.data.listing import Listing
from vqcore.data.readers import BySuffix
from vqcore.errors import DataError, UnknownName
from vqcore.protocols import named_parts
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.testing.conformance import ReaderConformance, configured

NUMBERS = np.arange(12, dtype=np.float32).reshape(3, 4)
BANDS = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)


def read(name, path, **settings):
    return registry().build("reader", configured("reader", name, settings)).read(path)


def refused(name, path, says, **settings):
    with pytest.raises(DataError, match=says) as caught:
        read(name, path, **settings)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def table(**columns):
    return pa.table(columns or {"a": [0.0, 1.0, 2.0, 3.0], "b": [4, 5, 6, 7], "c": [8, None, 10, 11]})


class TestNpy(ReaderConformance):
    component = "npy"

    def sample(self, folder):
        np.save(folder / "a.npy", NUMBERS)
        return folder / "a.npy"


class TestNpz(ReaderConformance):
    component, configs = "npz", ({}, {"key": "ecg"})

    def sample(self, folder):
        np.savez_compressed(folder / "a.npz", ecg=NUMBERS)
        return folder / "a.npz"


class TestTiff(ReaderConformance):
    component, configs = "tiff", ({}, {"page": 1})

    def sample(self, folder):
        tifffile.imwrite(folder / "a.tif", BANDS, photometric="minisblack", compression="zlib")
        return folder / "a.tif"


class TestCsv(ReaderConformance):
    component, configs = "csv", ({}, {"columns": ["b", "a"]})

    def sample(self, folder):
        (folder / "a.csv").write_text("a,b\n1,2.5\n,4\n")
        return folder / "a.csv"


class TestParquet(ReaderConformance):
    component, configs = "parquet", ({}, {"columns": ["b", "a"]})

    def sample(self, folder):
        pyarrow.parquet.write_table(table(), folder / "a.parquet")
        return folder / "a.parquet"


class TestHdf5(ReaderConformance):
    component, configs = "hdf5", ({}, {"dataset": "signals/ecg"})

    def sample(self, folder):
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("signals/ecg", data=NUMBERS, compression="gzip", chunks=(3, 2))
        return folder / "a.h5"


# What comes back


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_samples_of_a_tiff_come_first(tmp_path, planar):
    picture = BANDS if planar == "separate" else np.moveaxis(BANDS, 0, -1)
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", planarconfig=planar)
    np.testing.assert_array_equal(read("tiff", tmp_path / "a.tif"), BANDS)


def test_pages_of_a_tiff_are_channels_and_overviews_are_left_out(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for band in BANDS:
            file.write(band, photometric="minisblack")
        file.write(BANDS[0, ::2, ::2], photometric="minisblack", subfiletype=1)
    np.testing.assert_array_equal(read("tiff", tmp_path / "a.tif"), BANDS)
    np.testing.assert_array_equal(read("tiff", tmp_path / "a.tif", page=2), BANDS[2])
    refused("tiff", tmp_path / "a.tif", "has 3 pages", page=3)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([[1, -9999], [3, 4]], np.int16), "-9999"),
        (np.array([[1, -3.4028234663852886e38], [3, 4]], np.float32), "-3.40282346638529e+38"),
        (np.array([[1, np.nan], [3, 4]], np.float32), "nan"),
    ],
)
def test_the_no_data_value_of_gdal_becomes_a_mask(tmp_path, array, text):
    tifffile.imwrite(tmp_path / "a.tif", array, extratags=[(42113, "s", 0, text, True)])
    found = read("tiff", tmp_path / "a.tif")
    np.testing.assert_array_equal(np.ma.getmaskarray(found), [[False, True], [False, False]])
    np.testing.assert_array_equal(found.compressed(), [1, 3, 4])


def test_columns_by_name_and_empty_cells(tmp_path):
    (tmp_path / "a.csv").write_text("time;b;a\nmon;1;2\ntue;;4\n")
    found = read("csv", tmp_path / "a.csv", columns=["a", "b"], delimiter=";")
    np.testing.assert_array_equal(found.filled(-1), [[2, 4], [1, -1]])
    refused("csv", tmp_path / "a.csv", r"'time' holds .*columns=\[b,a\]", delimiter=";")
    refused("csv", tmp_path / "a.csv", r"no column 'bb'. Did you mean 'b'\?", columns=["bb"], delimiter=";")
    refused("csv", tmp_path / "a.csv", "'time;b;a' holds values of type string")


def test_a_table_without_names_loses_no_row(tmp_path):
    (tmp_path / "a.csv").write_text("1,2\n3,4\n5,6\n")
    np.testing.assert_array_equal(read("csv", tmp_path / "a.csv"), [[1, 3, 5], [2, 4, 6]])
    np.testing.assert_array_equal(read("csv", tmp_path / "a.csv", columns=["1"]), [[2, 4, 6]])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n3,4\n"))
    np.testing.assert_array_equal(read("csv", tmp_path / "a.csv.gz"), [[3], [4]])


def test_a_parquet_file_of_more_than_one_row_group(tmp_path):
    pyarrow.parquet.write_table(table(), tmp_path / "a.parquet", row_group_size=2)
    found = read("parquet", tmp_path / "a.parquet", columns=["c", "a"])
    np.testing.assert_array_equal(found.filled(-1), [[8, -1, 10, 11], [0, 1, 2, 3]])


def test_several_data_sets_need_a_name(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["ecg"], file["deep/labels"] = NUMBERS, NUMBERS + 1
    refused("hdf5", tmp_path / "a.h5", r"data sets deep/labels, ecg. Choose one, e.g. .*dataset=deep/labels")
    refused("hdf5", tmp_path / "a.h5", r"no data set 'ecgs'. Did you mean 'ecg'\?", dataset="ecgs")
    np.testing.assert_array_equal(read("hdf5", tmp_path / "a.h5", dataset="/deep/labels"), NUMBERS + 1)


def test_parts_are_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["ecg"], file["deep/labels"], file["text"] = NUMBERS, NUMBERS, "words"
        file["link"] = h5py.SoftLink("/ecg")
    np.savez(tmp_path / "a.npz", x=NUMBERS, y=NUMBERS)
    pyarrow.parquet.write_table(table(a=[1], b=["x"]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("a,b,a\n1,2,x\n")
    wanted = {"hdf5": ("deep/labels", "ecg"), "npz": ("x", "y"), "parquet": ("a",), "csv": ("b",)}
    for name, parts in wanted.items():
        reader = registry().build("reader", configured("reader", name, {}))
        found = next(path for path in tmp_path.iterdir() if path.suffix in reader.suffixes)
        assert named_parts(reader).parts(found) == parts
    assert named_parts(BySuffix()) is None


def test_other_byte_orders(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = NUMBERS.astype(">f8")
    tifffile.imwrite(tmp_path / "a.tif", NUMBERS, byteorder=">")
    np.save(tmp_path / "a.npy", NUMBERS.astype(">f4"))
    for name in ("a.h5", "a.tif", "a.npy"):
        np.testing.assert_array_equal(BySuffix().read(tmp_path / name), NUMBERS)


# What is refused


def test_objects_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    objects = np.array([Bomb(), 1], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    refused("npy", tmp_path / "a.npy", "Python objects|type object")
    np.savez(tmp_path / "a.npz", x=objects)
    refused("npz", tmp_path / "a.npz", "Python objects|type object")
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb()))
    refused("npy", tmp_path / "b.npy", "this is no .npy file")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("text", data=["a", "b"], dtype=h5py.string_dtype())
        file.create_dataset("references", data=[file.ref], dtype=h5py.ref_dtype)
        file.create_dataset("ragged", shape=(1,), dtype=h5py.vlen_dtype(np.int32))
        file.create_dataset("pairs", data=np.zeros(2, [("a", "f4"), ("b", "i4")]))
    for name in ("text", "references", "ragged", "pairs"):
        refused("hdf5", tmp_path / "a.h5", "only numbers can be read", dataset=name)
    pyarrow.parquet.write_table(table(x=[[1, 2], [3]]), tmp_path / "a.parquet")
    refused("parquet", tmp_path / "a.parquet", "'x' holds values of type list")
    assert not (tmp_path / "ran").exists()


def test_links_out_of_an_hdf5_file_are_refused(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = NUMBERS
    (tmp_path / "secret.bin").write_bytes(NUMBERS.tobytes())
    virtual = h5py.VirtualLayout(shape=(3, 4), dtype="f4")
    virtual[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", shape=(3, 4))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["external"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/x")
        file["group"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/")
        file["soft"] = h5py.SoftLink("/external")
        file.create_virtual_dataset("virtual", virtual)
        file.create_dataset("raw", (3, 4), "f4", external=[(str(tmp_path / "secret.bin"), 0, 48)])
    for name, says in {
        "external": "is a link to another file, .*secret.h5",
        "group/x": "is a link to another file",
        "soft": "is a link to /external: name that place",
        "virtual": "is a virtual data set",
        "raw": "its values lie in another file, .*secret.bin",
    }.items():
        refused("hdf5", tmp_path / "a.h5", says, dataset=name)


def test_companions_of_an_ome_tiff_are_not_opened(tmp_path, monkeypatch):
    """The description of an OME-TIFF may say that planes lie in another file."""
    tifffile.imwrite(tmp_path / "secret.ome.tif", NUMBERS)
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="float" SizeX="4" SizeY="3" SizeC="2" SizeZ="1" SizeT="1">'
        '<Channel ID="Channel:0" SamplesPerPixel="1"/><TiffData IFD="0" PlaneCount="1"/>'
        '<TiffData FirstC="1" PlaneCount="1"><UUID FileName="secret.ome.tif">urn:uuid:1</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    tifffile.imwrite(tmp_path / "a.tif", NUMBERS + 1, description=xml, metadata=None)
    seen, real = [], builtins.open

    def watched(path, *args, **kwargs):
        seen.append(str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    np.testing.assert_array_equal(read("tiff", tmp_path / "a.tif"), NUMBERS + 1)
    assert not any("secret" in path for path in seen)


def test_addresses_are_refused(toy):
    tree = run_tree("runs/a", data__name="folder", data__path="https://example.org/data")
    config = from_tree(tree, schema=RunConfig)
    modality = registry().build("modality", config.data.modality, size=None)
    with pytest.raises(DataError, match=r"data\.path: https://example\.org/data is an address"):
        open_data(config, modality, {}, "train")
    with pytest.raises(DataError, match="no such file"):
        BySuffix().read(Path("https://example.org/a.h5"))


@pytest.fixture
def strict(monkeypatch):
    """Bounds that a small file can pass."""
    monkeypatch.setattr(readers, "MOST_SAMPLE", 1 << 20)
    monkeypatch.setattr(readers, "MOST_CHUNK", 1 << 18)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, strict):
    zeros = np.zeros((2048, 1024), np.float32)
    np.savez_compressed(tmp_path / "a.npz", x=zeros)
    refused("npz", tmp_path / "a.npz", "a sample has at most")
    tifffile.imwrite(tmp_path / "a.tif", zeros, compression="zlib")
    refused("tiff", tmp_path / "a.tif", "a sample has at most")
    tifffile.imwrite(tmp_path / "b.tif", zeros[:200], compression="zlib", rowsperstrip=200)
    refused("tiff", tmp_path / "b.tif", "packed in pieces")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=zeros, compression="gzip")
        file.create_dataset("chunk", data=zeros[:200], compression="gzip", chunks=(200, 1024))
        file.create_dataset("never", shape=(20, 20), dtype="f4")
    refused("hdf5", tmp_path / "a.h5", "a sample has at most", dataset="x")
    refused("hdf5", tmp_path / "a.h5", "packed in pieces", dataset="chunk")
    refused("hdf5", tmp_path / "a.h5", "nothing was ever written", dataset="never")
    pyarrow.parquet.write_table(table(x=np.zeros(200_000)), tmp_path / "a.parquet")
    refused("parquet", tmp_path / "a.parquet", "a sample has at most")
    pyarrow.parquet.write_table(table(x=np.arange(100_000)), tmp_path / "b.parquet", use_dictionary=False)
    refused("parquet", tmp_path / "b.parquet", "packed in pieces")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"x\n" + b"0\n" * 200_000))
    refused("csv", tmp_path / "a.csv.gz", "packed in pieces")


def test_an_archive_that_lies_about_its_size(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2748779069440,), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    refused("npz", tmp_path / "a.npz", "damaged: an array of shape")


def test_a_filter_that_hdf5_would_load_from_a_library_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((3, 4))
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL)  # blosc
        space = h5py.h5s.create_simple((3, 4))
        h5py.Dataset(h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, plist))[()] = NUMBERS
    refused("hdf5", tmp_path / "a.h5", "HDF5 filter 32001")


@pytest.mark.parametrize(
    ("name", "file", "package"),
    [
        ("tiff", "a.tif", "tifffile"),
        ("csv", "a.csv", "pyarrow"),
        ("parquet", "a.parquet", "pyarrow"),
        ("hdf5", "a.h5", "h5py"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name, file, package):
    (tmp_path / file).write_text("1,2\n")
    real = readers.importlib.import_module
    raised = [lambda name: ModuleNotFoundError(f"No module named '{name}'", name=name)]

    def gone(wanted):
        if wanted.partition(".")[0] == package:
            raise raised[-1](package)
        return real(wanted)

    monkeypatch.setattr(readers.importlib, "import_module", gone)
    refused(name, tmp_path / file, rf"'{package}' is not installed; run: pip install 'vqcore\[files\]'")
    for broken in (
        ImportError,
        ValueError,
        lambda _: ModuleNotFoundError("No module named 'six'", name="six"),
    ):
        raised.append(broken)
        said = rf"'{package}' is installed, but cannot be imported \(.*run: pip install .* {package}$"
        refused(name, tmp_path / file, said)


def test_mutated_files_are_refused_or_read(tmp_path):
    """No error but `DataError`, whatever a few changed bytes say."""
    tifffile.imwrite(tmp_path / "a.tif", BANDS, photometric="minisblack", compression="zlib")
    pyarrow.parquet.write_table(table(), tmp_path / "a.parquet")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=NUMBERS, compression="gzip", chunks=(3, 2))
    (tmp_path / "a.csv").write_text("a,b\n1,2.5\n,4\n")
    draw = np.random.default_rng(0)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(60):
            changed = bytearray(whole)
            for place in draw.integers(len(whole), size=3):
                changed[place] = draw.integers(256)
            path.write_bytes(changed)
            try:
                assert BySuffix().read(path).dtype.kind in "biufc"
            except DataError as error:
                assert "\n" not in str(error)


# In a config


def test_a_reader_belongs_to_the_fingerprint(tmp_path):
    settings = {"channels": 2, "size": [8]}
    plain = configured("modality", "array", settings)
    named = configured("modality", "array", {**settings, "reader": {"name": "hdf5", "dataset": "a"}})
    other = configured("modality", "array", {**settings, "reader": {"name": "hdf5", "dataset": "b"}})
    facts = [json.dumps(deciding(one, "modality", registry().identity)) for one in (plain, named, other)]
    assert "reader" not in facts[0] and len(set(facts)) == 3


def test_the_reader_decides_which_files_are_samples(tmp_path):
    np.save(tmp_path / "a.npy", NUMBERS)
    (tmp_path / "labels.csv").write_text("name,age\na,3\n")
    settings = {"channels": 3, "size": [4]}
    both = registry().build("modality", configured("modality", "array", settings), size=None)
    one = registry().build(
        "modality", configured("modality", "array", {**settings, "reader": {"name": "npy"}}), size=None
    )
    assert len(Listing(str(tmp_path), both.suffixes, "data.path")) == 2
    assert len(Listing(str(tmp_path), one.suffixes, "data.path")) == 1
    np.testing.assert_array_equal(one.read(tmp_path / "a.npy"), NUMBERS)


def test_a_reader_of_a_plugin(toy, tmp_path):
    (tmp_path / "a.words").write_text("1 2 3\n4 5 6\n")
    cfg = configured("modality", "array", {"channels": 2, "size": [3], "reader": {"name": "toy/words"}})
    modality = registry().build("modality", cfg, size=None)
    assert modality.suffixes == (".words",)
    np.testing.assert_array_equal(modality.read(tmp_path / "a.words"), [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(UnknownName, match="toy/wordz"):
        configured("modality", "array", {"channels": 2, "size": [3], "reader": {"name": "toy/wordz"}})


def test_a_folder_without_readable_files_says_what_would_read_it(tmp_path):
    for name in ("a.wav", "b.edf", "c.words"):
        (tmp_path / name).write_bytes(b"0")
    with pytest.raises(DataError) as caught:
        Listing(str(tmp_path), BySuffix.suffixes, "data.path")
    text = str(caught.value)
    assert "1 x .edf" in text and "1 x .words" in text
    assert ".wav is read by audio/wave (modality)" in text
    assert "Nothing here reads" in text and "(channels, *size)" in text


def test_two_kinds_of_files_with_one_name_say_how_to_choose(tmp_path):
    np.save(tmp_path / "a.npy", NUMBERS)
    (tmp_path / "a.csv").write_text("1,2\n")
    with pytest.raises(DataError, match=r"differ in their suffix only.* data\.modality\.reader"):
        Listing(str(tmp_path), BySuffix.suffixes, "data.path")


def test_a_first_row_with_an_empty_cell_is_a_row(tmp_path):
    (tmp_path / "a.csv").write_text("1.0,,3.0\n4,5,6\n7,8,9\n")
    found = BySuffix().read(tmp_path / "a.csv")
    assert found.shape == (3, 3) and bool(np.ma.getmaskarray(found)[1, 0])
