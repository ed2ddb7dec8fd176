"""How 4M's tokenizers were trained: facts, recipes in cfgs/ that claim to be 4M's, configs like published ones."""

import functools
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from vqcore_fourm.recipes import RECIPES, WEIGHTS
from vqcore_fourm.tables import PUBLISHED

from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.compose.layers import load
from vqcore.config import leaves, to_tree
from vqcore.registry import registry
from vqcore.schema import RunConfig

CFGS = Path(__file__).parents[3] / "cfgs"
DATA = Path(__file__).parents[3] / "data"
DRAW = np.random.default_rng(0)


def family(name):
    build = registry().load("format", "fourm/config")
    return build(build.Config(name="fourm/config")).like(name)


@functools.cache
def as_run(name):
    """The family as a whole config."""
    tree = family(name).tree
    data = {
        key: value
        for key, value in tree["data"].items()
        if key != "resolution_step" or "input_size_min" in tree["data"]
    }
    data |= {"name": "folder", "path": "-"}
    return from_tree({**tree, "data": data, "run": {"dir": "-", **tree["run"]}}, schema=RunConfig)


def test_the_published_weights_have_a_training_config():
    assert WEIGHTS.keys() == {one.name for one, _ in PUBLISHED}
    for name, (recipe, _, _) in WEIGHTS.items():
        assert family(name).tree["data"] == family(recipe).tree["data"]
    assert family("DINOv2-B14-global_8k_16_224").tree["model"]["quantizer"]["num_codebooks"] == 16
    assert family("rgb_ViTB-UNetP4_16k_224_predx0").tree == family("rgb_ViTB-UNetP4_16k").tree


# Recipes in cfgs/

SIZES = ("data.input_size_max",)
WARM = ("optim.warmup",)
CODEBOOKS = ("model.quantizer.num_codebooks",)
TRAINING = (
    "model.quantizer",
    "objective.loss",
    "optim",
    "run.epochs",
    "data.batch_size",
    "data.input_size_max",
)
"""What recipes with another decoder claim: codebook, loss, epochs, batch size, learning rates."""
JUDGE = ("objective.percept", "objective.weights", "objective.loss")
SECTIONS = ("data.batch_size", "data.input_size", "data.input_size_min", "data.input_size_max", "data.resolution_step",
            "model", "objective", "optim", "ema", "run.epochs", "run.precision")  # fmt: skip
MAPS, GLOBAL = "_ViTB-ViTB_8k", "-global_BMLP1024-BMLP1024_8k"
UNET = "_ViTB-UNetP4_8k"
STEERED = ("objective.cls_free_guidance_dropout",)
# Recipe, the training config of 4M that it claims to be, what it claims, and what its comments except.
CLAIMS = [
    *((f"divae/{one}/{name}", f"{one}{UNET}{many}", SECTIONS, ())
      for one in ("depth", "normal") for name, many in (("base", ""), ("multires", "_224-448"))),
    ("divae/rgb/base", "rgb_ViTB-UNetP4_16k", SECTIONS, ()),
    ("divae/rgb/multires", "rgb_ViTB-UNetP4_16k_224-448", SECTIONS, ()),
    ("divae/edge/canny_base", f"canny_edge{UNET}", SECTIONS, ()),
    ("divae/edge/canny_multires", f"canny_edge{UNET}_224-448", SECTIONS, (*SIZES, *WARM)),
    ("divae/rgb/uvit-frozen_base", "rgb_ViTB-UViTB_1k", SECTIONS, ()),
    ("divae/rgb/uvit-frozen_multires", "rgb_ViTB-UViTB_1k_224-448", SECTIONS, ()),
    ("vqcontrolnet/rgb/base", "rgb_ViTB-SD1.5_1k", SECTIONS, STEERED),
    ("vqcontrolnet/rgb/multires", "rgb_ViTB-SD1.5_1k_224-448", SECTIONS, STEERED),
    *((f"vqvae/{one}/{name}", f"{one}{UNET}{many}", TRAINING, ())
      for one in ("depth", "normal") for name, many in (("base", ""), ("multires", "_224-448"))),
    *((f"vqvae/edge/{one}_base", f"canny_edge{UNET}", TRAINING, ()) for one in ("canny", "sam")),
    *((f"vqvae/edge/{one}_multires", f"canny_edge{UNET}_224-448", TRAINING, (*SIZES, *WARM))
      for one in ("canny", "sam")),
    *((f"vqvae/rgb/{one}", f"rgb_ViTB-ViTB_1k{many}", SECTIONS, JUDGE)
      for kind in ("", "vitb_1k_clip-b16_")
      for one, many in ((f"{kind}base", ""), (f"{kind}multires", "_224-448"))),
    ("vqvae/semseg/base", "semseg_coco_ViTB-ViTB_4k", SECTIONS, ()),
    ("vqvae/semseg/multires", "semseg_coco_ViTB-ViTB_4k_224-448", SECTIONS, ()),
    ("vqvae/instance/base", "sam_instance_ViTB-ViTB_1k", SECTIONS, ()),
    ("vqvae/pose/base", "human_poses_BMLP1024-BMLP1024_1k", SECTIONS, ()),
    *((f"vqvae/features/{file}_{name}", f"{one}{MAPS}{many}", SECTIONS, ())
      for file, one in (("clip-b16", "CLIP-B16"), ("dinov2-b14", "DINOv2-B14"), ("imagebind-h14", "ImageBind-H14"))
      for name, many in (("base", ""), ("multires", "_224-448"))),
    *((f"vqvae/vector/{file}_{name}", f"{one}{GLOBAL}{many}", SECTIONS, CODEBOOKS)
      for file, one in (("dinov2-b14", "DINOv2-B14"), ("imagebind-h14", "ImageBind-H14"))
      for name, many in (("base", ""), ("multires", "_224-448"))),
]  # fmt: skip
PLACES = ("model.full_ckpt",)


def settings(config, claimed, excepted):
    def within(key, places):
        return any(f"{key}.".startswith(f"{place}.") for place in places)

    found = {key: value for key, value in leaves(to_tree(config)) if within(key, claimed)}
    return {key: value for key, value in found.items() if not within(key, (*PLACES, *excepted))}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "name", "claimed", "excepted"), CLAIMS, ids=[one[0] for one in CLAIMS])
def test_a_recipe_that_says_it_is_4ms_is_4ms(recipe, name, claimed, excepted):
    here, there = load(str(CFGS / f"{recipe}.yaml"), [], schema=RunConfig).config, as_run(name)
    ours, theirs = settings(here, claimed, excepted), settings(there, claimed, excepted)
    assert {
        key: (ours.get(key), theirs.get(key)) for key in ours | theirs if ours.get(key) != theirs.get(key)
    } == {}
    for key in excepted:  # an exception that is none is taken off the list
        one, other = (dict(leaves(to_tree(each))) for each in (here, there))
        assert key in JUDGE or one.get(key) != other.get(key), key


def test_no_recipe_that_names_4m_is_forgotten():
    claiming = {
        str(path.relative_to(CFGS).with_suffix(""))
        for path in CFGS.glob("*/*/*.yaml")
        if "Settings are those of 4M" in path.read_text() or "are those of 4M's" in path.read_text()
    }
    assert claiming <= {one[0] for one in CLAIMS}


# --like


def photos(folder, side=256, count=16):
    folder.mkdir()
    for number in range(count):
        Image.fromarray(DRAW.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def like(name, folder, out, *words):
    assert main(["new", "config", "--like", f"fourm/{name}", str(folder), "--out", str(out), *words]) == 0
    return load(str(out), [], schema=RunConfig).config


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_photographs_like_4ms(here):
    made = like("rgb_ViTB-UNetP4_16k", photos(here / "mine"), "a.yaml")
    kept = settings(as_run("rgb_ViTB-UNetP4_16k"), SECTIONS, ())
    assert settings(made, SECTIONS, ()) == kept
    assert (made.data.modality.name, made.data.input_size, made.eval.sizes) == ("rgb", 224, (224,))
    again = like("rgb_ViTB-UNetP4_16k_224-448", here / "mine", "b.yaml")
    assert (again.data.input_size_min, again.data.input_size_max, again.data.resolution_step) == (
        224,
        256,
        32,
    )
    assert again.model.full_ckpt == "runs/base" and again.model.encoder.input_size_enc == 224
    text = Path("b.yaml").read_text()
    assert "please check: the run of a config --like fourm/rgb_ViTB-UNetP4_16k" in text


@pytest.mark.slow
def test_arrays_and_classes_join_a_family_of_pictures(here, capsys):
    for folder in ("bands", "ids", "maps"):
        Path(folder).mkdir()
    for number in range(16):
        np.save(f"bands/{number}.npy", DRAW.normal(50, 9, (5, 64, 64)).astype(np.float32))
        np.save(f"maps/{number}.npy", DRAW.normal(size=(96, 16, 16)).astype(np.float32))
        ids = DRAW.integers(0, 7, (48, 48)).astype(np.uint8)
        ids[0] = 255
        Image.fromarray(ids).save(f"ids/{number}.png")
    made = like("depth_ViTB-UNetP4_8k", "bands", "bands.yaml")
    assert (made.data.modality.name, made.data.modality.channels, made.data.input_size) == ("array", 5, 64)
    assert made.objective.scheduler.clip is None and made.objective.loss == "smooth_l1"
    made = like("semseg_coco_ViTB-ViTB_4k", "ids", "ids.yaml")
    assert (made.data.modality.num_labels, made.data.modality.ignore_label, made.data.input_size) == (
        7,
        255,
        48,
    )
    made = like("ImageBind-H14_ViTB-ViTB_8k", "maps", "maps.yaml")
    assert (made.data.modality.channels, made.data.input_size, made.model.encoder.patch_proj) == (
        96,
        16,
        False,
    )
    capsys.readouterr()
    for name, text in (
        ("human_poses_BMLP1024-BMLP1024_1k", "one vector a sample"),
        ("rgb_ViTB-SD1.5_1k", "does not fit"),
    ):
        assert main(["new", "config", "--like", f"fourm/{name}", "bands", "--out", "c.yaml"]) == 2
        said = capsys.readouterr().err
        assert text in said and said.count("\n") == 1 and not Path("c.yaml").exists()


@pytest.mark.slow
def test_vectors_join_a_family_of_vectors(here):
    Path("vectors").mkdir()
    for number in range(16):
        np.save(f"vectors/{number}.npy", DRAW.normal(size=96).astype(np.float32))
    made = like("human-poses_1k_8", "vectors", "a.yaml")
    assert (made.data.modality.channels, made.model.encoder.name) == (96, "vit/mlp-encoder")
    assert made.data.input_size is None and made.eval.sizes in (None, ())


# The 28 published training configs of full width, on the bundled data

SETTINGS = ("data.batch_size=1", "data.workers=0", "run.threads=1", "run.precision=fp32")
TEACHER = "{{name: percept/timm, model: test_vit, resize: false, weights: random, output: {}}}"
JUDGED = "{judge: {name: percept/timm, model: test_vit, blocks: [blocks.0, blocks.2], weights: random}}"
PHOTOS, EARTH = "photos/{}", "earth/{}"
BUNDLED = {
    "rgb": PHOTOS,
    "depth": f"{EARTH}/depth",
    "normal": f"{EARTH}/normal",
    "canny_edge": f"{EARTH}/edge",
    "semseg_coco": f"{EARTH}/semseg",
    "sam_mask": f"{EARTH}/semseg",
    "CLIP-B16": PHOTOS,
    "DINOv2-B14": PHOTOS,
    "DINOv2-B14-global": PHOTOS,
}
"""The data in the repository that a domain can read. Of the last three a tiny network with random weights makes
features."""


def features(folder, is_map):
    """Photographs as feature maps or vectors of ImageBind's 1280 channels."""
    side, count = (8, 3) if is_map else (1, 3 * 64)
    weights = np.random.default_rng(0).normal(size=(count, 1280)).astype(np.float32)
    for split in ("train", "heldout"):
        (folder / split).mkdir(parents=True)
        for path in sorted((DATA / PHOTOS.format(split)).iterdir())[:16]:
            pixels = Image.open(path).convert("RGB").resize((8, 8), Image.Resampling.BOX)
            rows = np.asarray(pixels, np.float32).reshape(side * side, count) / 128 - 1
            made = (rows @ weights).T.reshape(-1, side, side)
            np.save(folder / split / f"{path.stem}.npy", made if is_map else made[:, 0, 0])


def poses(folder):
    """Poses of 23 joints: rotations that random numbers give."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("heldout", 4)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            turns, _ = np.linalg.qr(draw.normal(size=(1, 23, 3, 3)))
            turns[np.linalg.det(turns) < 0] *= -1
            content = {"pred_smpl_params": {"body_pose": turns.tolist()}}
            (folder / split / f"{number}.json").write_text(json.dumps(content))


def places(domain):
    """The samples of a domain: those in the repository, or made from them."""
    if domain in BUNDLED:
        path = str(DATA / BUNDLED[domain])
    else:
        poses(Path("made")) if domain == "human_poses" else features(Path("made"), domain == "ImageBind-H14")
        path = "made/{}"
    splits = (("path", "train"), ("eval_path", "heldout"))
    return [f"data.{key}={path.format(split)}" for key, split in splits]


def smaller(tree):
    """Small sizes in place of 4M's; positions of feature maps, or pixels."""
    data = tree["data"]
    high = 8 if tree["model"]["encoder"].get("patch_proj") is False else 64
    if "input_size_max" in data:
        return [f"data.input_size_min={high // 2}", f"data.input_size_max={high}", f"eval.sizes=[{high}]"]
    return [f"data.input_size={high}", f"eval.sizes=[{high}]"] if "sizes" in tree["eval"] else []


def base():
    """A tiny Stable Diffusion in place of the published one, and its settings."""
    tiny = importlib.import_module("tiny")
    tiny.save(Path("tiny-sd"))
    settings = {
        key: list(value) if isinstance(value, tuple) else value for key, value in tiny.SETTINGS.items()
    }
    return [f"model.decoder.{key}={value}" for key, value in {**settings, "sd_path": "tiny-sd"}.items()]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_published_config_of_full_width_passes_check(name, here, monkeypatch, capsys):
    options = RECIPES[name].options
    Path("old.yaml").write_text(yaml.safe_dump({"data_path": "-", **options}))
    assert main(["import", "fourm/config", "old.yaml", "new.yaml"]) == 0
    tree = yaml.safe_load(Path("new.yaml").read_text())
    words = [*places(options["domain"]), *SETTINGS, *smaller(tree)]
    if "teacher" in tree["data"]["modality"]:
        stride = 224 if options["domain"].endswith("-global") else 16
        teacher = TEACHER.format("global" if stride == 224 else "patches")
        words += [f"data.modality.{key}={value}" for key, value in (("teacher", teacher), ("stride", stride))]
        words += ["data.modality.channels=64"]
    if "percept" in tree["objective"]:
        words += [f"objective.percept={JUDGED}"]
    if "full_ckpt" in tree["model"]:  # a placeholder in 4M's files
        words += ["model.full_ckpt=null", "model.freeze_enc=false"]
    if RECIPES[name].script == "vqcontrolnet":
        monkeypatch.syspath_prepend(str(CFGS.parent / "plugins/vqcore_controlnet/tests"))
        words += base()
    before = set(here.rglob("*"))
    assert main(["check", "new.yaml", *words]) == 0, capsys.readouterr().out
    assert "new.yaml: no errors" in capsys.readouterr().out
    assert set(here.rglob("*")) == before
