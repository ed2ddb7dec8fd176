"""4M's trees of files: alignment by name, every kind of file as 4M's transforms compute it, pickled instances."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from vqcore_fourm import instances, tables
from vqcore_fourm.arguments import check, to_config
from vqcore_fourm.domains import DOMAINS
from vqcore_fourm.names import to_theirs
from vqcore_fourm.sources import CONFIG, WEIGHTS

from vqcore.borrowed import weights_of
from vqcore.cli import main
from vqcore.errors import CheckpointError, DataError
from vqcore.registry import registry
from vqcore.testing import samples
from vqcore.tokenizer import Tokenizer

EARTH = Path(__file__).parents[3] / "data" / "earth"
TASKS = {"rgb": "rgb", "depth": "depth", "normal": "normal", "semseg": "semseg_coco", "edge": "canny_edge"}
NAMES = ["africa_europe/iberia_n47_w012", "americas/alaska_n68_w160", "americas/altiplano_s10_w080",
         "pacific/japan_n46_e132"]  # fmt: skip


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Four tiles of the bundled data as 4M lays them: train/<task>/<class>/<name>.<suffix>."""
    monkeypatch.chdir(tmp_path)
    for ours, theirs in TASKS.items():
        for name in NAMES:
            (path,) = (EARTH / "train" / ours).glob(f"{name}.*")
            target = Path("train", theirs, f"{name}{path.suffix}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path


def modality(domain, size=None, **more):
    return registry().build("modality", node(domain, **more), size=size)


def node(domain, **more):
    tree = {**DOMAINS[domain].modality, **more}
    kind = registry().load("modality", tree["name"])
    return kind.Config(**{key: tuple(each) if isinstance(each, list) else each for key, each in tree.items()})


def source(task="rgb", extra=(), split="train", **settings):
    kind = registry().load("data", "fourm/folder")
    nodes = {label: node(settings.get("extra_task", {}).get(label, label)) for label in extra}
    given = {
        "path": "train",
        "task": task,
        "modality": node(task if task in DOMAINS else "rgb"),
        "extra": nodes,
    }
    given |= settings
    built = {label: registry().build("modality", each, size=(96, 96)) for label, each in nodes.items()}
    cfg = kind.Config(name="fourm/folder", **given)
    main_ = registry().build("modality", cfg.modality, size=(96, 96))
    return kind(cfg, split=split, modality=main_, extra=built)


def test_laws_and_names(tree):
    data = source(extra=("depth", "map"), extra_task={"map": "semseg_coco"})
    assert [data.key(index) for index in range(len(data))] == NAMES
    assert data.get(1, "map") == Path("train/semseg_coco/americas/alaska_n68_w160.png")
    extra = {"depth": modality("depth", (96, 96)), "map": modality("semseg_coco", (96, 96))}
    samples.check_data(data, modality("rgb", (96, 96)), extra)
    samples.check_data(source(), modality("rgb", (96, 96)))


def test_names_that_do_not_align_are_refused(tree):
    """In 4M the second and third pair would be of different tiles, without a word."""
    Path(f"train/depth/{NAMES[1]}.png").unlink()
    shutil.copy(f"train/depth/{NAMES[0]}.png", "train/depth/pacific/zz.png")
    for number in range(5):
        shutil.copy(f"train/rgb/{NAMES[0]}.jpg", f"train/rgb/pacific/a{number}.jpg")
    with pytest.raises(DataError) as error:
        source(extra=("depth",))
    assert str(error.value) == (
        "data.path: the files do not belong together by class and name: rgb lacks 1 (pacific/zz); depth lacks 6 "
        "(americas/alaska_n68_w160, pacific/a0, pacific/a1, ...). With data.unpaired=leave-out the others are used"
    )
    left = source(extra=("depth",), unpaired="leave-out")
    assert [left.key(index) for index in range(len(left))] == [NAMES[0], *NAMES[2:]]
    assert left.left_out == {"not in the folders of all tasks": 7}
    assert left.get(1, "depth") == Path(f"train/depth/{NAMES[2]}.png")
    samples.check_data(left, modality("rgb", (96, 96)), {"depth": modality("depth", (96, 96))})


def test_other_names_share_nothing(tree):
    for path in list(Path("train/depth").rglob("*.png")):
        path.rename(path.with_name(f"other_{path.name}"))
    with pytest.raises(DataError, match=r"rgb lacks 4 .*depth lacks 4 .*No name is in all folders"):
        source(extra=("depth",), unpaired="leave-out")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"task": "rbg"}, r"data.path: train has no folder 'rbg' \(data.task\). Did you mean 'rgb'"),
        ({"path": "train/rgb"}, r"train/rgb has no folder 'rgb' \(data.task\). Give the root above it: data"),
        ({"path": "trian"}, r"data.path: trian/rgb: there is no such folder"),
        ({"split": "eval"}, r"data.eval_path: no held-out data is given"),
        ({"split": "eval", "eval_path": "val"}, r"data.eval_path: val/rgb: there is no such folder"),
        ({"task": "../rgb"}, r"task: '../rgb' is no folder below data.path"),
        ({"extra_task": {"dept": "depth"}}, r"extra_task.dept: data.extra.dept does not exist. Labels: none"),
        ({"path": "s3://b/train"}, r"data.path: s3://b/train/rgb is an address"),
    ],
)  # fmt: skip
def test_wrong_places(tree, changes, text):
    with pytest.raises((DataError, ValueError), match=text):
        source(**changes)


@pytest.mark.slow
def test_on_the_command_line(tree, toy, capsys):
    config = {
        "data": {
            "name": "fourm/folder",
            "path": "train",
            "eval_path": str(EARTH / "heldout"),
            "task": "rgb",
            "modality": {"name": "rgb"},
            "extra": {"depth": DOMAINS["depth"].modality},
            "input_size": 64,
            "batch_size": 2,
            "workers": 0,
        },
        "model": {
            "encoder": {"name": "vit/encoder", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
            "quantizer": {"name": "quant/fsq", "levels": [4, 4]},
            "decoder": {"name": "vit/decoder", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
        },
        "objective": {"name": "reconstruction"},
        "run": {"dir": "run", "steps": 2},
        "optim": {"lr": 1e-3},
    }
    Path("train.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "train.yaml"]) == 0
    Path(f"train/depth/{NAMES[1]}.png").unlink()
    capsys.readouterr()
    assert main(["check", "train.yaml"]) != 0
    said = "".join(capsys.readouterr())
    assert "depth lacks 1 (americas/alaska_n68_w160)" in said


# ------------------------------------------------------------------------------- file to tensor, as 4M's transforms


def middle(image, size, filter):
    """4M's evaluation: the middle square, resized by Pillow."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize(size, filter)


def evaluated(domain, path, size=(96, 96)):
    built = modality(domain, None if size == (1,) else size)
    raw = built.read(Path(path))
    return built.tensor(raw, built.view(built.extent(raw), size, None))


def picture(name, task):
    (path,) = Path("train", task).glob(f"{name}.*")
    return path


@pytest.mark.parametrize("task", ["rgb", "normal"])
def test_pictures(tree, task):
    path = picture(NAMES[2], task)
    x = np.asarray(middle(Image.open(path).convert("RGB"), (96, 96), Image.Resampling.BICUBIC))
    wanted = torch.from_numpy((x / np.float32(255) - 0.5) / 0.5).movedim(-1, 0)
    assert torch.allclose(evaluated(task, path)[:3], wanted.float(), atol=2e-6)


def test_depth(tree):
    path = picture(NAMES[2], "depth")
    x = np.asarray(middle(Image.open(path), (96, 96), Image.Resampling.NEAREST)).astype(np.float64) / 65535
    flat = np.sort(x.reshape(-1))
    part = flat[int(0.1 * flat.size) : int(0.9 * flat.size)]
    wanted = (x - part.mean()) / np.sqrt(part.var(ddof=1) + 1e-6)
    assert np.abs(evaluated("depth", path)[0].numpy() - wanted).max() < 1e-3


def test_class_maps(tree):
    path = picture(NAMES[2], "semseg_coco")
    labels = np.asarray(Image.open(path)).copy()
    labels[:20] = 255  # no class
    Image.fromarray(labels).save(path)
    x = np.asarray(middle(Image.open(path).convert("P"), (96, 96), Image.Resampling.NEAREST)).astype(int)
    found = evaluated("semseg_coco", path)
    assert found.dtype == torch.int64 and np.array_equal(found.numpy(), (x + 1) % 256)
    assert found.min() == 0 and DOMAINS["semseg_coco"].modality["num_labels"] == 134


def test_edges_have_one_channel(tree):
    path = picture(NAMES[2], "canny_edge")
    x = np.asarray(middle(Image.open(path).convert("RGB"), (96, 96), Image.Resampling.BICUBIC))[..., :1]
    wanted = torch.from_numpy((x / np.float32(255) - 0.5) / 0.5).movedim(-1, 0)
    assert torch.allclose(evaluated("canny_edge", path), wanted.float(), atol=2e-6)


@pytest.mark.parametrize(("domain", "channels"), [("ImageBind-H14", 1280), ("ImageBind-H14-global", 1280)])
def test_feature_files(tmp_path, domain, channels):
    shape = (channels,) if domain.endswith("global") else (channels, 4, 4)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.save(tmp_path / "0.npy", x)
    built = modality(domain, None if domain.endswith("global") else (4, 4))
    raw = built.read(tmp_path / "0.npy")
    found = built.tensor(raw, built.view(built.extent(raw), built.spec.size, None))
    assert np.array_equal(found.numpy().reshape(shape), x)


@pytest.mark.parametrize("people", [0, 2])
def test_poses(tmp_path, people):
    """The first person's 23 rotations, in their order in the file; zeros without a person."""
    turns = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 23, 3, 3)))[0]
    turns *= np.linalg.det(turns)[..., None, None]
    content = {"pred_smpl_params": {"body_pose": turns[:people].tolist()}} if people else {}
    (tmp_path / "0.json").write_text(json.dumps(content))
    built = modality("human_poses")
    raw = built.read(tmp_path / "0.json")
    x = built.tensor(raw, built.view(built.extent(raw), built.spec.size, None))
    assert x.shape == (207, 1)
    assert np.allclose(x[:, 0], turns[0].reshape(-1) if people else 0, atol=1e-6)


# ------------------------------------------------------------------------------------- the tokenizers of these files

TINY_VIT = {
    "enc_type": "vit_t_enc",
    "dec_type": "vit_t_dec",
    "codebook_size": 32,
    "latent_dim": 4,
    "post_mlp": True,
}
TINY_MLP = {"enc_type": "BottleneckMLP/B_1-Wi_16", "dec_type": "BottleneckMLP/B_1-Wi_16", "quant_type": "memcodes",
            "codebook_size": 8, "num_codebooks": 4, "latent_dim": 16}  # fmt: skip
OF_DOMAINS = {
    "rgb": {**TINY_VIT, "image_size": 32, "n_channels": 3},
    "depth": {**TINY_VIT, "image_size": 32, "n_channels": 1},
    "normal": {**TINY_VIT, "image_size": 32, "n_channels": 3},
    "canny_edge": {**TINY_VIT, "image_size": 32, "n_channels": 1},
    "semseg_coco": {**TINY_VIT, "image_size": 32, "n_channels": 8, "n_labels": 134},
    "sam_mask": {**TINY_VIT, "image_size": 64, "n_channels": 1},
    "ImageBind-H14": {
        **TINY_VIT,
        "image_size": 56,
        "patch_size": 14,
        "patch_proj": False,
        "n_channels": 1280,
    },
    "ImageBind-H14-global": {**TINY_MLP, "n_channels": 1280},
    "human_poses": {**TINY_MLP, "n_channels": 207},
}


def published(folder, given):
    """A tokenizer with these arguments in 4M's published form, without its domain."""
    made = Tokenizer(to_config(check(given, "test"), size=None, where="test"))
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in to_theirs(weights_of(made), made.cfg).items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(given))
    return folder


def load(folder, **settings):
    return Tokenizer.load(folder, format={"name": "fourm/checkpoint", **settings})


@pytest.fixture
def vit_t(monkeypatch):
    for part in ("enc", "dec"):
        monkeypatch.setitem(tables.VIT, f"vit_t_{part}", {"width": 16, "depth": 1, "num_heads": 2})


def a_file(domain):
    """A file of 4M for a domain."""
    rng = np.random.default_rng(0)
    if domain.startswith("ImageBind"):
        shape = (1280,) if domain.endswith("global") else (1280, 4, 4)
        np.save("a.npy", rng.normal(size=shape).astype(np.float32))
        return Path("a.npy")
    if domain == "human_poses":
        turns = np.linalg.qr(rng.normal(size=(1, 23, 3, 3)))[0]
        Path("a.json").write_text(json.dumps({"pred_smpl_params": {"body_pose": turns.tolist()}}))
        return Path("a.json")
    if domain == "sam_mask":
        notes = [{"segmentation": [[0, 0, 90, 0, 90, 60]]}]
        Path("a.json").write_text(json.dumps({"image": {"height": 90, "width": 90}, "annotations": notes}))
        return Path("a.json")
    return picture(NAMES[1], domain)


@pytest.mark.parametrize(
    "domain",
    [
        pytest.param(name, marks=() if name in ("depth", "human_poses") else pytest.mark.slow)
        for name in OF_DOMAINS
    ],
)
def test_a_tokenizer_reads_the_files_of_its_domain(tree, vit_t, domain):
    """The codes are those of the tensor that 4M makes of the file, given to the same tokenizer as an array."""
    given = OF_DOMAINS[domain]
    folder, file = published(Path("theirs"), given), a_file(domain)
    plain, found = load(folder), load(folder, files=True, domain=domain)
    x = found.read(file)
    wanted = evaluated(domain, file, found.cfg.size)
    assert tuple(wanted.shape[1:] if given.get("n_labels") is None else wanted.shape) == found.cfg.size
    assert torch.equal(x.reshape(wanted.shape), wanted)
    codes = found.encode(x)
    array = x.unsqueeze(-1) if len(found.cfg.size) == 1 else x
    assert torch.equal(codes.reshape(-1), plain.encode(array).reshape(-1))
    assert found.decode(codes).shape[0] == 1
    found.save("saved")
    assert Tokenizer.load("saved").fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("domain", "settings", "text"),
    [
        ("depth", {}, "files=true reads the files of a domain, which this file does not say: give domain=NAME"),
        ("depth", {"domain": "dept"}, "files=true knows no domain 'dept'. Did you mean 'depth'"),
        ("depth", {"domain": "rgb"}, r"it takes 1 channels, and files of the domain rgb have 3 channels \(rgb\)"),
        ("depth", {"domain": "semseg_coco"}, "it takes 1 channels, and files of the domain semseg_coco have 134"),
        ("semseg_coco", {"domain": "depth"}, "it takes 134 classes, and files of the domain depth have 1 channels"),
    ],
)  # fmt: skip
def test_files_of_another_domain(tmp_path, vit_t, domain, settings, text):
    with pytest.raises(CheckpointError, match=text):
        load(published(tmp_path / "a", OF_DOMAINS[domain]), files=True, **settings)


@pytest.mark.slow
def test_a_frozen_tokenizer_of_files(tree, vit_t, capsys):
    """4M's second stage on a modality that is no picture: the config reads files, and the checkpoint too."""
    published(Path("theirs"), OF_DOMAINS["semseg_coco"])
    old = {"domain": "semseg_coco", "encoder_type": "vit_t_enc", "decoder_type": "vit_t_dec", "codebook_size": 32,
           "latent_dim": 4, "input_size_min": 32, "input_size_max": 32, "loss_fn": "cross_entropy",
           "data_path": "train", "eval_data_path": "train", "freeze_enc": True, "full_ckpt": "theirs",
           "input_size_enc": 32}  # fmt: skip
    Path("old.yaml").write_text(yaml.safe_dump(old))
    assert main(["import", "fourm/config", "old.yaml", "new.yaml"]) == 0
    small = ["model.embed_dim=8", "run.epochs=null", "run.steps=1", "optim.warmup_epochs=null", "run.precision=fp32",
             "data.batch_size=2", "data.workers=0", "eval.sizes=[32]"]  # fmt: skip
    assert main(["train", "new.yaml", *small]) == 0, "".join(capsys.readouterr())
    frozen = load(Path("theirs"), files=True, domain="semseg_coco")
    assert Tokenizer.load("runs/new").fingerprint == frozen.fingerprint


# ------------------------------------------------------------------------------------- pickled instances of SAM


def corners(*points):
    return {"points": np.array(points, np.int32)[:, None], "area": np.int64(9), "bbox": [0, 0, 1, 1]}


SQUARE = corners((10, 20), (90, 20), (90, 100), (10, 100))
WEDGE = corners((100, 100), (180, 100), (100, 180))


def sam(name, content, protocol=4):
    """A file as `np.save` writes it, in any protocol."""
    path = Path("train/sam_mask", f"{name}.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.empty(len(content), object)
    array[:] = content
    header = {"descr": "|O", "fortran_order": False, "shape": array.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump(array, file, protocol=protocol)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_instances_become_json(tree, protocol, capsys):
    sam(NAMES[0], [SQUARE, WEDGE, corners((1, 1), (2, 2))], protocol)
    assert np.load(f"train/sam_mask/{NAMES[0]}.npy", allow_pickle=True)[0]["points"].shape == (4, 1, 2)
    Path("train/sam_mask/pacific").mkdir()
    np.save(f"train/sam_mask/{NAMES[3]}.npy", [])  # a picture without an instance
    words = ["train/sam_mask", "train/rgb", "train/sam_json"]
    assert instances.main(words) == 2
    said = capsys.readouterr().err
    assert "is a pickle: Python could run code" in said and "--allow-pickle" in said and said.count("\n") == 1
    assert not Path("train/sam_json").exists()
    assert instances.main([*words, "--allow-pickle"]) == 0
    assert "1 written, 1 without an instance" in capsys.readouterr().out
    assert instances.main([*words, "--allow-pickle"]) == 0
    assert "1 there already, 1 without an instance" in capsys.readouterr().out
    found = evaluated("sam_mask", f"train/sam_json/{NAMES[0]}.json", (64, 64))
    assert found.shape == (1, 64, 64) and bool(
        (found == 1).all()
    )  # the largest box is the square, and fills it
    masks, boxes = modality("sam_mask").every(f"train/sam_json/{NAMES[0]}.json")
    wanted = Image.new("1", (192, 192))
    ImageDraw.Draw(wanted).polygon([(100, 100), (180, 100), (100, 180)], fill=1)
    share = np.asarray(wanted)[100:180, 100:180].mean()
    assert len(masks) == 2 and boxes[0].tolist()[:2] == [20, 10]
    assert abs(float(masks[1].mean()) - share) < 0.03


def test_pickled_instances_are_refused_by_a_run(tree):
    for name in NAMES:
        sam(name, [SQUARE])
    with pytest.raises(DataError, match=r"pickled objects.*python -m vqcore_fourm.instances") as error:
        source("sam_mask")
    assert "\n" not in str(error.value)


class Foreign:
    def __reduce__(self):
        return (open, ("ran", "w"))


class Inside(dict):
    pass


BUILTIN = b"cbuiltins\neval\n(V__import__('os').system('touch ran')\ntR."


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([Foreign()], "holds more than numbers, texts and lists: io.open"),
        ([{"points": SQUARE["points"], "more": Foreign()}], "io.open"),
        ([Inside(points=1)], r"Inside"),
        ([{"point": 1}], "instance 0 has no points, but point"),
        ([{"points": [[1, 2], [3, float("nan")]]}], "no pairs of finite numbers"),
        ([{"points": "x"}], "damaged, or no file of instances"),
        ([1, 2], "no list of instances with points"),
        ([{"points": np.array(["a"])}], "holds an array of"),
        ([{"points": {1, 2}}], "holds a set"),
    ],
)
def test_hostile_instances(tree, content, text):
    path = sam(NAMES[0], content)
    with pytest.raises(DataError, match=text):
        instances.polygons(path, allow_pickle=True)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "stream",
    [
        BUILTIN,
        b"cnumpy\ndtype\n.",
        b"cnumpy\ndtype\n(Vi4\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntc_codecs\nencode\n(Vb\nVlatin1\ntRtR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR(I1\n(I9999999999\nt(cnumpy\ndtype\n(Vi8\ntRI00\nVa\ntb.",
        b"cnumpy\nndarray\n}V__call__\ncnumpy\ndtype\nsb.",
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
        b"r\xff\xff\xff\x7f.",
        b"(l" * 500 + b"a" * 499 + b".",
        b"]q\x00h\x00a.",  # a list that holds itself
        b"Vx\nP.",
        b"Pother\n.",
        b"",
    ],
)  # fmt: skip
def test_hostile_streams(tree, stream):
    path = Path("a.npy")
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        file.write(stream)
    with pytest.raises(DataError):
        instances.polygons(path, allow_pickle=True)
    assert not Path("ran").exists()


def test_a_small_file_cannot_mean_many_numbers(tree):
    points = np.ones((2000, 1, 2), np.int32)
    path = sam(NAMES[0], [{"points": points}] * 3000)
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="repeats itself"):
        instances.polygons(path, allow_pickle=True)


def test_instances_need_their_picture(tree, capsys):
    sam("pacific/unknown", [SQUARE])
    words = ["train/sam_mask", "train/rgb", "out", "--allow-pickle"]
    assert instances.main(words) == 2
    assert "train/rgb/pacific/unknown: there is no picture of this name" in capsys.readouterr().err
    assert instances.main(["nowhere", *words[1:]]) == 2
    assert instances.main(["train/rgb", *words[1:]]) == 2
    assert "holds no .npy file" in capsys.readouterr().err
