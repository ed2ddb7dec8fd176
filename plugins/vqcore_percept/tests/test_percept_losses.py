"""Perceptual losses: laws, other people's numbers, bad input, whole runs."""

import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from toys import run_config

from vqcore.data.feed import Feed
from vqcore.errors import ConfigError, VqcoreError
from vqcore.protocols import DataSpec
from vqcore.run.state import build as build_run
from vqcore.run.step import Trouble, train_step
from vqcore.testing.checks import check_borrowed
from vqcore.testing.conformance import DiscriminatorConformance, PerceptConformance, TeacherConformance, build

RGB = DataSpec(channels=3, size=(64, 64), range=(-1.0, 1.0))
TINY = {"model": "test_vit", "blocks": ["blocks.0", "blocks.2"]}
CONV = {"model": "test_convnext", "blocks": ["stages.1"], "logits": True}


def made(settings, name="percept/timm", spec=RGB):
    return build("percept", name, settings, spec=spec)


def two(spec=RGB, n=3):
    torch.manual_seed(1)
    x = torch.rand(n, spec.channels, *spec.size) * 2 - 1
    return (x + 0.2 * torch.randn_like(x)).clamp(-1, 1), x


class TestTimmLaws(PerceptConformance):
    component = "percept/timm"
    spec = RGB
    configs = (TINY, {**TINY, "distance": "l1", "resize": False}, {**CONV, "distance": "mse"})


class TestTimmOfOtherDataLaws(PerceptConformance):
    component = "percept/timm"
    spec = DataSpec(channels=5, size=(32, 48), range=(0.0, 1.0))
    configs = ({**TINY, "rgb": [2, 1, 0]},)


class TestLPIPSLaws(PerceptConformance):
    component = "percept/lpips"
    spec = RGB
    configs = ({"net": "alex"}, {"net": "squeeze", "heads": False})


@pytest.mark.parametrize(
    "net", ["squeeze", *(pytest.param(n, marks=pytest.mark.slow) for n in ("alex", "vgg"))]
)
def test_lpips_is_the_distance_of_the_package(tmp_path, net):
    library = pytest.importorskip("lpips")
    x_hat, x = two()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = library.LPIPS(net=net, pnet_rand=True, verbose=False)
    names = {name.partition(".")[2]: value for name, value in theirs.net.state_dict().items()}
    file = tmp_path / f"{net}.safetensors"
    save_file({f"features.{name}": value.clone() for name, value in names.items()}, file)
    ours = made({"net": net, "weights": str(file)}, "percept/lpips")
    ours.borrow({})
    with torch.no_grad():
        wanted = theirs(x_hat, x).flatten()
        assert torch.allclose(ours(x_hat, x), wanted, rtol=1e-5, atol=1e-9)
        assert float(wanted.min()) > 1e-6


def test_a_zero_feature_has_a_finite_gradient(tmp_path):
    percept = made({"net": "alex"}, "percept/lpips")
    for parameter in percept.net.parameters():
        parameter.zero_()
    x_hat, x = two()
    x_hat.requires_grad_()
    percept(x_hat, x).sum().backward()
    assert bool(x_hat.grad.isfinite().all())


@pytest.mark.parametrize("logits", [False, True])
def test_what_comes_after_the_last_block_runs_only_for_logits(logits):
    percept = made({"model": "test_vit", "blocks": ["blocks.1", "blocks.0"], "logits": logits})
    ran = []
    for number, block in enumerate(percept.net.blocks):
        block.register_forward_hook(lambda module, args, out, number=number: ran.append(number))
    percept(*two())
    count = len(percept.net.blocks)
    assert count > 2
    assert sorted(set(ran)) == (list(range(count)) if logits else [0, 1])


@pytest.mark.parametrize("kind", ["cosine", "l1", "mse"])
def test_distances_are_what_they_say(kind):
    """Against a calculation token by token, with the input made by hand."""
    percept = made({**TINY, "distance": kind})
    x_hat, x = two()

    def features(pictures):
        seen = (pictures / 2 + 0.5 - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
        seen = F.interpolate(seen, (side, side), mode="bilinear", antialias=True)
        kept, at = [], percept.net.patch_embed(seen)
        at = percept.net._pos_embed(at)
        at = percept.net.norm_pre(percept.net.patch_drop(at))
        for number, block in enumerate(percept.net.blocks):
            at = block(at)
            if number in (0, 2):
                kept.append(at)
        return kept

    own = percept.net.pretrained_cfg
    mean, std, side = own["mean"], own["std"], own["input_size"][-1]
    wanted = torch.zeros(len(x))
    with torch.no_grad():
        for a, b in zip(features(x_hat), features(x)):
            for number in range(len(x)):
                pairs = list(zip(a[number], b[number]))
                each = {
                    "cosine": [1 - F.cosine_similarity(p, q, dim=0) for p, q in pairs],
                    "l1": [(F.normalize(p, dim=0) - F.normalize(q, dim=0)).abs().sum() for p, q in pairs],
                    "mse": [(p - q).square().mean() for p, q in pairs],
                }[kind]
                wanted[number] += sum(each) / len(each)
        assert torch.allclose(percept(x_hat, x), wanted, rtol=1e-4, atol=1e-7)
        divided = made({**TINY, "distance": kind, "divide_by_batch": True})
        divided.load_state_dict(percept.state_dict())
        assert torch.allclose(divided(x_hat, x), wanted / len(x), rtol=1e-4, atol=1e-7)


def test_no_graph_goes_through_the_target():
    percept, (x_hat, x) = made(TINY), two()
    x_hat.requires_grad_()
    x.requires_grad_()
    percept(x_hat, x).sum().backward()
    assert x.grad is None and float(x_hat.grad.abs().max()) > 0


def weights(tmp_path, settings, **changed):
    net = made(settings).net
    state = {name: value.clone() for name, value in net.state_dict().items()}
    save_file({**state, **changed}, tmp_path / "net.safetensors")
    return str(tmp_path / "net.safetensors")


@pytest.mark.parametrize("settings", [TINY, CONV])
def test_weights_are_borrowed(tmp_path, settings):
    place = weights(tmp_path, settings)
    check_borrowed(lambda: made(settings), {"net": place})


def test_a_head_that_is_not_used_may_be_another(tmp_path):
    other = {"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}
    made(TINY).borrow({"net": weights(tmp_path, TINY, **other)})
    with pytest.raises(VqcoreError, match=r"do not fit: head.weight, head.bias"):
        made({**TINY, "logits": True}).borrow({"net": weights(tmp_path, TINY, **other)})


def test_weights_that_are_not_finite_are_refused(tmp_path):
    broken = made(TINY).net.blocks[0].attn.proj.weight.clone()
    broken[0, 0] = float("nan")
    place = weights(tmp_path, TINY, **{"blocks.0.attn.proj.weight": broken})
    with pytest.raises(VqcoreError, match=r"are not finite: blocks.0.attn.proj.weight"):
        made(TINY).borrow({"net": place})


@pytest.mark.usefixtures("toy")
def test_a_network_that_overflows_is_named_by_its_label(tmp_path):
    eyes = {"name": "percept/timm", "model": "test_vit", "blocks": ["blocks.0"], "rgb": [0, 1, 1]}
    percept = {"eyes": {**eyes, "weights": "random"}, "others": {**eyes, "weights": "random"}}
    config = run_config(tmp_path / "run", objective={"name": "reconstruction", "percept": percept})
    run = build_run(config, torch.device("cpu"))
    run.objective.percept["eyes"].net.blocks[0].mlp.fc1.weight.fill_(1e38)
    with pytest.raises(Trouble, match=r"loss/percept/eyes") as caught:
        train_step(run, Feed(config, run.data, run.tokenizer.modality, run.extra, 1).next(0, 0))
    assert "percept/others" not in str(caught.value)


def test_random_weights_are_said_and_always_the_same(caplog):
    one, two_ = (made({**TINY, "weights": "random"}) for _ in range(2))
    assert one.borrow({}) == two_.borrow({})
    assert "has never seen a picture" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), two_.net.parameters()))


GREY = DataSpec(channels=1, size=(64, 64), range=(0.0, 1.0))
BAD = [
    ("percept/timm", {"model": "test_vit", "blocks": ["blocks.77"]}, RGB, r"has no block 'blocks.77'. Did you"),
    ("percept/timm", {"model": "tset_vit", "logits": True}, RGB, r"no model 'tset_vit'; the nearest name is"),
    ("percept/timm", {"model": "test_vit"}, RGB, r"blocks=\[\]: name blocks to compare"),
    ("percept/timm", TINY, GREY, r"the data has 1 channels: say which they are, e.g. rgb: \[0, 0, 0\]"),
    ("percept/timm", {**TINY, "rgb": [0, 1, 2]}, GREY, r"the data has 1 channels, 0 to 0"),
    ("percept/timm", {**TINY, "rgb": [0, 1]}, RGB, r"give three channels"),
    ("percept/timm", TINY, DataSpec(channels=3, size=(64,)), r"takes data with 2 axes, the data has 1"),
    ("percept/timm", TINY, DataSpec(channels=3, size=(64, 64), range=None), r"takes values in a known range"),
    ("percept/timm", {**TINY, "resize": False}, DataSpec(channels=3, size=(60, 60)), r"not take pictures of \[60"),
    ("percept/lpips", {"net": "alex"}, DataSpec(channels=3, size=(16, 16)), r"\[16, 16\] are too small for alex"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "spec", "says"), BAD)
def test_what_does_not_fit_is_one_line(name, settings, spec, says):
    with pytest.raises(ConfigError, match=says):
        made(settings, name, spec)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    from vqcore.network import closed_unless_asked

    with (
        closed_unless_asked(),
        pytest.raises(VqcoreError, match=r"checkpoints/alexnet-owt-7be5be79.pth is missing"),
    ):
        made({"net": "alex"}, "percept/lpips").borrow({})
    with pytest.raises(VqcoreError, match="no such file"):
        made({"net": "alex", "weights": str(tmp_path / "no.pth")}, "percept/lpips").borrow({})


# CLIP and teachers


@pytest.mark.slow
def test_clip_obeys_the_laws_and_borrows(tower, tmp_path):
    from vqcore.testing.checks import check_percept

    percept = made(tower, "percept/clip")
    check_percept(percept, *two())
    whole = {f"visual.{name}": value.clone() for name, value in percept.net.state_dict().items()}
    save_file({**whole, "logit_scale": torch.ones(1)}, tmp_path / "clip.safetensors")
    place = str(tmp_path / "clip.safetensors")
    check_borrowed(lambda: made({**tower, "weights": "elsewhere"}, "percept/clip"), {"net": place})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "imagebind_huge", "weights": "x"}, "not for commercial use"),
        ({"model": "ViT-B-61", "weights": "x"}, "open_clip has no model 'ViT-B-61'. Did you mean 'ViT-B-16'"),
        (
            {"model": "ViT-B-16", "pretrained": "opnai"},
            "ViT-B-16 has no weights 'opnai'. Did you mean 'openai'",
        ),
        ({"model": "ViT-B-16"}, "name the weights, e.g. openai"),
    ],
)
def test_what_clip_does_not_have_is_one_line(settings, says):
    pytest.importorskip("open_clip")
    with pytest.raises(ConfigError, match=says):
        made(settings, "percept/clip")


class TestTeacherLaws(TeacherConformance):
    component = "percept/timm"
    spec = RGB
    configs = (
        {"model": "test_vit"},
        {"model": "test_vit", "output": "global"},
        {"model": "test_convnext", "resize": False},
    )


def test_clip_as_a_teacher_gives_projected_patches_and_the_embedding(tower):
    """Against the tower's own steps: its last tokens after the norm, in CLIP's space; the embedding is the tower's."""
    from vqcore.testing.checks import check_teacher

    settings, (_, x) = {name: tower[name] for name in ("model", "weights")}, two()
    patches, whole = (
        build("teacher", "percept/clip", {**settings, "output": output}, spec=RGB)
        for output in ("patches", "global")
    )
    whole.load_state_dict(patches.state_dict())
    net, kept = patches.net, {}
    hook = net.ln_post.register_forward_hook(lambda module, args, out: kept.update(tokens=out))
    with torch.no_grad():
        found, embedding = patches(x), whole(x)
        hook.remove()
        wanted = kept["tokens"][:, 1:] @ net.proj
        assert found.shape == (3, patches.dim, 4, 4) and patches.dim == 24
        assert torch.allclose(found.flatten(2).mT, wanted, atol=1e-6)
        assert torch.allclose(embedding, kept["tokens"][:, 0] @ net.proj, atol=1e-6)
    for teacher in (patches, whole):
        check_teacher(teacher, x)


def test_a_teacher_gives_maps_without_class_tokens():
    teacher = build("teacher", "percept/timm", {"model": "test_vit"}, spec=RGB)
    _, x = two()
    side = teacher.net.pretrained_cfg["input_size"][-1] // teacher.net.patch_embed.patch_size[0]
    assert teacher(x).shape == (3, teacher.dim, side, side)
    tokens = teacher.net.forward_features(teacher.seen(x))[:, teacher.net.num_prefix_tokens :]
    assert torch.allclose(teacher(x).flatten(2).mT, tokens, atol=1e-5)


class TestDinoLaws(DiscriminatorConformance):
    component = "percept/dino"
    spec = RGB
    configs = (
        {"trunk": {"name": "percept/timm", "model": "test_vit"}, "blocks": ["net.blocks.0", "net.blocks.2"]},
        {"trunk": {"name": "percept/timm", "model": "test_vit"}, "kernel": 1},
    )


@pytest.mark.slow
def test_clip_has_the_activation_that_its_weights_were_trained_with():
    pytest.importorskip("open_clip")
    for tag, name in (("openai", "QuickGELU"), ("laion2b_s34b_b88k", "GELU")):
        percept = made({"model": "ViT-B-16", "pretrained": tag}, "percept/clip")
        assert type(percept.net.transformer.resblocks[0].mlp.gelu).__name__ == name
