"""Poses: files, roots and mirrors; joint and rotation errors against NumPy and scipy."""

import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from vqcore_vision.metrics import JointError, RotationError, rotation_matrices
from vqcore_vision.pose import _SMPL_PAIRS, Pose, _stick_figure

from vqcore.errors import ConfigError, DataError
from vqcore.modalities.rgb import RGB
from vqcore.protocols import View
from vqcore.testing.conformance import ModalityConformance

PAIRS = tuple((a - 1, b - 1) for a, b in _SMPL_PAIRS)
WHOLE = View(start=(0.0,), stop=(1.0,), size=(1,))
MIRROR = View(start=(0.0,), stop=(1.0,), size=(1,), flip=True)


def pose(**settings):
    return Pose(Pose.Config(**{"joints": 5, **settings}), size=None)


def points(dims=2, seed=0):
    return np.random.default_rng(seed).uniform(0, 100, (5, dims)).astype(np.float32)


def turns(count=23, seed=0):
    return Rotation.random(count, random_state=seed).as_matrix().astype(np.float32)


def tensor(modality, source, view=WHOLE):
    return modality.tensor(modality.read(source), view)


class TestPose(ModalityConformance):
    component = "vision/pose"
    configs = (
        {"joints": 5},
        {
            "joints": 5,
            "root": 2,
            "scale": 50.0,
            "hflip": 0.5,
            "flip_pairs": [[0, 1]],
            "bones": [[0, 1], [1, 2]],
        },
    )

    def source(self):
        return points()


class TestFiles:
    def test_shapes_joint_by_joint(self, tmp_path):
        x = points(3)
        for name, stored in {"a": x, "b": x.reshape(-1), "c": np.stack([x, x + 1])}.items():
            np.save(tmp_path / f"{name}.npy", stored)
            (tmp_path / f"{name}.json").write_text(json.dumps(stored.tolist()))
            for suffix in (".npy", ".json"):
                found = tensor(pose(dims=3), tmp_path / f"{name}{suffix}")
                assert np.array_equal(found[:, 0], x.reshape(-1)), (name, suffix)

    def test_4d_humans_first_person_and_nobody(self, tmp_path):
        """The 207 numbers that 4M's tokenizer sees: the first person's matrices, row by row; zeros without a person."""
        matrices = turns(46).reshape(2, 23, 3, 3)
        (tmp_path / "two.json").write_text(
            json.dumps({"pred_smpl_params": {"body_pose": matrices.tolist(), "betas": [[0.0] * 10] * 2}})
        )
        (tmp_path / "none.json").write_text("{}")
        (tmp_path / "empty.json").write_text("[]")
        settings = {"joints": 23, "value": "rotation-matrix", "key": "pred_smpl_params.body_pose"}
        modality = pose(**settings, missing="zeros")
        assert modality.spec.channels == 207 and modality.spec.loss == "smooth_l1"
        found = tensor(modality, tmp_path / "two.json")
        assert np.array_equal(found[:, 0].numpy(), np.array(matrices[0]).flatten())
        assert np.array_equal(modality.show(found), matrices[0])
        for name in ("none", "empty"):
            assert not tensor(modality, tmp_path / f"{name}.json").any()
            with pytest.raises(DataError, match=rf"{name}\.json: has no person"):
                pose(**settings).read(tmp_path / f"{name}.json")

    @pytest.mark.parametrize(
        "content, key, says",
        [
            ([[1.0, 2.0]] * 4, None, r"shape \(4, 2\), but 5 joints of 2 numbers"),
            ([[1.0, 2.0, 3.0]] * 5, None, r"shape \(5, 3\)"),
            ([[1.0, 2.0]] * 4 + [[1.0]], None, "not an array of numbers"),
            ([[1.0, None]] * 5, None, "number 1 of joint 0 is nan"),
            ([[1.0, "a"]] * 5, None, "not an array of numbers"),
            ([[1.0, 2.0]] * 4 + [[float("nan"), 0]], None, "number 0 of joint 4 is nan"),
            ({"joints": []}, None, "is an object of joints; .*data.modality.key"),
            ({"joint": [[1, 2]] * 5}, "joints", "has no 'joints' .* Did you mean 'joint'"),
            ([], None, "has no person"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, content, key, says):
        (tmp_path / "p.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=says):
            pose(key=key).read(tmp_path / "p.json")

    def test_a_damaged_file_is_named(self, tmp_path):
        (tmp_path / "p.json").write_text("[1, 2")
        with pytest.raises(DataError, match=r"p\.json: "):
            pose().read(tmp_path / "p.json")


class TestPlaces:
    def test_root_and_scale(self):
        modality = pose(root=1, scale=50.0, dims=3)
        found = tensor(modality, points(3))
        assert np.allclose(found.view(5, 3), (points(3) - points(3)[1]) / 50, atol=1e-6)
        assert np.allclose(modality.show(found), points(3) - points(3)[1], atol=1e-4)
        assert torch.allclose(tensor(modality, modality.show(found)), found, atol=1e-6)

    def test_center_comes_back(self):
        modality = pose(center=(50.0, 40.0), scale=50.0)
        found = tensor(modality, points())
        assert np.allclose(found.view(5, 2), (points() - [50, 40]) / 50, atol=1e-6)
        assert np.allclose(modality.show(found), points(), atol=1e-4)
        assert np.allclose(modality.values(found[None])[0].T, points(), atol=1e-4)

    def test_a_mirror_exchanges_left_and_right(self):
        """In a picture of width 100, x becomes 100 - x, and left and right joints are exchanged."""
        modality = pose(center=(50.0, 0.0), flip_pairs=((1, 2), (3, 4)))
        shown = modality.show(tensor(modality, points(), MIRROR))
        wanted = points()[[0, 2, 1, 4, 3]] * [-1, 1] + [100, 0]
        assert np.allclose(shown, wanted, atol=1e-4)

    def test_twice_mirrored_is_unchanged(self):
        modality = pose(dims=3, root=0, flip_pairs=((1, 2),))
        once = modality.show(tensor(modality, points(3), MIRROR))
        assert torch.allclose(tensor(modality, once, MIRROR), tensor(modality, points(3)), atol=1e-4)

    def test_only_a_share_of_the_training_samples_is_mirrored(self):
        modality = pose(hflip=0.25)
        flips = [modality.view((1,), (1,), np.random.default_rng(i)).flip for i in range(2000)]
        assert 0.22 < np.mean(flips) < 0.28
        assert not modality.view((1,), (1,), None).flip


class TestRotations:
    def test_mirrored_rotations_pose_the_mirrored_body(self):
        """The joints of the mirrored pose are the mirror image of the joints, left and right exchanged."""
        sides = np.arange(24)
        for a, b in _SMPL_PAIRS:
            sides[[a, b]] = b, a
        matrices = turns()
        wanted = _stick_figure(matrices)[sides] * [-1, 1, 1]
        modality = pose(joints=23, value="rotation-matrix", flip_pairs=PAIRS)
        found = modality.show(tensor(modality, matrices, MIRROR))
        assert np.allclose(_stick_figure(found), wanted, atol=1e-5)
        vectors = Rotation.from_matrix(matrices).as_rotvec()
        modality = pose(joints=23, value="axis-angle", flip_pairs=PAIRS)
        found = modality.show(tensor(modality, vectors, MIRROR))
        assert np.allclose(_stick_figure(Rotation.from_rotvec(found).as_matrix()), wanted, atol=1e-5)

    def test_matrices_of_vectors_and_nearest_rotations(self):
        """Against scipy, whose from_matrix takes the nearest rotation too."""
        vectors = Rotation.random(20, random_state=1).as_rotvec()
        given = torch.from_numpy(vectors.T.copy())[None]
        assert np.allclose(rotation_matrices(given)[0], Rotation.from_rotvec(vectors).as_matrix(), atol=1e-9)
        noisy = turns(20).reshape(20, 9) + np.random.default_rng(0).normal(0, 0.1, (20, 9)).astype(np.float32)
        found = rotation_matrices(torch.from_numpy(noisy.T.copy())[None])[0].numpy()
        u, _, vh = np.linalg.svd(noisy.reshape(20, 3, 3).astype(np.float64))
        assert np.allclose(found, u @ vh, atol=1e-6)
        assert np.allclose(np.linalg.det(found), 1)

    def test_rotation_error_is_the_angle_between(self):
        metric = RotationError(RotationError.Config(), spec=pose(joints=23, value="rotation-matrix").spec)
        one, two = Rotation.random(23, random_state=2), Rotation.random(23, random_state=3)
        wanted = np.degrees((one.inv() * two).magnitude()).mean()
        for values in (lambda r: r.as_matrix().reshape(23, 9), lambda r: r.as_rotvec()):
            a, b = (torch.from_numpy(values(r).T.copy())[None] for r in (one, two))
            assert abs(metric.summary(metric.measure(a, b))[""] - wanted) < 1e-4
            assert metric.summary(metric.measure(a, a))[""] < 1e-4

    def test_angles_wrap_around(self):
        metric = RotationError(RotationError.Config(), spec=pose(value="angle").spec)
        a, b = torch.tensor([[[3.1, 0.0]]]), torch.tensor([[[-3.1, 0.5]]])
        wanted = np.degrees((2 * np.pi - 6.2 + 0.5) / 2)
        assert abs(metric.summary(metric.measure(a, b))[""] - wanted) < 1e-4

    def test_a_hundredth_of_a_degree_is_seen(self):
        metric = RotationError(RotationError.Config(), spec=pose(joints=1, value="rotation-matrix").spec)
        small = Rotation.from_euler("z", 0.01, degrees=True).as_matrix().reshape(1, 9, 1)
        same = np.eye(3).reshape(1, 9, 1)
        assert (
            abs(metric.summary(metric.measure(torch.from_numpy(small), torch.from_numpy(same)))[""] - 0.01)
            < 1e-6
        )


def test_joint_error_is_mpjpe_in_the_units_of_the_files():
    modality = pose(dims=3, root=0, scale=100.0)
    metric = JointError(JointError.Config(), spec=modality.spec)
    x = torch.stack([tensor(modality, points(3, seed)) for seed in range(4)])
    x_hat = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    joints = [(y * 100).view(4, 5, 3).numpy() for y in (x_hat, x)]
    wanted = np.sqrt(((joints[0] - joints[1]) ** 2).sum(-1)).mean()
    found = metric.summary(metric.measure(modality.values(x_hat), modality.values(x)))[""]
    assert metric.in_units and abs(found - wanted) < 1e-3


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"joints": 0}, "joints=0"),
        ({"flip_pairs": ((1, 5),)}, r"flip_pairs has \[1, 5\]: a pair is two different joints of 0..4"),
        ({"flip_pairs": ((-1, 2),)}, r"\[-1, 2\]"),
        ({"flip_pairs": ((2, 2),)}, r"\[2, 2\]"),
        ({"flip_pairs": ((1, 2), (2, 3))}, "joint 2 more than once"),
        ({"bones": ((0, 9),)}, "bones has"),
        ({"root": 5}, "root=5"),
        ({"center": (1.0, 2.0, 3.0)}, "3 numbers for dims=2"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"hflip": 2.0}, "hflip=2.0"),
        ({"value": "axis-angle", "root": 0}, "for positions, not for value=axis-angle"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(ValueError, match=says):
        pose(**settings)


class TestPicture:
    def test_joints_and_bones_are_where_they_should_be(self):
        x = np.array([[0.0, 0.0], [-1.0, -1.0], [1.0, 1.0], [1.0, -1.0], [0.0, 1.0]], np.float32)
        modality = pose(bones=((0, 1),), flip_pairs=((1, 2),))
        found = np.asarray(modality.picture(tensor(modality, x))).astype(int)
        assert found.shape == (128, 128, 3)
        corner = round((1 - 1 / 1.1) / 2 * 127)
        assert found[corner, corner, 2] > 150 and found[127 - corner, 127 - corner, 0] > 150
        assert (found[64, 64] == 0).all() and (found[34, 34] < 240).any() and (found[94, 34] == 255).all()
        up = pose(bones=((0, 1),), flip_pairs=((1, 2),), y_up=True)
        assert (
            np.abs(
                np.asarray(up.picture(tensor(up, x)))[127 - corner, corner].astype(int)
                - found[corner, corner]
            ).max()
            == 0
        )

    def test_every_value_has_a_picture(self):
        for settings in ({"dims": 3}, {"joints": 23, "value": "axis-angle"}, {"value": "angle"}):
            modality = pose(**settings)
            drawn = np.asarray(modality.picture(torch.randn(modality.spec.channels, 1)).convert("RGB"))
            assert drawn.std() > 1


class TestBesideAPicture:
    """Positions follow the crop of their picture."""

    def picture(self, joints, height=120, width=160):
        """Black, with a bright dot of 5 x 5 pixels around each joint, with a different level for each joint."""
        grey = np.zeros((height, width), np.uint8)
        for number, (across, down) in enumerate(joints, start=1):
            left, top = int(across), int(down)
            grey[top - 2 : top + 3, left - 2 : left + 3] = 40 * number
        return np.repeat(grey[..., None], 3, -1)

    def test_joints_stay_on_what_they_mark(self):
        """A dot in the crop of the picture is at the position of its joint."""
        joints = np.array([[50.5, 40.5], [80.5, 60.5], [110.5, 50.5], [70.5, 90.5], [95.5, 35.5]], np.float32)
        rgb = RGB(RGB.Config(resample="nearest", min_crop_scale=0.6, hflip=0.5), size=(96, 128))
        modality, shares = pose(), pose(frame="shares")
        picture, flips = rgb.read(self.picture(joints)), set()
        for seed in range(12):
            view = rgb.view((120, 160), (96, 128), np.random.default_rng(seed))
            flips.add(view.flip)
            grey = (rgb.tensor(picture, view)[0] + 1) * 127.5
            found = modality.tensor(joints, view).view(5, 2)
            assert torch.allclose(
                shares.tensor(joints / np.float32([160, 120]), view).view(5, 2) * torch.tensor([128.0, 96.0]),
                found,
                atol=1e-3,
            )
            for number, (across, down) in enumerate(found.tolist(), start=1):
                rows, columns = np.nonzero((grey - 40 * number).abs().numpy() < 4)
                if len(rows):
                    assert abs(columns.mean() + 0.5 - across) < 1.2 and abs(rows.mean() + 0.5 - down) < 1.2
        assert flips == {False, True}

    def test_a_mirror_swaps_sides(self):
        view = View(start=(0.0, 0.5), stop=(0.5, 1.0), size=(10, 20), flip=True, extent=(40, 40))
        joints = np.array([[20, 0], [40, 20], [30, 10], [30, 0], [20, 20]], np.float32)
        found = pose(flip_pairs=((0, 1),)).tensor(joints, view).view(5, 2).tolist()
        assert found == [[0, 10], [20, 0], [10, 5], [10, 0], [20, 10]]

    @pytest.mark.parametrize(
        "settings", [{"dims": 3}, {"frame": "body"}, {"value": "rotation-matrix"}, {"value": "angle"}]
    )
    def test_what_lies_in_no_picture_is_mirrored_only(self, settings):
        modality = pose(**settings)
        raw = np.random.default_rng(0).normal(size=(5, modality.width)).astype(np.float32)
        for flip, own in ((False, WHOLE), (True, MIRROR)):
            view = View(start=(0.2, 0.1), stop=(0.7, 0.9), size=(8, 8), flip=flip, extent=(20, 20))
            assert torch.equal(modality.tensor(raw, view), modality.tensor(raw, own))

    @pytest.mark.parametrize("frame", ["pixels", "shares", "body"])
    def test_nobody_stays_zero(self, frame):
        view = View(start=(0.2, 0.1), stop=(0.7, 0.9), size=(8, 8), flip=True, extent=(20, 20))
        modality = pose(frame=frame, missing="zeros", center=(10.0, 10.0))
        for each in (view, WHOLE, MIRROR):
            assert not modality.show(tensor(modality, [], each)).any()
        somebody = np.zeros((5, 2), np.float32)
        somebody[3] = 4.0
        assert modality.show(modality.tensor(somebody, view)).any(1).all()
        # Without the setting, zeros are ordinary positions.
        kept = pose(frame=frame, center=(10.0, 10.0))
        assert kept.show(kept.tensor(np.zeros((5, 2), np.float32), view)).any()

    def test_pixels_of_a_picture_of_unknown_size_are_refused(self):
        view = View(start=(0.2, 0.1), stop=(0.7, 0.9), size=(8, 8))
        with pytest.raises(ConfigError, match=r"frame to shares or body"):
            pose().tensor(points(), view)
        assert pose(frame="shares").tensor(points(), view).shape == (10, 1)

    def test_frames_that_cannot_be(self):
        with pytest.raises(ValueError, match="frame=pixels with value=position, dims=3"):
            pose(frame="pixels", dims=3)
        with pytest.raises(ValueError, match="frame=shares with value=angle"):
            pose(frame="shares", value="angle")
