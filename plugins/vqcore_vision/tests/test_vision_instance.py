"""Instances: label maps, stacks and annotations, boxes, random draws, and masks back in the picture."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from vqcore_vision.instance import Instance, paste
from vqcore_vision.pieces import Piece, tight

from vqcore.errors import DataError
from vqcore.protocols import View
from vqcore.testing.conformance import ModalityConformance


def instances(size=None, **settings):
    return Instance(Instance.Config(**settings), size=size)


def scene():
    """A disc (label 3), a triangle (9) and a bar (200) in a picture of 60 x 80."""
    rows, columns = np.mgrid[:60, :80]
    labels = np.zeros((60, 80), np.uint8)
    labels[(rows - 20) ** 2 + (columns - 20) ** 2 <= 15**2] = 3
    labels[(rows >= 30) & (rows < 55) & (columns >= 45) & (columns - 45 <= rows - 30)] = 9
    labels[5:10, 50:78] = 200
    return labels


def tensor(modality, source, view=None):
    raw = modality.read(source)
    return modality.tensor(raw, view or modality.view(modality.extent(raw), modality.spec.size, None))


class TestInstance(ModalityConformance):
    component = "vision/instance"
    configs = ({}, {"min_crop_scale": 0.2, "hflip": 1.0})
    size = (32, 32)

    def source(self):
        return scene()


class TestFiles:
    @pytest.mark.parametrize("mode", ["L", "P", "I;16", "I"])
    def test_label_maps_of_every_mode(self, tmp_path, mode):
        labels = scene().astype(np.uint16) * (200 if mode in ("I;16", "I") else 1)
        path = tmp_path / ("a.tif" if mode == "I" else "a.png")
        if mode == "P":
            image = Image.fromarray(scene()).convert("P")
            image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
        else:
            image = Image.fromarray(labels.astype({"L": np.uint8, "I;16": np.uint16, "I": np.int32}[mode]))
        assert image.mode == mode
        image.save(path)
        found = instances().read(path).found
        assert [each.box for each in found] == [(5, 5, 36, 36), (30, 45, 55, 70), (5, 50, 10, 78)]

    def test_coco_colours_are_labels(self, tmp_path):
        labels = np.where(scene() > 0, scene().astype(np.int64) * 1000, 0)
        colours = np.stack([labels % 256, labels // 256 % 256, labels // 65536], -1).astype(np.uint8)
        Image.fromarray(colours).save(tmp_path / "a.png")
        assert len(instances().read(tmp_path / "a.png").found) == 3

    def test_stacks_may_overlap(self, tmp_path):
        stack = np.zeros((3, 20, 30), bool)
        stack[0, 2:12, 3:13], stack[1, 5:15, 8:28] = True, True
        np.save(tmp_path / "a.npy", stack)
        assert [each.box for each in instances().read(tmp_path / "a.npy").found] == [
            (5, 8, 15, 28),
            (2, 3, 12, 13),
        ]

    def test_boxes_and_masks_are_those_of_numpy(self):
        labels = np.random.default_rng(0).integers(0, 6, (40, 50))
        found = instances().read(labels).found
        assert len(found) == 5
        for each in found:
            name = labels[each.top :, each.left :][: each.mask.shape[0], : each.mask.shape[1]][each.mask][0]
            rows, columns = np.nonzero(labels == name)
            assert each.box == (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
            top, left, bottom, right = each.box
            assert np.array_equal(each.mask, labels[top:bottom, left:right] == name)

    def test_a_silhouette_is_what_is_brighter(self):
        grey = (scene() == 3) * np.uint8(100) + np.uint8(20)
        assert [each.box for each in instances(threshold=60).read(grey).found] == [(5, 5, 36, 36)]

    @pytest.mark.parametrize(
        "array, settings, says",
        [
            (np.zeros((9, 9), np.uint8), {}, "has no instance; everything is background"),
            (np.full((9, 9), 255, np.uint8), {"ignore": (0, 255)}, "has no instance"),
            (np.zeros((2, 9, 9), bool), {}, "has no instance"),
            (np.tile(np.arange(150) == 3, (200, 1)), {"min_area": 0.5}, "covers 0.0067 .*min_area=0.5"),
            (np.zeros((9, 9)), {}, "type float64; a label map is"),
            (np.full((9, 9), np.nan), {}, "type float64"),
            (np.full((9, 9), -1), {}, "label -1; labels are never negative"),
            (np.zeros((2, 2, 9, 9), bool), {}, "shape"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_said(self, tmp_path, array, settings, says):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(DataError, match=says):
            instances(**settings).read(tmp_path / "a.npy")

    def test_transparency_is_refused_and_damage_named(self, tmp_path):
        Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"a\.png: has mode RGBA"):
            instances().read(tmp_path / "a.png")
        (tmp_path / "b.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"b\.png: "):
            instances().read(tmp_path / "b.png")

    @pytest.mark.parametrize(
        "settings, says",
        [({"min_area": 1.0}, "min_area"), ({"ignore": (-1,)}, "ignore"), ({"hflip": 2.0}, "hflip")],
    )
    def test_settings_out_of_range(self, settings, says):
        with pytest.raises(ValueError, match=says):
            instances(**settings)


class TestDraws:
    def test_evaluation_takes_the_largest_in_its_box(self):
        x = tensor(instances(31), scene())
        assert x.shape == (1, 31, 31) and np.array_equal(x[0], (scene() == 3)[5:36, 5:36])

    def test_training_draws_all_alike(self):
        modality = instances(16, min_crop_scale=1.0, ratio=(1.0, 1.0), hflip=0.0)
        square = np.pad(scene(), ((10, 10), (0, 0)))
        raw = modality.read(square)
        wanted = modality.every(square)[0]
        counts = np.zeros(3)
        for seed in range(900):
            x = modality.tensor(raw, modality.view(raw.extent, (16, 16), np.random.default_rng(seed)))
            counts += [bool(torch.equal(x, one)) for one in wanted]
        assert counts.sum() == 900 and (np.abs(counts - 300) < 75).all()

    def test_a_crop_cuts_the_masks_and_their_boxes(self):
        """A view of the right half has only the triangle and the bar."""
        view = View(start=(0.0, 0.5), stop=(1.0, 1.0), size=(25, 25))
        assert np.array_equal(tensor(instances(), scene(), view)[0], (scene() == 9)[30:55, 45:70])
        view = View(start=(0.0, 20 / 80), stop=(1.0, 0.5), size=(31, 16))
        assert np.array_equal(tensor(instances(), scene(), view)[0], (scene() == 3)[5:36, 20:36])

    def test_a_view_has_one_entry_an_axis_and_its_draw_decides(self):
        modality = instances(16)
        raw, rng = modality.read(scene()), np.random.default_rng(0)
        for view in (modality.view((60, 80), (16, 16), None), modality.view((60, 80), (16, 16), rng)):
            assert (len(view.start), len(view.stop), view.extent) == (2, 2, (60, 80))
        whole_picture = View(start=(0.0, 0.0), stop=(1.0, 1.0), size=(16, 16))
        drawn = [modality.tensor(raw, replace(whole_picture, draw=draw)) for draw in range(1, 40)]
        assert len({x.numpy().tobytes() for x in drawn}) == 3
        assert torch.equal(modality.tensor(raw, replace(whole_picture, draw=7)), drawn[6])
        assert torch.equal(modality.tensor(raw, whole_picture), modality.every(scene())[0][0])

    def test_a_crop_without_instances_is_ignored(self):
        view = View(start=(0.9, 0.0), stop=(1.0, 0.1), size=(31, 31))
        assert np.array_equal(tensor(instances(), scene(), view)[0], (scene() == 3)[5:36, 5:36])

    def test_a_mirror(self):
        view = View(start=(0.0, 0.5), stop=(1.0, 1.0), size=(25, 25), flip=True)
        assert np.array_equal(tensor(instances(), scene(), view)[0], (scene() == 9)[30:55, 45:70][:, ::-1])


class TestMasks:
    def test_zeros_and_ones_of_64_px(self):
        modality = instances()
        x = tensor(modality, scene())
        assert x.shape == (1, 64, 64) and set(x.unique().tolist()) == {0.0, 1.0}
        assert (modality.spec.kind, modality.spec.loss, modality.spec.range) == ("binary", "bce", (0.0, 1.0))

    def test_a_shown_mask_is_read_as_it_was(self):
        modality = instances()
        x = tensor(modality, scene())
        assert torch.equal(tensor(modality, modality.show(x)), x)
        assert np.array_equal(np.asarray(modality.show(0.2 + 0.6 * x)), np.asarray(x[0] * 255))

    @pytest.mark.parametrize(
        "ignore, ends", [((0, 255), [0, 254]), ((255,), [254, 255]), ((0, 300), [0, 255])]
    )
    def test_a_shown_mask_has_labels_that_mean_the_same(self, ignore, ends):
        modality = instances(ignore=ignore)
        x = tensor(instances(), scene())
        shown = modality.show(x)
        assert np.unique(shown).tolist() == ends
        assert torch.equal(tensor(modality, shown), x)

    def test_thin_lines_survive_shrinking(self):
        line = np.eye(400, dtype=np.uint8)
        x = tensor(instances(), line)[0]
        assert x.diagonal().all() and x.sum() < 64 * 5

    def test_every_instance_returns_to_its_place(self):
        modality = instances()
        masks, boxes = modality.every(scene())
        pasted = paste(masks, boxes, (60, 80))
        for found, label in zip(pasted, (3, 9, 200)):
            wanted = scene() == label
            assert (found & wanted).sum() / (found | wanted).sum() > 0.93


def polygon(*corners):
    return [number for corner in corners for number in corner]


def annotated(*codes, height=60, width=80, **more):
    """The content of a file of annotations."""
    notes = [{"segmentation": code, "iscrowd": 0} for code in codes]
    return {"image": {"height": height, "width": width}, "annotations": notes, **more}


def whole(piece, extent):
    """An instance in its picture."""
    page = np.zeros(extent, bool)
    top, left, bottom, right = piece.box
    page[top:bottom, left:right] = piece.stretched((bottom - top, right - left))
    return page


RING = np.zeros((12, 16), bool)
RING[1:9, 2:12], RING[3:6, 5:9], RING[11, 15] = True, False, True
RING_COUNTS = [25, 8, 4, 8, 4, 8, 4, *[2, 3, 3, 4] * 4, 8, 4, 8, 4, 8, 50, 1]
DISC = np.add.outer((np.arange(60) - 20) ** 2, (np.arange(80) - 20) ** 2) <= 15**2
DISC_TEXT = "P:1f1:I4L4M2N2N2O0O2O0O2O0000000O20N100000001N101N101N2N2N3L4L7FQb2"


class TestAnnotations:
    @pytest.mark.parametrize(
        "counts, mask",
        [
            ("i0840000JO11OO11OO11OO1150000^1I", RING),  # the texts are from pycocotools 2.0.11
            (RING_COUNTS, RING),
            (DISC_TEXT, DISC),
            ("5220002O", np.pad([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], ((1, 0), (1, 0))) > 0),
        ],
    )
    def test_run_lengths(self, tmp_path, counts, mask):
        code = {"size": list(mask.shape), "counts": counts}
        (tmp_path / "a.json").write_text(json.dumps({"annotations": [{"segmentation": code}]}))
        raw = instances().read(tmp_path / "a.json")
        assert raw.extent == mask.shape and len(raw.found) == 1
        assert np.array_equal(whole(raw.found[0], raw.extent), mask)

    def test_compressed_counts_may_be_bytes(self):
        """pycocotools.mask.encode returns bytes."""
        (found,) = instances().read(annotated({"size": [60, 80], "counts": DISC_TEXT.encode()})).found
        assert np.array_equal(whole(found, (60, 80)), DISC)
        with pytest.raises(DataError, match="which is no digit"):
            instances().read(annotated({"size": [60, 80], "counts": b"P:1\xff"}))

    def test_crowds_and_empty_ones_alone_are_no_instance(self, tmp_path):
        crowd = {"segmentation": {"size": [60, 80], "counts": [0, 4800]}, "iscrowd": 1}
        content = annotated({"size": [60, 80], "counts": [4800]})
        content["annotations"].append(crowd)
        (tmp_path / "a.json").write_text(json.dumps(content))
        says = "has no instance; all 2 annotations are crowds or empty"
        for source, name in ((content, "annotations in memory"), (tmp_path / "a.json", "a.json")):
            with pytest.raises(DataError, match=f"{name}: {says}"):
                instances().read(source)
        with pytest.raises(DataError, match=r"annotations in memory: the largest of 1 .*min_area=0\.9"):
            instances(min_area=0.9).read(annotated({"size": [60, 80], "counts": DISC_TEXT}))

    def test_polygons_fill_what_their_edges_enclose(self):
        """Against the pixels whose centres lie inside, by the formula of each shape."""
        rows, columns = np.mgrid[:60, :80] + 0.5
        turn = np.linspace(0, 2 * np.pi, 90, endpoint=False)
        disc = polygon(*zip(30.2 + 20 * np.cos(turn), 31.7 + 20 * np.sin(turn)))
        triangle = polygon((40, 10), (75, 10), (40, 50))
        raw = instances().read(annotated([disc], [triangle]))
        wanted = [
            (columns - 30.2) ** 2 + (rows - 31.7) ** 2 < 400,
            (columns > 40) & (rows > 10) & ((columns - 40) / 35 + (rows - 10) / 40 < 1),
        ]
        for found, inside in zip(raw.found, wanted, strict=True):
            page = whole(found, raw.extent)
            assert (page != inside).sum() <= 0.02 * inside.sum()
        assert [each.box for each in raw.found] == [(11, 10, 52, 51), (10, 40, 50, 75)]

    def test_several_polygons_are_one_instance(self):
        one, other = polygon((5, 5), (15, 5), (15, 15), (5, 15)), [[25, 5], [35, 5], [35, 25], [25, 25]]
        (found,) = instances().read(annotated([one, other])).found
        wanted = np.zeros((60, 80), bool)
        wanted[5:15, 5:15], wanted[5:25, 25:35] = True, True
        assert found.box == (5, 5, 25, 35) and np.array_equal(whole(found, (60, 80)), wanted)

    def test_a_crop_cuts_polygons_as_it_cuts_their_pixels(self):
        """Of a U, only the two prongs reach into the crop; the box is tight around the two parts."""
        u = polygon((10, 5), (20, 5), (20, 40), (60, 40), (60, 20), (70, 20), (70, 50), (10, 50))
        (outline,) = instances().read(annotated([u])).found
        pixels = tight(Piece(0, 0, whole(outline, (60, 80))))
        for box in ((0, 0, 30, 80), (0, 15, 60, 65), (10, 0, 45, 30), (0, 25, 30, 55), (5, 10, 50, 70)):
            cut, wanted = outline.cut(box), pixels.cut(box)
            assert (cut is None) == (wanted is None)
            if cut is not None:
                assert cut.box == wanted.box
                assert np.array_equal(whole(cut, (60, 80)), whole(wanted, (60, 80)))

    def test_polygons_are_drawn_at_the_size_that_is_wanted(self):
        """Nine pixels become 128 with straight edges; stretched pixels would have stairs."""
        triangle = polygon((4, 4), (13, 4), (4, 13))
        fine = tensor(instances((128, 128)), annotated([triangle]))[0].numpy()
        rows, columns = (np.mgrid[:128, :128] + 0.5) / 128
        inside = rows + columns < 1
        assert (fine != inside).mean() < 0.01

    def test_beyond_the_picture_there_is_nothing(self):
        half = polygon((-30, 10), (20, 10), (20, 40), (-30, 40))
        outside = polygon((100, 10), (120, 10), (120, 40))
        raw = instances().read(annotated([half], [outside]))
        assert [each.box for each in raw.found] == [(10, 0, 40, 20)]

    def test_masks_return_to_their_places(self):
        modality = instances()
        source = annotated([polygon((5, 5), (45, 12), (20, 50))], {"size": [60, 80], "counts": DISC_TEXT})
        masks, boxes = modality.every(source)
        found = modality.read(source).found
        for page, each in zip(paste(masks, boxes, (60, 80)), found, strict=True):
            wanted = whole(each, (60, 80))
            assert (page & wanted).sum() / (page | wanted).sum() > 0.95

    def test_layouts_of_coco_and_sa_1b(self, tmp_path):
        code = {"size": [60, 80], "counts": DISC_TEXT}
        crowd = {"segmentation": {"size": [60, 80], "counts": [0, 4800]}, "iscrowd": 1}
        coco = {
            "images": [{"id": 3, "height": 60, "width": 80}],
            "annotations": [{"segmentation": code}, crowd],
        }
        sam = {"image": {"image_id": 3, "height": 60, "width": 80}, "annotations": [{"segmentation": code}]}
        for content in (coco, sam, [{"segmentation": code}]):
            (found,) = instances().read(content).found
            assert np.array_equal(whole(found, (60, 80)), DISC)

    @pytest.mark.parametrize(
        "content, says",
        [
            ("[1, 2", "a.json: damaged: not valid JSON: Expecting"),
            ("7", "is a int; expected is {image"),
            ('{"anotations": []}', "has anotations; expected is"),
            ({"annotations": []}, "has no instance; the list of annotations is empty"),
            (
                {"images": [{}, {}], "annotations": [{}]},
                "annotations of 2 pictures; write one file for each picture",
            ),
            (
                {"annotations": [{"segmentation": [[1, 2, 3, 4, 5, 6]]}]},
                "the size of the picture is missing",
            ),
            (annotated([[1, 2, 3, 4]]), r"annotations\[0\].segmentation: a polygon has 4 numbers"),
            (annotated([[1, 2, 3, 4, 5, "a"]]), "not a list of numbers"),
            (annotated([[1, 2, 3, 4, 5, float("nan")]]), "a polygon has the coordinate nan"),
            (annotated(None), "is NoneType; expected are polygons"),
            (annotated({"size": [60, 80], "counts": [1, 2]}), "add up to 3, but there are 60 x 80 = 4800"),
            (
                annotated({"size": [80, 60], "counts": [4800]}),
                r"has size \[80, 60\], but the picture has 60 x 80 pixels",
            ),
            (annotated({"size": [60, 80], "counts": [4801, -1]}), "add up to 4800"),
            (annotated({"size": [60, 80], "counts": "P:1f1:Q"}), "ends in the middle of a number"),
            (annotated({"size": [60, 80], "counts": "P:1 "}), "has ' ', which is no digit"),
            (annotated({"size": [60, 80]}), "neither a list of integers nor text"),
            (annotated({"size": [60, 80], "counts": [4800]}), "has no instance"),
            ({"images": None, "annotations": [{}]}, "a.json: the size of the picture is missing"),
            ({"images": {"a": {}, "b": {}}, "annotations": [{}]}, "a.json: images is a dict"),
            (
                {"annotations": [{"segmentation": {"size": None}}]},
                "a.json: the size of the picture is missing",
            ),
            ({"annotations": [{"segmentation": {"size": 5}}]}, "a.json: the size of the picture is missing"),
            (annotated([[1, 2, 3, 4, 5, 6]], height=10**30), "a.json: the picture has 10{30} x 80 pixels"),
            (annotated([[1, 2, 3, 4, 5, 6]], height=None), "a.json: the picture has None x 80 pixels"),
            (annotated({"size": None, "counts": [4800]}), r"a.json: .* has size None, but the picture"),
            (annotated({"size": 5, "counts": [4800]}), r"a.json: .* has size 5, but the picture"),
            (annotated({"size": [60, 80], "counts": [10**30]}), "a.json: .* add up to 10{30}, but"),
            (annotated({"size": [60, 80], "counts": [2**63, 2**63, 4800]}), "a.json: .* add up to 18446744"),
            (annotated({"size": [60, 80], "counts": "o" * 40 + "0"}), "a.json: .* add up to"),
            (annotated([[1, 2, 3, 4, 5, 10**400]]), "a.json: .* not a list of numbers"),
            (annotated([[1, 2, 3, 4, 5, 1e300]]), "a.json: .* a polygon has the coordinate 1e[+]300"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, content, says):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=says):
            instances().read(tmp_path / "a.json")
