"""Ways to get one's own data wrong, and what says so.

`WAYS` is the table. Each row makes a small folder of real files, wrong or right, and a config for it. One test runs the
command on the wrong one: an error names the cause in one line and ends with status 2, a warning says it and goes on.
The other test runs the same command on the right one, where the sentence must not appear: a warning that is always
there is no warning.

Nothing can see axes of legal lengths in the wrong order (a transposed picture, time before space, swapped columns). The
shapes fit, the values fit, and the tokenizer learns. Only a person who looks at the pictures of the report knows.
"""

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from toys import run_tree

from vqcore.check import checks
from vqcore.cli import main
from vqcore.commands import check
from vqcore.data.readers import BySuffix
from vqcore.registry import registry

SHAPE, LONG = (2, 8, 8), (2, 64)
COUNT = 6


class Case:
    """A folder for one way, wrong or right. Paths are names below `root`."""

    def __init__(self, root: Path, wrong: bool, patch: pytest.MonkeyPatch):
        self.root, self.wrong, self.patch = root, wrong, patch
        self.draw = np.random.default_rng(0)

    def normal(self, mean: Any = 0.0, deviation: Any = 1.0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
        """Normal values; a list of means or deviations has one for each channel."""
        mean, deviation = (np.reshape(one, (-1,) + (1,) * (len(shape) - 1)) for one in (mean, deviation))
        return self.draw.normal(mean, deviation, shape).astype(np.float32)

    def uniform(self, low: float = -1.0, high: float = 1.0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
        return self.draw.uniform(low, high, shape).astype(np.float32)

    def classes(self, count: int) -> np.ndarray:
        return self.draw.integers(0, count, (8, 8)).astype(np.uint8)

    def paths(self, suffix: str = ".npy", folder: str = "files", count: int = COUNT) -> Iterator[Path]:
        """The files to write."""
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            yield self.root / folder / f"r{number:02}{suffix}"

    def save(self, make: Callable[[], np.ndarray], folder: str = "files", count: int = COUNT) -> None:
        """One `.npy` file for each call of `make`."""
        for path in self.paths(folder=folder, count=count):
            np.save(path, make())

    def one(self, number: int = 0) -> Path:
        return self.root / "files" / f"r{number:02}.npy"


@dataclass(frozen=True)
class Way:
    """How to make the data; the returned changes of the config, where `modality` holds settings of `array`."""

    make: Callable[[Case], dict[str, Any] | None]
    says: str
    command: str
    error: bool


WAYS: dict[str, Way] = {}


def way(says: str, *, command: str = "check", error: bool = False):
    """A row of the table, named after its function."""

    def add(make):
        WAYS[make.__name__.replace("_", " ")] = Way(make, says, command, error)
        return make

    return add


# ---------------------------------------------------------------------------------------------------- values


@way("little varies in channel 0 .* codes would say little but their position")
def a_scale_far_too_wide(case):
    case.save(lambda: case.normal([0.5, 0], [0.05, 1]))
    mean, std = ([0, 0], [1, 1]) if case.wrong else ([0.5, 0], [0.05, 1])
    return {"modality": {"scale": {"kind": "standard", "mean": mean, "std": std}}}


@way(r"the standard deviations of the channels differ \d+ times")
def channels_that_differ_by_orders_of_magnitude(case):
    case.save(lambda: case.normal(0, [0.15, 5] if case.wrong else 1))


@way(r"values run from -1[78]\d.* to 1[78]\d.*, beyond 2 pi, and kind=angle takes radians")
def degrees_where_radians_are_declared(case):
    case.save(lambda: case.uniform() * (180 if case.wrong else np.pi))
    return {"modality": {"kind": "angle"}}


@way(r"channel 0: \d+% of the values are exactly -1 and \d+% exactly 1: they look cut off")
def values_that_are_cut_off(case):
    case.save(lambda: np.clip(case.normal(0, 0.8), -1, 1) if case.wrong else case.uniform())
    return {"modality": {"range": [-1, 1]}}


@way(r"r03 of 6 samples may be in other units: its deviation is [\d,]{3,5} times that of a usual sample")
def one_file_in_other_units(case):
    one_file(case, lambda array: array * 1000)


@way(r"r03 of 6 samples may be in other units: its median lies 2\d\d deviations away")
def one_file_with_another_zero(case):
    one_file(case, lambda array: array + 273.15)


def one_file(case, change):
    """Normal values; one file of the wrong version is changed."""
    case.save(case.normal)
    if case.wrong:
        np.save(case.one(3), change(case.normal()))


@way("values run from .* and no scale is declared")
def large_numbers_without_a_scale(case):
    case.save(lambda: case.normal([900, 3000], [90, 300]))
    scale = {"kind": "standard", "mean": [900, 3000], "std": [90, 300]}
    return {"modality": {} if case.wrong else {"scale": scale}}


@way("under the scale; networks learn from values of size 1")
def far_outliers(case):
    case.save(case.normal)
    if case.wrong:
        np.save(case.one(3), np.where(np.arange(8) == 3, 1e4, case.normal()))
    return {"modality": {"scale": {"kind": "standard", "mean": [0, 0], "std": [1, 1]}}}


@way("error     data.path: .* lies outside the declared range -1 to 1", error=True)
def a_range_that_cuts_values_off(case):
    case.save(case.normal)
    return {"modality": {"range": [-1, 1] if case.wrong else [-6, 6]}}


@way(r"-> The files hold 0 to 255: set data\.modality\.range=\[0,255\]", error=True)
def bytes_where_shares_are_declared(case):
    case.save(lambda: case.draw.integers(0, 256, SHAPE).astype(np.uint8))
    return {"modality": {"range": [0, 1 if case.wrong else 255]}}


@way(r"error: data.* outside the declared range 0 to 1", command="train", error=True)
def training_on_bytes_where_shares_are_declared(case):
    return bytes_where_shares_are_declared(case)


@way(r"values run from -1 to .*0\.4% of the declared -1 to 1")
def shares_where_bytes_are_declared(case):
    case.save(lambda: case.uniform(0, 1))
    return {"modality": {"range": [0, 255 if case.wrong else 1]}}


@way("never below 0, but -1 to 1 is declared")
def values_that_are_not_centred(case):
    case.save(lambda: case.uniform(0 if case.wrong else -1, 1))
    return {"modality": {"range": [-1, 1]}}


@way("channel 1 never changes")
def a_channel_that_is_constant(case):
    case.save(lambda: case.normal(0, [1, 0 if case.wrong else 1]))


@way("every value of a channel is the same", error=True)
def a_data_set_that_is_constant(case):
    case.save(lambda: np.zeros(SHAPE, np.float32) if case.wrong else case.normal())


@way(r"the value 0\.0 .* has no logarithm; scale\.kind=arcsinh takes all values", error=True)
def zeros_under_a_logarithm(case):
    case.save(lambda: np.exp(case.normal()) * (case.uniform(0, 1) > (0.1 if case.wrong else 0)))
    return {"modality": {"scale": {"kind": "log", "low": 0.1, "high": 10}}}


@way(r"belongs to a vector of length .*, not 1 \(data\.modality\.tolerance=", error=True)
def directions_that_are_not_of_length_1(case):
    def make():
        vectors = case.normal()
        return vectors if case.wrong else vectors / np.linalg.norm(vectors, axis=0)

    case.save(make)
    return {"modality": {"kind": "unit-vector"}}


@way("the value 255 .* is neither 0 nor 1, the two values of a binary array", error=True)
def a_binary_mask_of_0_and_255(case):
    case.save(lambda: case.draw.integers(0, 2, SHAPE).astype(np.uint8) * (255 if case.wrong else 1))
    return {"modality": {"kind": "binary"}}


@way("the value 1e.300 .* is not finite in single precision", error=True)
def numbers_beyond_single_precision(case):
    spoilt(case, lambda path: np.save(path, np.full(SHAPE, 1e300)))


@way("the value -1.0 .* is a weight below 0", error=True)
def weights_below_0(case):
    case.save(lambda: np.stack([*case.normal(), np.full((8, 8), -1.0 if case.wrong else 1.0)]))
    return {"modality": {"channels": 3, "weight": 2}}


# --------------------------------------------------------------------------------------------- what is missing


def holes(case, number):
    """Normal values, a few of them `number` in every file."""

    def make():
        array = case.normal()
        array[0, 0, :2] = number
        return array

    case.save(make)


@way(r"the value nan at \[0, 0, 0\] .*data\.modality\.nodata=\[\] takes NaN", error=True)
def nan_in_all_files(case):
    holes(case, np.nan)
    return {"modality": {} if case.wrong else {"nodata": []}}


@way(r"1 of 6 samples that were tried cannot be read: r03\. r03: .*the value nan", error=True)
def nan_in_one_file_of_six(case):
    spoilt(case, lambda path: np.save(path, np.full(SHAPE, np.nan)))


@way(r"1 of 24 samples that were tried cannot be read: r03\. r03: .*the value nan")
def nan_in_so_few_files_that_training_skips_them(case):
    case.save(case.normal, count=24 if case.wrong else COUNT)
    if case.wrong:
        np.save(case.one(3), np.full(SHAPE, np.nan))


@way("the value inf at .* is not finite", error=True)
def infinity(case):
    spoilt(case, lambda path: np.save(path, np.full(SHAPE, np.inf)))


@way(r"values run from -9999 to .*and no scale is declared")
def no_data_as_numbers(case):
    holes(case, -9999)
    return {"modality": {} if case.wrong else {"nodata": [-9999]}}


@way("little varies in channels 0, 1 beside the scale")
def a_scale_that_was_measured_with_no_data_in_it(case):
    case.save(lambda: np.where(case.uniform(0, 1) < 0.1, -9999, case.normal(20, 1)))
    mean, std = (-981, 3005) if case.wrong else (20, 1)
    return {"modality": {"nodata": [-9999], "scale": {"kind": "standard", "mean": mean, "std": std}}}


@way(r"nodata: \[-9999\.0\]  # please check: -9999 lies far from all other values", command="new")
def no_data_as_numbers_and_no_config_yet(case):
    def make():
        array = case.normal(shape=LONG)
        array[0, :2] = -9999 if case.wrong else array[0, :2]
        return array

    case.save(make, count=24)


WIDE = np.reshape([1.0, 6000.0], (2, 1, 1))
"""Deviations of two channels: -9999 lies far from the values of the first, and among those of the second."""


@way(r"nodata: \[-9999\.0\]  # please check: -9999 lies far from", command="new")
def no_data_beside_a_channel_that_reaches_as_far(case):
    def make():
        array = case.normal(shape=(2, 16, 16)) * WIDE
        array[:, 0, :2] = -9999 if case.wrong else array[:, 0, :2]
        return array.astype(np.float32)

    case.save(make, count=24)


@way(r"-9999 occurs, far from all other values of a channel: learned as a value")
def no_data_under_a_scale_that_hides_it(case):
    holes(case, -9999)
    scale = {"scale": {"kind": "standard", "mean": 0, "std": 1000 if case.wrong else 1}}
    return {"modality": scale if case.wrong else {**scale, "nodata": [-9999]}}


@way(r"has no position where every channel has a value; -1, NaN and infinity count as missing", error=True)
def a_no_data_value_that_is_everywhere(case):
    case.save(lambda: np.stack([np.full((8, 8), -1.0 if case.wrong else 1.0), case.normal()[0]]))
    return {"modality": {"nodata": [-1]}}


@way(
    r"the no-data value -9999 does not occur in 6 samples, but -999 does, far from all other values of a channel"
)
def another_no_data_value_than_that_of_the_files(case):
    holes(case, -999)
    return {"modality": {"nodata": [-9999 if case.wrong else -999]}}


@way(
    r"the reader marks 2 of 64 values as missing; data\.modality\.nodata=\[\] takes them as a mask",
    error=True,
)
def no_data_of_a_geotiff_without_nodata(case):
    for path in case.paths(".tif"):
        array = case.normal(shape=(8, 8))
        array[0, :2] = -9999
        tifffile.imwrite(path, array, extratags=[(42113, "s", 0, "-9999", True)])
    return {"modality": {"channels": 1} if case.wrong else {"channels": 1, "nodata": []}}


@way(r"the reader marks 1 of 16 values as missing", error=True)
def empty_cells_of_a_table(case):
    tables(case, empty=case.wrong)
    return {"modality": READ}


# ------------------------------------------------------------------------------------------------ shapes, channels


@way(r"has 8 channels \(shape \(8, 8, 2\).* set data\.modality\.channels_last=true", error=True)
def channels_last(case):
    case.save(lambda: case.normal(shape=(8, 8, 2)))
    return {"modality": {"channels_last": not case.wrong}}


@way(
    r"has 8 channels \(shape \(2, 8, 8\), channels last\).* set data\.modality\.channels_last=false",
    error=True,
)
def channels_first(case):
    case.save(case.normal)
    return {"modality": {"channels_last": True} if case.wrong else {}}


@way(r"has 3 channels \(shape \(3, 8, 8\), channels first\), but 2 are declared", error=True)
def another_number_of_channels(case):
    case.save(lambda: case.normal(shape=(3, 8, 8) if case.wrong else SHAPE))


@way(r"has shape \(2, 64\), but 2 channels and 2 axes are declared", error=True)
def another_number_of_axes(case):
    case.save(lambda: case.normal(shape=LONG if case.wrong else SHAPE))


@way(r"error: .*the files have different numbers of axes: .*3 axes", command="new", error=True)
def unequal_shapes(case):
    case.save(lambda: case.normal(shape=LONG), count=24)
    if case.wrong:
        np.save(case.one(5), case.normal(shape=(*LONG, 3)))


@way(r"6 of 6 samples are smaller than 8 x 8: enlarged")
def samples_smaller_than_the_size(case):
    case.save(lambda: case.normal(shape=(2, 4, 4) if case.wrong else SHAPE))


@way("scale has 3 numbers for 2 channels", error=True)
def a_scale_for_other_channels(case):
    case.save(case.normal)
    mean, std = ([0, 0, 0], [1, 1, 1]) if case.wrong else ([0, 0], [1, 1])
    return {"modality": {"scale": {"kind": "standard", "mean": mean, "std": std}}}


@way(r"data\.eval_path: .*has 3 channels .*but 2 are declared", error=True)
def held_out_samples_of_another_kind(case):
    case.save(case.normal)
    case.save(lambda: case.normal(shape=(3, 8, 8) if case.wrong else SHAPE), folder="held")
    return {"data__eval_path": str(case.root / "held")}


# ------------------------------------------------------------------------------------------------------ classes


def classified(labels):
    """The config of class maps."""
    return {"modality": {"kind": "categorical", "channels": None, "labels": labels}, "model__embed_dim": 3}


@way("has values of type float64; class ids are integers", error=True)
def class_ids_as_floats(case):
    case.save(lambda: case.classes(6).astype(np.float64 if case.wrong else np.uint8))
    return classified(6)


@way(r"the value [345] at .* is no label; data\.modality\.labels=3 \(0 to 2\)", error=True)
def too_few_labels(case):
    case.save(lambda: case.classes(6))
    return classified(3 if case.wrong else 6)


@way("channel 0: only whole numbers, 6 different ones from 0 to 5. They look like class ids")
def class_ids_as_quantities(case):
    case.save(lambda: (case.classes(6) if case.wrong else case.normal(shape=(8, 8))).astype(np.float32))
    return {"modality": {"channels": 1}}


@way(r"-> If so, use kind binary: data\.modality\.kind=binary data\.modality\.range=\[0,255\]")
def a_mask_as_quantities(case):
    case.save(lambda: case.classes(2) * np.uint8(255) if case.wrong else case.normal(shape=(8, 8)) * 50 + 128)
    return {"modality": {"channels": 1, "scale": {"kind": "standard", "mean": 128, "std": 100}}}


@way("only class 2 occurs")
def class_maps_of_one_class(case):
    case.save(lambda: np.full((8, 8), 2, np.uint8) if case.wrong else case.classes(6))
    return classified(6)


@way("please check: whole numbers from 0 to 5 look like class ids", command="new")
def whole_numbers_that_may_be_classes(case):
    case.save(lambda: case.classes(6) if case.wrong else case.normal(shape=LONG), count=24)


# -------------------------------------------------------------------------------------------------------- files


def tables(case, **more):
    """CSV files of two columns with eight rows; `more` says what is odd about them."""
    for path in case.paths(".csv"):
        cells = [[f"{value:.4f}" for value in row] for row in case.normal(shape=(8, 2))]
        if more.get("empty"):
            cells[3][1] = ""
        if more.get("text"):
            cells[3][1] = "high"
        rows = [",".join(row) for row in [["hip", "knee"], *cells]]
        path.write_text("\n".join(rows).replace(",", more.get("delimiter", ",")) + "\n")


TABLE = {"size": [8]}
READ = {**TABLE, "reader": {"name": "csv", "columns": ["hip", "knee"]}}


@way("there is no column 'kne'. Did you mean 'knee'.*Columns: hip, knee", error=True)
def a_column_that_does_not_exist(case):
    tables(case)
    wrong = {**TABLE, "reader": {"name": "csv", "columns": ["hip", "kne"]}}
    return {"modality": wrong if case.wrong else READ}


@way("the column 'knee' holds values of type string; only numbers can be read", error=True)
def text_in_a_table(case):
    tables(case, text=case.wrong)
    return {"modality": READ}


@way("the column 'hip;knee' holds values of type string", error=True)
def another_delimiter(case):
    tables(case, delimiter=";" if case.wrong else ",")
    return {"modality": {**TABLE, "reader": {"name": "csv"}} if case.wrong else READ}


def signals(case):
    """HDF5 files of two data sets."""
    for path in case.paths(".h5"):
        with h5py.File(path, "w") as file:
            file["signals/ecg"], file["signals/eeg"] = case.normal(), case.normal()


@way("contains no data set 'signals/ecgs'. Did you mean 'signals/ecg'", error=True)
def a_data_set_that_does_not_exist(case):
    signals(case)
    dataset = "signals/ecgs" if case.wrong else "signals/ecg"
    return {"modality": {"reader": {"name": "hdf5", "dataset": dataset}}}


@way(
    r"contains the data sets signals/ecg, signals/eeg\. Choose one, e\.g\. data\.modality\.reader\.dataset=",
    error=True,
)
def several_data_sets_and_no_name(case):
    signals(case)
    return {"modality": {} if case.wrong else {"reader": {"name": "hdf5", "dataset": "signals/ecg"}}}


@way(r"'h5py' is not installed; run: pip install 'vqcore\[files\]'", error=True)
def the_extra_is_missing(case):
    signals(case)
    if case.wrong:
        case.patch.setitem(sys.modules, "h5py", None)
    return {"modality": {"reader": {"name": "hdf5", "dataset": "signals/ecg"}}}


@way(r"has 1 pages, and data\.modality\.reader\.page=1 counts from 0", error=True)
def a_page_that_does_not_exist(case):
    for path in case.paths(".tif"):
        tifffile.imwrite(path, case.normal(shape=(8, 8)))
    return {"modality": {"channels": 1, "reader": {"name": "tiff", "page": int(case.wrong)}}}


@way(r"r05\.npy and r05\.tif differ in their suffix only.*data\.modality\.reader", error=True)
def two_kinds_of_files_with_one_name(case):
    case.save(case.normal)
    if case.wrong:
        tifffile.imwrite(case.one(5).with_suffix(".tif"), case.normal(), photometric="minisblack")


@way(r"please check: there are 24 x \*\.npy, 1 x \*\.csv", command="new")
def a_table_of_labels_beside_the_samples(case):
    case.save(lambda: case.normal(shape=LONG), count=24)
    if case.wrong:
        (case.root / "files" / "labels.csv").write_text("name,age\nr00,3\n")


@way(
    r"contains no file of a readable type .*Found: 6 x \.png\. \.png is read by .*rgb \(modality\)",
    error=True,
)
def pictures_where_arrays_are_declared(case):
    for path in case.paths(".png"):
        Image.fromarray(case.draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return {} if case.wrong else {"data__modality": {"name": "rgb"}, "data__input_size": 8}


@way(
    r"error: .*Found: 1 x \.edf\. Nothing here reads \.edf: a plugin can add a reader",
    command="new",
    error=True,
)
def files_that_nothing_reads(case):
    case.save(lambda: case.normal(shape=LONG), count=0 if case.wrong else 24)
    if case.wrong:
        (case.root / "files" / "a.edf").write_bytes(b"0")


@way("has values of type complex64; only real numbers can be read", error=True)
def complex_numbers(case):
    case.save(lambda: case.normal().astype(np.complex64 if case.wrong else np.float32))


def spoilt(case, spoil):
    """Files of which the third is spoilt."""
    case.save(case.normal)
    if case.wrong:
        spoil(case.one(3))


@way(r"r03: .*r03\.npy: .*(is empty|no data left|EOF|no \.npy file)", error=True)
def an_empty_file(case):
    spoilt(case, lambda path: path.write_bytes(b""))


@way(r"r03\.npy: damaged: an array of shape \[2, 8, 8\] .* bytes follow the header", error=True)
def a_truncated_file(case):
    spoilt(case, lambda path: path.write_bytes(path.read_bytes()[:-100]))


@way(r"r03\.npy: .*Python objects|type object", error=True)
def an_array_of_objects(case):
    spoilt(case, lambda path: np.save(path, np.array([np.eye(2), None], dtype=object), allow_pickle=True))


@way(r"r03\.npy: this is no \.npy file", error=True)
def a_pickle(case):
    spoilt(case, lambda path: path.write_bytes(pickle.dumps(case.normal())))


@way(r"r03\.npy: this is an archive of arrays, not a \.npy file\. Rename the file to \.npz", error=True)
def an_archive_with_the_name_of_an_array(case):
    def spoil(path):
        np.savez(path.with_suffix(".npz"), case.normal())
        path.with_suffix(".npz").rename(path)

    spoilt(case, spoil)


@way("there is no such folder. Did you mean '.*files'", error=True)
def a_folder_that_is_spelt_wrong(case):
    case.save(case.normal)
    return {"data__path": str(case.root / ("fils" if case.wrong else "files"))}


@way("is an address. Download the files, and give their folder", error=True)
def an_address(case):
    case.save(case.normal)
    return {"data__path": "https://example.org/data"} if case.wrong else {}


# ------------------------------------------------------------------------------------------------ held-out samples


@way(r"warning   data\.eval_path: the held-out samples are training samples too \(6 of 6 ")
def the_same_folder_on_both_sides(case):
    case.save(case.normal)
    case.save(case.normal, folder="held")
    return {"data__eval_path": str(case.root / ("files" if case.wrong else "held"))}


@way("data.eval_path: the held-out samples are training samples too", command="train")
def training_with_the_same_folder_on_both_sides(case):
    return the_same_folder_on_both_sides(case)


@way(r"\(1 of 6 .*: r04 has the content of r02")
def a_copy_under_another_name(case):
    case.save(case.normal)
    case.save(case.normal, folder="held")
    if case.wrong:
        shutil.copy(case.one(2), case.root / "held" / "r04.npy")
    return {"data__eval_path": str(case.root / "held")}


@way(
    r"warning   data\.eval_share: the held-out samples are training samples too .*a/r.* has the content of b/r"
)
def copies_in_a_set_that_is_divided(case):
    case.save(case.normal, folder="files/a")
    if case.wrong:
        shutil.copytree(case.root / "files" / "a", case.root / "files" / "b")
    return {"data__eval_share": 0.4}


@way(r"warning   data\.eval_share: .* training samples too .* has the content of a/r")
def samples_that_are_all_equal(case):
    one = case.normal()
    case.save(lambda: one if case.wrong else case.normal(), folder="files/a")
    return {"data__eval_share": 0.4}


@way(
    r"warning   data\.path: 1 of 6 samples that were compared are copies of others: (r01|r04) has the content of r0"
)
def copies_in_the_training_set(case):
    case.save(case.normal)
    if case.wrong:
        shutil.copy(case.one(4), case.one(1))


@way(r"data\.group=\^\(p\[0-9\]\+\)/: the key 'r00' does not match", error=True)
def a_group_that_not_all_keys_have(case):
    for patient in range(6):
        case.save(case.normal, folder=f"files/p{patient}", count=2)
    if case.wrong:
        np.save(case.one(0), case.normal())
    return {"data__eval_share": 0.4, "data__group": "^(p[0-9]+)/"}


@way("please check: 12 folders such as p.* each stay on one side", command="new")
def a_patient_on_both_sides(case):
    if not case.wrong:
        case.save(lambda: case.normal(shape=LONG), count=24)
    for patient in range(12 * case.wrong):
        case.save(lambda: case.normal(shape=LONG), folder=f"files/p{patient}", count=2)


@way(r"error: .*: too few: 2 files, 2 samples\. .* Add files, or cut long ones", command="new", error=True)
def too_few_samples(case):
    case.save(lambda: case.normal(shape=LONG), count=2 if case.wrong else 24)


@way(r"error: .*: too few: 1 file, 39 samples\. .*data.name=array", command="new", error=True)
def one_array_of_many_samples(case):
    case.save(lambda: case.normal(shape=(2, 40_000) if case.wrong else LONG), count=1 if case.wrong else 24)


@way(r"a step takes 20 samples and there are 6: a step sees some samples more than once")
def batches_larger_than_the_data_set(case):
    case.save(case.normal)
    return {"data__batch_size": 20} if case.wrong else {}


# ----------------------------------------------------------------------------------------- a tokenizer that is there


@way(r"error: .*outside the declared range -1 to 1", command="tokenize", error=True)
def files_in_other_units_than_the_tokenizer_learnt(case):
    case.save(lambda: case.uniform(-1, 255 if case.wrong else 1))


@way(r"error: .*has 3 channels .*but 2 are declared", command="tokenize", error=True)
def files_with_other_channels_than_the_tokenizer_learnt(case):
    case.save(lambda: case.uniform(shape=(3 if case.wrong else 2, 8, 8)))


@way(r"error: .*outside the declared range -1 to 1", command="eval", error=True)
def an_evaluation_in_other_units(case):
    case.save(lambda: case.uniform(-1, 255 if case.wrong else 1))


@way(
    "the tokenizer is not clearly better than a constant: .*Look at the scale of the values first",
    command="train",
)
def noise_instead_of_data(case):
    def make():
        side = 8 if case.wrong else 1
        return np.broadcast_to(np.sign(case.normal(shape=(2, side, side))), SHAPE)

    case.save(make)
    case.save(make, folder="held")
    return {
        "data__eval_path": str(case.root / "held"),
        "run__steps": 15,
        "optim__lr": 0.1,
        "data__batch_size": 6,
    }


# -------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module", autouse=True)
def toys():
    """The names `toy/...` work in the whole file. What `check` does beside the data, and takes long, is left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent / "fixtures" / "toy"))
        patch.setattr(check, "check_folder", lambda config: [])
        for name in ("learns", "whole_step"):
            patch.setattr(checks, name, lambda run, batch: ())
        registry.cache_clear()
        yield
    registry.cache_clear()


@pytest.fixture(scope="module")
def trained(toys, tmp_path_factory):
    """A run on values of -1 to 1, made when a row first asks for it."""
    made = []

    def run() -> str:
        if not made:
            root = tmp_path_factory.mktemp("trained")
            case = Case(root, False, pytest.MonkeyPatch())
            case.save(case.uniform)
            assert main(["train", config(root, {"modality": {"range": [-1, 1]}})]) == 0
            made.append(str(root / "run"))
        return made[0]

    return run


def config(root: Path, changes: dict[str, Any]) -> str:
    """A config of toys for the files; returns its path."""
    modality = {"name": "array", "channels": 2, "size": [8, 8], **changes.pop("modality", {})}
    settings = {"data__name": "folder", "data__path": str(root / "files"), "data__modality": modality}
    tree = run_tree(root / "run", **{"run__steps": 2, "run__save_every": 100, **settings, **changes})
    path = root / "mine.yaml"
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.fixture(scope="module")
def heard():
    """What commands said of equal files with equal settings: many rows have the same right version."""
    return {}


@pytest.fixture
def said(tmp_path, monkeypatch, trained, heard, capsys, caplog):
    """Run the command of a row on its wrong or its right version: status, standard error, and all that was said."""

    def run(way: Way, wrong: bool) -> tuple[int, str, str]:
        changes = way.make(Case(tmp_path, wrong, monkeypatch)) or {}
        content = [(str(path.relative_to(tmp_path)), path.read_bytes()) for path in files(tmp_path)]
        key = (way.command, json.dumps(changes).replace(str(tmp_path), ""), *content)
        if wrong or key not in heard:
            words = command_line(way.command, tmp_path, changes, trained)
            capsys.readouterr(), caplog.clear()
            status = main(words)
            out, err = capsys.readouterr()
            answer = status, err, out + err + caplog.text
            if wrong:
                return answer
            heard[key] = answer
        return heard[key]

    return run


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def command_line(command: str, root: Path, changes: dict[str, Any], trained: Callable[[], str]) -> list[str]:
    folder = str(root / "files")
    if command == "new":
        return ["new", "config", folder, "--out", str(root / "new.yaml")]
    if command == "tokenize":
        return ["tokenize", trained(), folder, str(root / "tokens")]
    if command == "eval":
        return ["eval", trained(), f"data.eval_path={folder}", "--json", str(root / "eval.json")]
    return [command, config(root, changes)]


@pytest.mark.parametrize("name", WAYS)
def test_the_wrong_way_is_named(name, said):
    way = WAYS[name]
    status, err, text = said(way, wrong=True)
    found = [line for line in text.splitlines() if re.search(way.says, line)]
    assert found, text
    assert status == (2 if way.error else 0), text
    assert "Traceback" not in text
    if way.command == "check":
        assert found[0].startswith(("error  " if way.error else "warning  ", "          -> "))
    elif way.error:
        assert [line for line in err.splitlines() if line.startswith("error: ")] == found


@pytest.mark.parametrize("name", WAYS)
def test_the_right_way_is_not_complained_of(name, said):
    way = WAYS[name]
    status, _, text = said(way, wrong=False)
    assert status == 0, text
    assert not re.search(way.says, text), text


@pytest.mark.parametrize("order", "<>")
def test_both_byte_orders_are_read(tmp_path, order):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.save(tmp_path / "a.npy", values.astype(f"{order}f4"))
    np.savez(tmp_path / "a.npz", values.astype(f"{order}f8"))
    tifffile.imwrite(tmp_path / "a.tif", values.astype(np.uint16), byteorder=order)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = values.astype(f"{order}i4")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(BySuffix().read(path), values, err_msg=path.name)


def test_the_table_is_long_enough():
    assert len(WAYS) >= 20
