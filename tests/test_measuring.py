"""What an evaluation does with metrics (set up once, facts, rows, weights), few samples to decode, and precision."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toys import run_config, run_tree, tokenizer_of, toy  # noqa: F401

from vqcore.cli import main
from vqcore.errors import CheckpointError, ConfigError
from vqcore.evaluate.measure import decode_count, eval_batches, evaluate
from vqcore.evaluate.perturb import perturbed
from vqcore.evaluate.rows import intervals
from vqcore.metrics.labels import F1, Accuracy, IoU
from vqcore.metrics.pixels import MAE, PSNR
from vqcore.metrics.ssim import SSIM
from vqcore.metrics.sums import per_sample
from vqcore.objectives import Reconstruction
from vqcore.protocols import Batch, DataSpec
from vqcore.registry import registry
from vqcore.rng import sample_generators
from vqcore.run.state import build
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import evaluate_run, train

pytestmark = pytest.mark.usefixtures("toy")

MEASURES = '''
from dataclasses import dataclass
import torch
from vqcore.config import Config
from vqcore.plugin import Component, Plugin, hookimpl

class Plain:
    better = "lower"
    @dataclass(frozen=True, kw_only=True)
    class Config(Config):
        """None."""
    def __init__(self, cfg, *, spec):
        self.spec, self.net = spec, None

    def setup(self, device):
        with open("setups.txt", "a") as file:
            file.write("once\\n")
        self.net = torch.nn.Linear(self.spec.channels, 6, bias=False).to(device)

    def facts(self):
        return {"net": f"{self.net.weight.sum().item():.6f}"}

    @torch.no_grad()
    def features(self, x):
        """Rounded, so that sums of them and of their products are exact."""
        return (self.net(x.flatten(2).mean(-1)) * 256).round().double() / 256

class Frechet(Plain):
    """Means and covariances, as sums."""
    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        sums = {}
        for name, one in (("hat", self.features(x_hat)), ("true", self.features(x))):
            sums |= {name: one.sum(0), f"{name}2": one.T @ one}
        return {**sums, "n": torch.tensor(float(len(x)), dtype=torch.float64)}

    def summary(self, sums):
        n = sums["n"]
        means = [sums[name] / n for name in ("hat", "true")]
        first, second = (sums[f"{name}2"] / n - torch.outer(m, m) for name, m in zip(("hat", "true"), means))
        roots = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
        apart = (means[0] - means[1]).square().sum()
        return {"": float(apart + first.trace() + second.trace() - 2 * roots)}

class Gathered(Plain):
    """The share of reconstructions whose nearest sample is their own: needs the whole set."""
    rows = gather = True
    better = "higher"
    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        return {"hat": self.features(x_hat).float(), "true": self.features(x)}

    def summary(self, rows):
        near = torch.cdist(rows["hat"].double(), rows["true"]).argmin(1)
        place = torch.arange(len(near)) + 1.0  # the order of rows counts
        return {"": float((near == place - 1).double().mean()), "order": float(rows["true"][:, 0] @ place.double())}

class Each(Plain):
    """The error of each sample."""
    rows = of_constant = True
    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        each = (x_hat.double() - x).abs().flatten(1)
        return {"mean": each.mean(1), "most": each.amax(1)}

    def summary(self, sums):
        return {"": float(sums["mean"] / sums["count"]), "most": float(sums["most"] / sums["count"])}

@hookimpl
def vqcore_plugin():
    names = ("Frechet", "Gathered", "Each")
    return Plugin(1, "measures", tuple(Component("metric", n.lower(), f":{n}", "a measure") for n in names))
'''
LOCAL = {name: {"name": f"local/{name}"} for name in ("frechet", "gathered", "each")}


@pytest.fixture
def measures(tmp_path, monkeypatch):
    """The metrics of `MEASURES` as `local/...`, and a file with a line for each time that one was set up."""
    monkeypatch.chdir(tmp_path)
    Path("measures.py").write_text(MEASURES)
    registry().add_file("measures.py")
    return Path("setups.txt")


def report_of(run):
    return json.loads((Path(run) / "eval.json").read_text())


def figures(run):
    return report_of(run)["results"][0]["metrics"]


@pytest.mark.slow
def test_a_metric_is_set_up_once_in_a_run_and_once_in_a_command(measures):
    changes = {"eval__metrics": {"far": LOCAL["each"]}, "eval__every": 2, "eval__sizes": [8, 16]}
    run = train(run_config("run", **changes))
    assert measures.read_text().splitlines() == ["once"]
    assert {"eval@8x8/metric/far", "eval@16x16/metric/far/most/high"} <= run.progress.evaluation.keys()
    assert main(["eval", "run", "--weights", "both"]) == 0
    assert measures.read_text().splitlines() == ["once"] * 2
    assert main(["report", "run"]) == 0


def test_what_a_metric_lacks_is_said_before_the_first_step(tmp_path):
    metrics = {"far": {"name": "toy/frechet", "weights": str(tmp_path / "no.safetensors")}}
    with pytest.raises(CheckpointError, match=r"^eval.metrics.far: .*no.safetensors: there is no such file"):
        train(run_config(tmp_path / "run", eval__metrics=metrics))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_metrics_are_not_set_up_where_nothing_is_evaluated(measures):
    train(run_config("run", eval__metrics={"far": LOCAL["each"]}, data__evaluate=False))
    assert not measures.exists()


def test_facts_are_part_of_the_protocol(measures, capsys):
    for name in ("one", "two"):
        train(run_config(name, eval__metrics={"far": LOCAL["frechet"]}, run__steps=1))
        assert main(["eval", name]) == 0
    protocol = report_of("one")["protocol"]["metrics"]["far"]
    assert protocol.keys() == {"name", "facts"} and protocol["facts"].keys() == {"net"}
    assert main(["eval", "--compare", "one", "two"]) == 0
    report = report_of("two")
    report["protocol"]["metrics"]["far"]["facts"]["net"] = "another"
    Path("two/eval.json").write_text(json.dumps(report))
    assert main(["eval", "--compare", "one", "two"]) == 2
    assert "metrics.far.facts.net" in capsys.readouterr().err


def test_a_label_cannot_hide_a_loss(tmp_path):
    metrics = {"loss": {"name": "psnr"}, "pixel/mse": {"name": "mae"}, "pixel": {"name": "psnr"}}
    found = train(run_config(tmp_path / "run", eval__metrics=metrics, run__steps=1)).progress.evaluation
    assert found["eval/loss"] == pytest.approx(found["eval/loss/pixel/mse"] + found["eval/loss/vq/commit"])
    assert found["eval/metric/loss"] == found["eval/metric/pixel"] > 1 and found["eval/metric/pixel/mse"] < 1


# Rows


class Errors:
    """The squared error of each sample as a row, and its root mean square over the set."""

    rows = True

    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        return {"squared": per_sample((x_hat.double() - x).square(), mask)}

    def summary(self, sums):
        return {"": float((sums["squared"] / sums["count"]).sqrt())}


class Order(Errors):
    """Which rows `summary` gets, in their order."""

    gather = True

    def __init__(self):
        self.got = None

    def summary(self, rows):
        self.got = rows["squared"]
        return {"": 0.0}


def some_batches(tokenizer, count, size):
    x = torch.rand(count, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keys = [f"k{(7 * place) % count:02d}" for place in range(count)]  # not in the order of reading
    for start in range(0, count, size):
        yield Batch(x[start : start + size], tuple(keys[start : start + size]))


def evaluated(tokenizer, metrics, batches, **more):
    how = {"size": (8, 8), "weights": None, "seed": 0, "step": 0, **more}
    return evaluate(tokenizer, batches, metrics, **how).metrics


def test_rows_come_in_the_order_of_keys_whatever_the_batches(tmp_path):
    tokenizer = tokenizer_of(run_config(tmp_path / "run")).eval()
    got = []
    for size in (1, 3, 10):
        order = Order()
        evaluated(tokenizer, {"far": order}, some_batches(tokenizer, 10, size))
        got.append(order.got)
    assert torch.allclose(got[0], got[1]) and torch.allclose(got[0], got[2])  # networks round by batch
    (batch,) = some_batches(tokenizer, 10, 10)
    each = (tokenizer.reconstruct(batch.x).double() - batch.x).square().flatten(1).mean(1)
    assert torch.allclose(got[0], each[torch.tensor(np.argsort(batch.keys))])


def test_an_interval_is_that_of_the_bootstrap(tmp_path):
    tokenizer = tokenizer_of(run_config(tmp_path / "run")).eval()
    order = Order()
    found = evaluated(tokenizer, {"far": Errors(), "all": order}, some_batches(tokenizer, 40, 7))
    each = order.got.numpy()
    assert found["metric/far"] == pytest.approx(np.sqrt(each.mean()))
    rng = np.random.default_rng(1)
    drawn = np.sqrt(each[rng.integers(0, 40, (20_000, 40))].mean(1))
    wide = np.quantile(drawn, 0.975) - np.quantile(drawn, 0.025)
    for name, share in (("low", 0.025), ("high", 0.975)):
        assert found[f"metric/far/{name}"] == pytest.approx(np.quantile(drawn, share), abs=0.1 * wide)
    assert found["metric/far/low"] < found["metric/far"] < found["metric/far/high"]
    assert {name for name in found if name.startswith("metric/all")} == {"metric/all"}


def test_windows_of_a_file_are_drawn_together():
    """200 windows of 20 records, each record with an offset: the interval is that of 20 independent records."""
    draw = np.random.default_rng(2)
    of = np.repeat(np.arange(20), np.arange(1, 21))  # records of unequal length
    each = np.square(draw.normal(0, 1, 20)[of] + draw.normal(0, 0.1, len(of)))
    rows, files = {"squared": torch.tensor(each)}, [f"r{number}" for number in of]
    low, high = intervals(Errors(), rows, files)[""]
    sums, counts = np.bincount(of, each), np.bincount(of)
    drawn = draw.integers(0, 20, (20_000, 20))
    expected = np.quantile(np.sqrt(sums[drawn].sum(1) / counts[drawn].sum(1)), [0.025, 0.975])
    wide = expected[1] - expected[0]
    assert (low, high) == pytest.approx(tuple(expected), abs=0.1 * wide)
    alone = intervals(Errors(), rows)[""]
    assert alone[1] - alone[0] < 0.6 * wide
    assert intervals(Errors(), rows, ["one"] * len(of)) == {}


def test_an_interval_of_a_wide_row_needs_little_memory(monkeypatch):
    rows = {"wide": torch.rand(5, 30, 20)}

    class Wide(Errors):
        def summary(self, sums):
            assert sums["wide"].shape == (30, 20) and float(sums["count"]) == 5
            return {"": float(sums["wide"].mean())}

    whole = intervals(Wide(), rows)[""]
    monkeypatch.setattr("vqcore.evaluate.rows._MOST", 1000)
    assert 0 < whole[0] < intervals(Wide(), rows)[""][1] < 5


def test_a_nan_is_not_hidden(tmp_path):
    tokenizer = tokenizer_of(run_config(tmp_path / "run")).eval()

    class Broken(Errors):
        def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
            rows = super().measure(x_hat, x)["squared"]
            return {
                "squared": torch.stack([row / (key != "k03") for key, row in zip(keys, rows)])
                * (torch.tensor([float("nan") if key == "k03" else 1.0 for key in keys]))
            }

    found = evaluated(tokenizer, {"far": Broken()}, some_batches(tokenizer, 10, 4))
    assert all(np.isnan(found[f"metric/far{part}"]) for part in ("", "/low", "/high"))


def test_replaced_codes_are_those_of_other_positions():
    codes = torch.arange(2 * 4 * 5 * 2).reshape(2, 4, 5, 2)
    for share, count in ((0.1, 2), (0.5, 10), (1.0, 20), (0.001, 1)):
        found = perturbed(codes, share, sample_generators(("a", "b"), 0, "x"))
        moved = (found != codes).any(-1)
        assert moved.flatten(1).sum(1).tolist() == [count, count]
        for new, own in zip(found.flatten(1, 2), codes.flatten(1, 2)):
            assert {*map(tuple, new.tolist())} <= {
                *map(tuple, own.tolist())
            }  # whole codes of the same sample
    alone = perturbed(codes[1:], 0.5, sample_generators(("b",), 0, "x"))
    assert torch.equal(alone, perturbed(codes, 0.5, sample_generators(("a", "b"), 0, "x"))[1:])
    assert torch.equal(
        perturbed(codes[:, :1, :1], 1.0, sample_generators(("a", "b"), 0, "x")), codes[:, :1, :1]
    )

    valid = torch.arange(20).reshape(4, 5).expand(2, 4, 5) < 7
    found = perturbed(codes, 1.0, sample_generators(("a", "b"), 0, "x"), valid)
    assert torch.equal((found != codes).any(-1), valid)  # what is not valid neither moves nor is copied
    for new, own in zip(found[valid].split(7), codes[valid].split(7)):
        assert {*map(tuple, new.tolist())} <= {*map(tuple, own.tolist())}


def test_metrics_of_replaced_codes_stand_beside_the_plain_ones(tmp_path):
    tokenizer = tokenizer_of(run_config(tmp_path / "run")).eval()
    metrics = {"far": Errors(), "all": Order()}
    batches = list(some_batches(tokenizer, 10, 3))
    plain = evaluated(tokenizer, metrics, batches)
    found = evaluated(tokenizer, metrics, batches, perturb=0.5)
    assert plain.items() <= found.items()
    assert found.keys() - plain.keys() == {"perturbed/error", "perturbed/metric/far", "perturbed/metric/all"}
    total = 0.0
    for batch in batches:
        codes = perturbed(tokenizer.encode(batch.x), 0.5, sample_generators(batch.keys, 0, "eval-perturb"))
        total += float((tokenizer.decode(codes).double() - batch.x).square().flatten(1).mean(1).sum())
    assert found["perturbed/metric/far"] == pytest.approx(math.sqrt(total / 10))
    assert found["perturbed/metric/far"] > found["metric/far"]


def test_another_number_of_rows_is_named(tmp_path):
    tokenizer = tokenizer_of(run_config(tmp_path / "run")).eval()

    class Short(Errors):
        def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
            return {"squared": super().measure(x_hat, x)["squared"][1:]}

    with pytest.raises(ValueError, match="'squared' has 3 rows for 4 samples"):
        evaluated(tokenizer, {"far": Short()}, some_batches(tokenizer, 10, 4))


# Weights


def test_weight_0_is_masked_and_weight_1_is_no_weight():
    spec = DataSpec(channels=3, size=(4, 4))
    x, x_hat = (torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    labels = DataSpec(channels=1, size=(4, 4), kind="categorical", labels=3, range=None)
    mask = torch.rand(2, 4, 4) > 0.4
    for metric, pair in (
        (PSNR(PSNR.Config(), spec=spec), (x_hat, x)),
        (MAE(MAE.Config(), spec=spec), (x_hat, x)),
        (Accuracy(Accuracy.Config(), spec=labels), (x_hat, (3 * x[:, 0]).long())),
    ):
        value = lambda *args, **more: metric.summary(metric.measure(*pair, *args, **more))[""]  # noqa: B023, E731
        assert value(weight=mask.float()) == value(mask)
        assert value(weight=torch.ones(2, 4, 4)) == pytest.approx(value())
        assert value(mask, weight=torch.ones(2, 4, 4)) == value(mask)
        assert value(weight=mask + 0.5) == pytest.approx(value(weight=10 * (mask + 0.5))) != value()
    weight = torch.tensor([[[1.0, 3.0]]])
    off = torch.tensor([[[[2.0, 6.0]]]])
    mae = MAE(MAE.Config(), spec=DataSpec(channels=1, size=(1, 2)))
    assert mae.summary(mae.measure(off, 0 * off, weight=weight))[""] == (2 + 18) / 4
    assert mae.summary(mae.measure(off, 0 * off, weight=weight / 100))[""] == pytest.approx(5)


def test_a_metric_that_cannot_use_weights_says_so():
    spec, x = DataSpec(channels=3, size=(12, 12)), torch.zeros(1, 3, 12, 12)
    binary = replace(spec, kind="binary")
    for cls, one in ((SSIM, spec), (F1, spec), (IoU, binary)):
        metric = cls(cls.Config(), spec=one)
        metric.measure(x, x)
        with pytest.raises(ConfigError, match="cannot use weights of positions, which these samples have"):
            metric.measure(x, x, weight=torch.ones(1, 12, 12))


def test_the_weights_of_a_batch_reach_the_metrics(tmp_path):
    tokenizer = tokenizer_of(run_config(tmp_path / "run")).eval()
    (batch,) = some_batches(tokenizer, 5, 5)
    mae = {"mae": MAE(MAE.Config(), spec=tokenizer.spec)}
    half = torch.ones(5, 8, 8)
    half[:, ::2] = 0
    weighted = evaluated(tokenizer, mae, [replace(batch, weight=half)])["metric/mae"]
    masked = tokenizer.encode(batch.x)  # the codes see everything
    assert weighted == pytest.approx(
        float(per_sample((tokenizer.decode(masked).double() - batch.x).abs(), half > 0).mean())
    )


# Samples to decode, sampling options, precision


def test_few_samples_are_decoded_and_all_are_measured(tmp_path, monkeypatch):
    counts, decode = [], Reconstruction.decode

    def counting(self, tokenizer, codes, **more):
        counts.append(len(codes))
        return decode(self, tokenizer, codes, **more)

    run = build(run_config(tmp_path / "run", data__length=11, eval__pictures=1), torch.device("cpu"))
    (whole,) = evaluate_run(run).values()
    monkeypatch.setattr(Reconstruction, "decode", counting)
    few = replace(run, config=replace(run.config, eval=replace(run.config.eval, decode_samples=4)))
    (part,) = evaluate_run(few).values()
    assert sum(counts) == 4
    found, all_ = part.metrics, whole.metrics
    assert (found["samples"], found["decoded"]) == (11, 4) and all_["decoded"] == 11
    same = [name for name in all_ if name.startswith(("loss", "codes"))]
    assert {name: found[name] for name in same} == {name: all_[name] for name in same}
    assert found["metric/psnr"] != all_["metric/psnr"] and found["error"] != all_["error"]


def test_decoded_samples_are_spread_over_the_measured_ones(tmp_path):
    run = build(run_config(tmp_path / "run", data__length=24), torch.device("cpu"))

    def keys(**limits):
        loaded = eval_batches(run.tokenizer, run.config, run.eval_data, {}, **limits)
        return [key for one in loaded for key in one.batch.keys]

    some = keys(limit=10)
    assert keys(limit=3, among=10) == [some[place] for place in (0, 3, 6)] and keys(among=10) == some


def test_a_denoiser_decodes_256_samples_unless_told_otherwise(tmp_path, monkeypatch):
    run = build(run_config(tmp_path / "run"), torch.device("cpu"))
    assert decode_count(run.config, run.tokenizer, 1000) == 1000
    monkeypatch.setattr(type(run.tokenizer.decoder), "is_denoiser", True, raising=False)
    assert (
        decode_count(run.config, run.tokenizer, 1000) == 256
        and decode_count(run.config, run.tokenizer, 9) == 9
    )
    told = replace(run.config, eval=replace(run.config.eval, decode_samples=300))
    assert decode_count(told, run.tokenizer, 1000) == 300


def sampled(self, tokenizer, codes, *, size, rng, extras=None, steps: int = 3):
    """A decoder that is better with more steps."""
    return DECODE(self, tokenizer, codes, size=size, rng=rng, extras=extras) * (1 - 1 / steps)


DECODE = Reconstruction.decode


def test_sampling_options_decide_and_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Reconstruction, "decode", sampled)
    train(run_config(tmp_path / "run", run__steps=1, eval__sampling={"steps": 5}, data__length=7))
    names = [str(tmp_path / f"{steps}.json") for steps in (5, 50)]
    for steps, name in zip((5, 50), names):
        argv = ["eval", str(tmp_path / "run"), f"eval.sampling={{steps: {steps}}}", "--json", name]
        assert main(argv) == 0
    five, fifty = (json.loads(Path(name).read_text()) for name in names)
    assert [each["protocol"]["sampling"]["steps"] for each in (five, fifty)] == [5, 50]
    assert five["results"][0]["metrics"]["metric/mae"] != fifty["results"][0]["metrics"]["metric/mae"]
    assert main(["eval", "--compare", *names]) == 2
    assert "sampling.steps (5 / 50)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "says"),
    [("eval.decode_samples=3", "decode_samples (7 / 3)"), ("eval.precision=bf16", "precision (fp32 / bf16)")],
)
def test_what_else_is_compared(tmp_path, capsys, override, says):
    train(run_config(tmp_path / "run", run__steps=1, data__length=7))
    names = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert main(["eval", str(tmp_path / "run"), "--json", names[0]]) == 0
    assert main(["eval", str(tmp_path / "run"), override, "--json", names[1]]) == 0
    assert main(["eval", "--compare", *names]) == 2
    assert says in capsys.readouterr().err


def test_precision_is_that_of_the_evaluation_and_not_of_training(tmp_path, monkeypatch):
    seen, losses = [], Reconstruction.losses

    def watching(self, tokenizer, batch, **more):
        out = losses(self, tokenizer, batch, **more)
        seen.append((tokenizer.training, tokenizer.latents(batch.x).dtype))
        return out

    monkeypatch.setattr(Reconstruction, "losses", watching)
    for own, of_eval in (("bf16", "fp32"), ("fp32", "bf16")):
        seen.clear()
        changes = {"run__precision": own, "eval__precision": of_eval, "run__steps": 2}
        train(run_config(tmp_path / f"{own}", **changes))
        types = {"fp32": torch.float32, "bf16": torch.bfloat16}
        trained = {dtype for training, dtype in seen if training}
        assert trained == {types[own]}
        assert seen[-1] == (False, types[of_eval])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_codes_and_reconstructions_keep_their_types(tmp_path, precision):
    tokenizer_of(run_config(tmp_path / "run")).save(tmp_path / "made")
    full, half = (Tokenizer.load(tmp_path / "made", precision=p) for p in ("fp32", precision))
    x = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert full.latents(x).dtype == torch.float32 and half.latents(x).dtype != torch.float32
    codes = half.encode(x)
    assert codes.dtype == torch.int64 and half.decode(codes).dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert not torch.equal(half.decode(codes), full.decode(codes))
    assert torch.allclose(half.decode(codes), full.decode(codes), atol=0.05)
    assert half.fingerprint == full.fingerprint


def test_tokenize_and_decode_take_a_precision(tmp_path, capsys):
    train(run_config(tmp_path / "run", run__steps=1))
    (tmp_path / "x").mkdir()
    for name in "ab":
        np.save(tmp_path / f"x/{name}.npy", np.zeros((2, 8, 8), np.float32))
    argv = ["tokenize", str(tmp_path / "run"), str(tmp_path / "x"), str(tmp_path / "tokens")]
    assert main([*argv, "--precision", "bf16"]) == 0
    assert main(argv) == 2
    assert "holds other codes (different: precision bf16 there, fp32 here)" in capsys.readouterr().err
    assert (
        main(
            [
                "decode",
                str(tmp_path / "run"),
                str(tmp_path / "tokens"),
                str(tmp_path / "out"),
                "--precision",
                "bf16",
            ]
        )
        == 0
    )
    assert np.load(tmp_path / "out/a.npy").dtype == np.float32
    assert main([*argv, "--precision", "fp64"]) == 2


# Several processes


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_measure_the_same_bits(tmp_path):
    """11 samples in batches of 1, 4 decoded and 11: a distance of moments, a gathered metric, rows with intervals."""
    pytest.importorskip("timm")
    rng = np.random.default_rng(0)
    fdd = {"name": "percept/fdd", "model": "test_vit", "side": 64, "weights": "random", "rgb": [0, 1, 1]}
    np.save(tmp_path / "x.npy", rng.uniform(-1, 1, (11, 2, 16, 16)).astype(np.float32))
    (tmp_path / "measures.py").write_text(MEASURES)
    vit = {"width": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
    tree = {
        **run_tree("run", run__steps=2, run__threads=1),
        "data": {
            "name": "array", "path": "x.npy", "eval_path": "x.npy", "batch_size": 1, "workers": 0,
            "modality": {"name": "array", "channels": 2, "size": [16, 16], "range": [-1, 1]},
        },
        "model": {
            "encoder": {"name": "vit/encoder", **vit},
            "quantizer": {"name": "quant/vq", "codebook_size": 32, "latent_dim": 8},
            "decoder": {"name": "vit/decoder", **vit},
        },
        "eval": {"metrics": {**LOCAL, "fdd": fdd}, "perturb": 0.25, "pictures": 5},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.dump(tree))
    many = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]

    def command(*argv, launcher=()):
        line = [sys.executable, *launcher, "-m", "vqcore", *argv, "--plugin", "measures.py"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    command("train", "run.yaml")
    for few in ("null", "4"):
        reports, sheets = [], []
        for launcher in ((), many):
            (tmp_path / "run/baseline.json").unlink(missing_ok=True)  # k-means is fitted again
            command("eval", "run", f"eval.decode_samples={few}", launcher=launcher)
            reports.append(report_of(tmp_path / "run"))
            sheets.append((tmp_path / "run/samples/eval.png").read_bytes())
        one, two = (report["results"][0] for report in reports)
        assert reports[0]["protocol"] == reports[1]["protocol"]
        alike = ("metric/", "perturbed/metric/", "codes/", "samples", "decoded")
        exact = [name for name in one["metrics"] if name.startswith(alike)]
        wanted = {"frechet", "gathered", "gathered/order", "each/most/low", "fdd", "fdd/kdd", "fdd/recall"}
        assert {f"metric/{name}" for name in wanted} | {"perturbed/metric/fdd"} <= set(exact)
        assert {name: one["metrics"][name] for name in exact} == {
            name: two["metrics"][name] for name in exact
        }
        assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-6)
        assert list(one["baselines"]) == ["constant", "k-means"]
        for name, scores in one["baselines"].items():  # errors are sums over processes, in another order
            assert scores == pytest.approx(two["baselines"][name], rel=1e-12)
        assert "metric/each" in one["baselines"]["constant"] and "codes/bits_at_position" in exact
        assert one["metrics"]["decoded"] == (11 if few == "null" else 4)
        assert sheets[0] == sheets[1]
