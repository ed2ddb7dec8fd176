"""Synthetic scenes: labels against closed forms and against each other, and scenes as functions of seed and number."""

import dataclasses
import functools
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from vqcore_synth.figure import JOINTS
from vqcore_synth.melody import melody
from vqcore_synth.render import cast, pixel_rays, project, rays
from vqcore_synth.scene import BALL, BOX, CEILING, CLASSES, FLOOR, PERSON, WALL, draw_scene
from vqcore_synth.source import Scenes, _what

from vqcore.compose.build import from_tree
from vqcore.config import slot
from vqcore.data.batches import EvalBatches, TrainBatches
from vqcore.errors import ConfigError
from vqcore.registry import registry
from vqcore.rng import numpy_generator
from vqcore.schema import DataConfig
from vqcore.testing.checks import check_plugin
from vqcore.testing.conformance import DataConformance

EXTRA = {
    "depth": {"name": "vision/depth"},
    "normal": {"name": "vision/normal"},
    "semseg": {"name": "vision/semseg", "num_labels": len(CLASSES)},
    "edge": {"name": "vision/edge"},
    "instance": {"name": "array", "kind": "categorical", "labels": 64},
    "pose": {"name": "vision/pose", "joints": len(JOINTS), "dims": 2},
}


def config(extra=None, **settings):
    schema = dataclasses.make_dataclass(
        "One", [("data", DataConfig, slot("data"))], frozen=True, kw_only=True
    )
    tree = {"name": "synth/scenes", "modality": {"name": "rgb"}, "extra": extra or {}, **settings}
    return from_tree({"data": tree}, schema=schema).data


def opened(cfg, split="train", size=32):
    modality = registry().build("modality", cfg.modality, size=size)
    extra = {
        label: registry().build("modality", one, size=(1,) if label == "pose" else size)
        for label, one in cfg.extra.items()
    }
    return registry().build("data", cfg, split=split, modality=modality, extra=extra)


@functools.cache
def everything():
    """A config with every label; checking so many modalities takes a while."""
    extra = {**EXTRA, "visible": {"name": "array", "channels": 1, "size": 17}}
    return config(extra, extra_what={"instance": "instance", "visible": "visible"})


def source(split="train", **settings):
    return opened(dataclasses.replace(everything(), **settings), split)


def scene_of(index, seed=0, split="train", objects=(3, 8)):
    return draw_scene(numpy_generator(seed, "synthetic", split, index), objects)


class TestLaws(DataConformance):
    component, modality, size = "synth/scenes", {"name": "rgb"}, (16, 16)
    configs: ClassVar = (
        {
            "samples": 1_000_000,
            "extra": {"depth": {"name": "vision/depth"}, "normal": {"name": "vision/normal"}},
        },
        {"eval_samples": 0, "side": [12, 20], "objects": [0, 1]},
    )


def test_the_plugin_passes_its_checks():
    assert check_plugin(registry(), "synth") == []


def angles(one, other):
    return np.degrees(np.arccos(np.clip((one * other).sum(0), -1, 1)))


def inner(same):
    """Pixels with the same value as their eight neighbours."""
    kept = np.ones_like(same, dtype=bool)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            kept &= np.roll(same, (down, right), (0, 1)) == same
    kept[[0, -1]] = kept[:, [0, -1]] = False
    return kept


# Exactness


def test_depth_and_normals_of_balls_are_the_closed_form():
    """The roots of |o + t d - c|^2 = r^2 by Vieta's formula, in double precision, pixel by pixel."""
    size, seen = (48, 64), 0
    for index in range(20):
        scene, data = scene_of(index), source(side=(48, 64))
        depth, normal, instance = (data.get(index, what) for what in ("depth", "normal", "instance"))
        camera = scene.camera
        for number, thing in enumerate(scene.things, start=1):
            if thing.label != BALL:
                continue
            offset = camera.turn @ (
                thing.centre - camera.place
            )  # camera axes: x right, y up, z to the viewer
            for row, column in np.argwhere(instance == number)[::7]:
                unit = 2 * camera.reach / min(size)
                way = np.array([(column + 0.5 - 32) * unit, (24 - row - 0.5) * unit, -1.0])
                a, b, c = way @ way, -2 * way @ offset, offset @ offset - thing.radius**2
                larger = (-b + np.sqrt(b * b - 4 * a * c)) / (2 * a)
                nearer = c / (a * larger)
                assert depth[row, column] == pytest.approx(nearer, rel=1e-6)
                outward = (nearer * way - offset) / thing.radius
                np.testing.assert_allclose(normal[:, row, column], outward, atol=1e-5)
                seen += 1
    assert seen > 200


def test_boxes_limbs_and_the_room_are_where_their_equations_say():
    shapes = {"box": 0, "limb": 0, "room": 0}
    for index in range(8):
        scene = scene_of(index)
        hits = cast(scene, pixel_rays(scene.camera, (64, 64)))
        parts = [part for thing in scene.things for part in thing.parts]
        for number, part in enumerate(parts):
            points = hits.point[:, hits.part == number]
            if part.shape == "box":
                inside = np.abs(part.turn @ (points - part.start[:, None])) / part.half[:, None]
                gap = inside.max(0, initial=0) - 1
            elif part.shape == "limb":
                gap = _distance(points, part.start, part.stop) / part.radius - 1
            else:
                continue
            if points.size:
                assert np.abs(gap).max() < 1e-9
                shapes[part.shape] += points.shape[1]
        walls = hits.point[:, hits.part < 0]
        nearest = np.minimum(np.abs(walls - scene.low[:, None]), np.abs(walls - scene.high[:, None])).min(0)
        assert nearest.max() < 1e-9
        shapes["room"] += walls.shape[1]
    assert min(shapes.values()) > 100


def _distance(points, start, stop):
    axis = stop - start
    share = np.clip(axis @ (points - start[:, None]) / (axis @ axis), 0, 1)
    return np.linalg.norm(points - start[:, None] - axis[:, None] * share, axis=0)


def test_nothing_is_in_front_of_a_hit():
    """Brute force: steps of 2 mm along some rays find no point inside a part before the hit."""
    for index in range(3):
        scene = scene_of(index)
        way = rays(scene.camera, (64, 64), np.random.default_rng(index).uniform(0, 64, (2, 60)))
        hits = cast(scene, way)
        for ray in range(60):
            steps = np.arange(0.05, hits.depth[ray] - 0.003, 0.002)
            points = scene.camera.place[:, None] + way[:, ray, None] * steps
            for thing in scene.things:
                for part in thing.parts:
                    if part.shape == "box":
                        inside = np.abs(part.turn @ (points - part.start[:, None])) / part.half[:, None]
                        assert inside.max(0).min() > 0.99
                    else:
                        stop = part.start + 1e-9 if part.stop is None else part.stop
                        assert _distance(points, part.start, stop).min() > 0.99 * part.radius


@pytest.mark.parametrize("index", range(6))
def test_normals_are_the_gradient_of_depth(index):
    data, scene = source(side=192), scene_of(index)
    depth, normal = data.get(index, "depth").astype(np.float64), data.get(index, "normal")
    way = scene.camera.turn @ pixel_rays(scene.camera, (192, 192))
    points = (way * depth.ravel()).reshape(3, 192, 192)
    across = np.roll(points, -1, 2) - np.roll(points, 1, 2)
    up = np.roll(points, 1, 1) - np.roll(points, -1, 1)
    crossed = np.cross(across, up, axis=0)
    crossed /= np.linalg.norm(crossed, axis=0)
    hits = cast(scene, pixel_rays(scene.camera, (192, 192)))
    smooth = inner(hits.part.reshape(192, 192))
    creases = np.ones((192, 192), dtype=bool)
    for axis in (1, 2):
        for step in (-1, 1):
            creases &= (normal * np.roll(normal, step, axis)).sum(0) > 0.98
    off = angles(crossed, normal)[smooth & creases]
    assert len(off) > 5000
    assert np.percentile(off, 99) < 1.5
    np.testing.assert_allclose(np.linalg.norm(normal, axis=0), 1, atol=1e-6)


def test_normals_face_the_viewer_and_the_floor_looks_up():
    data, scene = source(side=64), scene_of(0)
    normal, labels = data.get(0, "normal"), data.get(0, "semseg")
    way = (scene.camera.turn @ pixel_rays(scene.camera, (64, 64))).reshape(3, 64, 64)
    assert ((normal * way).sum(0) < 0).all()
    for label, world in ((FLOOR, [0, 1, 0]), (CEILING, [0, -1, 0])):
        expected = scene.camera.turn @ np.array(world)
        np.testing.assert_allclose(normal[:, labels == label], expected[:, None].repeat((labels == label).sum(), 1),
                                   atol=1e-6)  # fmt: skip
    assert normal[1][labels == FLOOR].min() > 0.5


def test_instances_partition_the_class_map():
    for index in range(12):
        data = source(side=96)
        labels, instances = data.get(index, "semseg"), data.get(index, "instance")
        assert labels.dtype == np.uint8
        assert instances.dtype == np.uint16
        np.testing.assert_array_equal(instances == 0, np.isin(labels, (FLOOR, WALL, CEILING)))
        things = scene_of(index).things
        for number in np.unique(instances[instances > 0]):
            assert set(labels[instances == number]) == {things[number - 1].label}
        assert PERSON in labels
    assert {thing.label for index in range(12) for thing in scene_of(index).things} == {BALL, BOX, PERSON}


def test_edges_lie_on_every_border_and_nowhere_else():
    for index in range(4):
        data = source(side=80)
        edge = data.get(index, "edge") == 255
        assert set(np.unique(data.get(index, "edge"))) == {0, 255}
        both = data.get(index, "semseg").astype(int) * 1000 + data.get(index, "instance")
        depth = data.get(index, "depth")
        for axis in (0, 1):
            here, there = np.delete(both, -1, axis), np.delete(both, 0, axis)
            near, far = np.delete(depth, -1, axis), np.delete(depth, 0, axis)
            marked = np.where(near <= far, np.delete(edge, -1, axis), np.delete(edge, 0, axis))
            assert marked[here != there].all()
        scene = scene_of(index)
        parts = cast(scene, pixel_rays(scene.camera, (80, 80))).part.reshape(80, 80)
        assert not edge[inner(parts) & inner(both)].any()
        assert 0.01 < edge.mean() < 0.3


# Poses


def test_joints_are_inside_every_frame():
    for index in range(100):
        scene = scene_of(index)
        for size in ((64, 64), (32, 96), (96, 32)):
            pose = project(scene.camera, size, scene.figure.joints)
            middle = (pose - np.array([size[1], size[0]]) / 2) / min(size)
            assert np.abs(middle).max() < 0.49


def test_a_visible_joint_lies_on_the_person_and_hidden_ones_exist():
    shares = []
    for index in range(12):
        data = source(side=96)
        pose, seen, instances = (data.get(index, what) for what in ("pose", "visible", "instance"))
        assert pose.shape == (17, 2)
        assert pose.dtype == np.float32
        column, row = np.floor(pose[seen == 1]).astype(int).T
        near = [instances[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] for y, x in zip(row, column)]
        assert all((window == 1).any() for window in near)
        shares.append(seen.mean())
    assert 0.5 < np.mean(shares) < 0.98


def test_the_head_is_above_the_feet_and_left_is_not_right():
    """Someone who looks at the camera has the left shoulder on the right side of the picture."""
    turned = []
    for index in range(40):
        joints = scene_of(index).figure.joints
        named = dict(zip(JOINTS, joints))
        assert named["nose"][1] > named["left_hip"][1] > named["left_ankle"][1]
        ahead = named["nose"] - (named["left_ear"] + named["right_ear"]) / 2
        if ahead[2] > 0.05:
            turned.append(named["left_shoulder"][0] > named["right_shoulder"][0])
    assert np.mean(turned) > 0.9


# A function of seed, split and number


@pytest.mark.slow
def test_samples_are_the_same_in_another_process_and_after_pickling():
    data = source(side=24)
    found = data.get(5)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data)).get(5), found)
    data.get(6)
    np.testing.assert_array_equal(data.get(5), found)
    code = (
        f"import hashlib, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "import test_synth_scenes as t; d = t.source(side=24); "
        "print(hashlib.sha256(b''.join(d.get(5, w).tobytes() for w in ('', 'depth', 'pose'))).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    here = hashlib.sha256(b"".join(data.get(5, what).tobytes() for what in ("", "depth", "pose"))).hexdigest()
    assert there.stdout.strip() == here


def test_seed_split_and_number_each_give_another_scene():
    pictures = [source(side=24).get(i) for i in range(6)]
    pictures += [source("eval", side=24).get(i) for i in range(6)]
    pictures += [source(side=24, seed=1).get(i) for i in range(6)]
    assert len({picture.tobytes() for picture in pictures}) == 18
    np.testing.assert_array_equal(source("eval", side=24).get(2), source("eval", side=24).get(2))


@examples(max_examples=15, deadline=None)
@given(index=st.integers(0, 10**6 - 1), rows=st.integers(4, 12), columns=st.integers(4, 12))
def test_size_only_decides_where_rays_go(index, rows, columns):
    """The middle of a pixel is the middle of the 3 x 3 pixels of a picture three times as large."""
    scene = scene_of(index)
    one, three = (
        cast(scene, pixel_rays(scene.camera, (k * rows, k * columns))).depth.reshape(k * rows, k * columns)
        for k in (1, 3)
    )
    assert (np.abs(one - three[1::3, 1::3]) > 1e-9).mean() < 0.03  # a ray through an edge may hit either side
    joints = scene.figure.joints
    larger = project(scene.camera, (3 * rows, 3 * columns), joints)
    np.testing.assert_allclose(larger, 3 * project(scene.camera, (rows, columns), joints), rtol=1e-9)


def test_extra_modalities_share_the_view_of_the_main_modality():
    """One crop and flip for all: colours and classes of a batch belong to the same pixels of the scene."""
    cfg = config(
        {k: EXTRA[k] for k in ("semseg",)} | {"colour": {"name": "array", "channels": 3, "channels_last": True}},
        extra_what={"colour": "rgb"},
        modality={"name": "array", "channels": 3, "channels_last": True, "hflip": 0.5, "min_crop_scale": 0.5},
        what="rgb", side=24, input_size=24, batch_size=4,
    )  # fmt: skip
    modality = registry().build("modality", cfg.modality, size=24)
    extra = {label: registry().build("modality", one, size=24) for label, one in cfg.extra.items()}
    data = registry().build("data", cfg, split="train", modality=modality, extra=extra)
    place = {"rank": 0, "world": 1, "workers": 0}
    loaded = next(
        iter(TrainBatches(data, modality, extra, cfg, seed=0, start_step=0, steps=1, accumulate=1, **place))
    )
    assert not loaded.bad
    batch = loaded.batch
    torch.testing.assert_close(batch.x, batch.extras["colour"])
    whole = next(
        iter(EvalBatches(data, modality, extra, cfg, size=(24, 24), batch_size=2, limit=2, **place))
    ).batch
    for row, key in enumerate(whole.keys):
        np.testing.assert_array_equal(whole.x[row], data.get(int(key)).transpose(2, 0, 1))
        np.testing.assert_array_equal(whole.extras["semseg"][row], data.get(int(key), "semseg"))


def test_a_million_samples_cost_nothing():
    data = source(samples=1_000_000, side=8)
    assert len(data) == 10**6
    assert data.key(0) == "000000"
    assert data.key(999_999) == "999999"
    assert data.get(999_999).shape == (8, 8, 3)
    assert len(pickle.dumps(data)) < 20_000


def test_pictures_are_textured_lit_and_varied():
    stacked = np.stack([source(side=48).get(i) for i in range(16)]).astype(np.float64)
    assert 60 < stacked.mean() < 190
    assert stacked.std(axis=(1, 2, 3)).min() > 15
    assert stacked.mean(axis=(1, 2)).std(axis=0).min() > 8


def test_objects_bounds_the_number_of_things():
    for number in (0, 2):
        scenes = [scene_of(index, objects=(number, number)) for index in range(20)]
        assert {len(scene.things) - 1 for scene in scenes} <= set(range(number + 1))
        assert max(len(scene.things) for scene in scenes) == number + 1
    with_room = [len(scene_of(index).things) - 1 for index in range(40)]
    assert 3 <= np.mean(with_room) <= 8


# Sounds


def test_a_longer_melody_begins_like_a_short_one():
    short, long = melody(3000, 8000, 1, "a"), melody(9000, 8000, 1, "a")
    np.testing.assert_array_equal(short, long[:3000])
    np.testing.assert_allclose(melody(6000, 16000, 1, "a")[::2], short, atol=1e-6)
    assert np.abs(melody(80_000, 8000, 2)).max() <= 1
    assert short.std() > 0.01
    assert not np.array_equal(short, melody(3000, 8000, 2, "a"))


def test_modalities_of_sound_get_sounds():
    cfg = config(modality={"name": "audio/wave", "rate": 8000}, input_size=2000, length=5000, rate=8000)
    modality = registry().build("modality", cfg.modality, size=(2000,))
    data = registry().build("data", cfg, split="train", modality=modality, extra={})
    assert modality.read(data.get(0)).shape == (1, 5000)


# Configs


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"eval_samples": -1}, "eval_samples=-1 must be at least 0"),
        ({"side": [4, 0]}, "has a side below 1"),
        ({"objects": [5, 3]}, r"objects=\[5, 3\] must be two numbers"),
        (
            {"extra_what": {"dept": "depth"}, "extra": {"depth": {"name": "vision/depth"}}},
            "Did you mean 'depth'",
        ),
        ({"what": "depht"}, "depht"),
    ],
)
def test_bad_settings_are_named(settings, text):
    with pytest.raises(ConfigError, match=text):
        config(**settings)


def test_a_modality_whose_name_does_not_say_what_to_draw_needs_the_setting():
    cfg = config(modality={"name": "array", "channels": 1, "size": 8})
    with pytest.raises(
        ConfigError,
        match="what is not set, and the modality 'array' does not say what to draw: set what to one of rgb, depth",
    ):
        opened(cfg)


def test_has_eval_and_default_side():
    assert config().has_eval
    assert not config(eval_samples=0).has_eval
    assert opened(config(), size=(20, 30)).get(0).shape == (20, 30, 3)
    assert len(opened(config(eval_samples=7), "eval")) == 7
    assert isinstance(opened(config()), Scenes)


@pytest.mark.parametrize(
    "name", ["rgb", "vision/depth", "vision/instance", "audio/wave", "audio/log-mel", "acme/depth"]
)
def test_the_name_of_a_modality_without_its_plugin_says_what_to_draw(name):
    expected = {"wave": "audio", "log-mel": "audio"}
    short = name.rpartition("/")[2]
    assert _what("what", None, name) == expected.get(short, short)
    assert _what("what", "visible", name) == "visible"


def test_the_python_of_the_readme_runs():
    text = (Path(__file__).parents[1] / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    names = {}
    exec(text, names)
    assert names["picture"].shape == (128, 128, 3)
