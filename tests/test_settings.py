"""Settings that cannot be meant: tables of words, numbers, sizes, paths and devices that are refused in one line."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from vqcore.assembly import pick_device
from vqcore.check.checks import everything
from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.compose.text import document, word
from vqcore.config import above_zero, at_least
from vqcore.errors import ConfigError, SettingError, VqcoreError, no_memory
from vqcore.files import local
from vqcore.memory import TooLarge, machine_memory, within_memory
from vqcore.schema import RunConfig

pytest.importorskip("vqcore_vit")
pytest.importorskip("vqcore_quant")
PHOTOS = Path(__file__).resolve().parents[1] / "data" / "photos"
TINY = {
    "data": {
        "name": "folder",
        "path": str(PHOTOS / "train"),
        "eval_path": str(PHOTOS / "heldout"),
        "modality": {"name": "rgb"},
        "input_size": 32,
        "batch_size": 4,
        "workers": 0,
    },
    "model": {
        "encoder": {"name": "vit/encoder", "width": 16, "depth": 0, "num_heads": 2, "patch_size": 8},
        "quantizer": {"name": "quant/vq", "codebook_size": 32, "latent_dim": 4},
        "decoder": {"name": "vit/decoder", "width": 16, "depth": 0, "num_heads": 2, "patch_size": 8},
    },
    "run": {"steps": 4, "threads": 1},
    "optim": {"lr": 1e-3},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return "tiny.yaml"


def config(tiny: str, *overrides: str) -> RunConfig:
    return load(tiny, overrides, schema=RunConfig).config


# --- one word is one value ------------------------------------------------------------------------------------------


# fmt: off
TEXTS = [
    "pics #1", "& a", "&x y", "*.png", "!!str a", "a\nb", "a ", " a", "a: b", "C:", "- a", "# a", "? a", "| a", "> a",
    "%a", "@a", "=", "<<", "010", "0x10", "0b1", "1:30", "1_000", "2024-01-01", "a\tb", "\x07", "\udcff",
]
VALUES = [
    ("5", 5), ("-1e-3", -0.001), ("true", True), ("null", None), ("", None), ("'a #b'", "a #b"), ("[1, a]", [1, "a"]),
    ("{a: {b: 1}}", {"a": {"b": 1}}), ('"a\\nb"', "a\nb"), ("[010]", ["010"]), ("1e3", 1000.0),
]
# fmt: on


@pytest.mark.parametrize("text", TEXTS)
def test_a_word_is_kept_to_its_last_character(text):
    assert word(text) == text


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_a_word_may_be_a_value_of_yaml(text, value):
    assert word(text) == value


@pytest.mark.parametrize(
    "text", ["[a #1]", "[a] b", "'a' b", "[a\nb]", "[&x a]", "{a: *x}", "[1, #x\n2]", "[" * 1100]
)
def test_nothing_is_left_out_of_a_list(text, tiny):
    with pytest.raises(
        ConfigError, match=r"command line: data.path=.* is not valid YAML.*quote it twice"
    ) as caught:
        config(tiny, f"data.path={text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "write"), [("010", "10"), ("1:30", "90"), ("1_000", "1000"), ("0x10", "16")]
)
def test_a_number_is_written_in_digits(text, write, tiny):
    says = f"run.seed='{text}' is not an integer. A number is written in digits: write {write}."
    with pytest.raises(ConfigError, match=says):
        config(tiny, f"run.seed={text}")
    Path("b.yaml").write_text(f"defaults: [tiny.yaml]\nrun: {{seed: {text}}}\n")
    with pytest.raises(ConfigError, match=says):
        config("b.yaml")
    assert document(f"a: &x [{text}]\nb: *x") == {"a": [text], "b": [text]}


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e39", "-2e39", "1" + "0" * 400])
@pytest.mark.parametrize(
    "key", ["optim.lr", "run.steps", "optim.args.x", "objective.weights.a", "eval.sampling.x"]
)
def test_numbers_that_cannot_be_meant(number, key, tiny):
    says = r"must be a number from -(1e\+12 to 1e\+12|3\.40282e\+38 to 3\.40282e\+38)|is not "
    with pytest.raises(ConfigError, match=f"{key}=.*({says})") as caught:
        config(tiny, f"{key}={number}")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("number", ["1e13", "-2e12", "9" * 20])
def test_whole_numbers_that_cannot_be_meant(number, tiny):
    with pytest.raises(ConfigError, match=r"run.steps=.* must be a number from -1e\+12 to 1e\+12"):
        config(tiny, f"run.steps={number}")


# --- settings that do nothing or contradict each other --------------------------------------------------------------

IDLE = {
    ("optim.args.lr=1",): r"optim.args.lr would do nothing; set optim.lr",
    ("optim.args.weight_decay=1",): r"optim.args.weight_decay would do nothing; set optim.weight_decay",
    ("optim.args.betas=1",): r"optim.args.betas would do nothing",
    ("optim.players.d={args: {lr: 1}}",): r"args.lr would do nothing",
    ("optim.min_lr=1",): r"min_lr=1 is above lr=0.001",
    ("optim.warmup=9", "optim.horizon=9"): r"horizon=9 ends the schedule before warmup=9 ends",
    ("objective.weights.a=-0.1",): r"objective.weights.a: -0.1 is below 0",
    ("objective.weights.a={0: 1, 5: -2}",): r"objective.weights.a: -2 is below 0",
    ("objective.weights.a={²: 1}",): r"'²' is not an integer",
    ("objective.loss=mse", "objective.width=2"): r"width=2.0 does nothing with loss=mse",
    ("data.path=''",): r"data.path='' is no text that a path or a name can be",
    ("data.path=' '",): r"data.path=' ' is no text",
    ('data.path="a\\0b"',): r"is no text that a path",
    ("data.path=a\udcff",): r"data.path='a\\udcff' is no text that a path or a name can be",
    ("optim.args.foreach=\udcff",): r"is no text that a path",
    ("run.device=\udcff",): r"is no text that a path",
    ("data.eval_path=''",): r"data.eval_path='' ",
    ("run.dir=''",): r"run.dir='' ",
    ("model.full_ckpt=''",): r"model.full_ckpt='' ",
    ("hooks.t={name: track/tensorboard, dir: ''}",): r"hooks.t.dir='' ",
    ("run.on_explosion=stop",): r"run.on_explosion=stop does nothing without a limit; set optim.max_norm",
    ("run.threads=2000",): r"run.threads=2000 must lie in 1..1024",
    ("data.workers=2000",): r"data.workers=2000 must lie in 0..1024",
    ("data.input_size=[]",): r"every side must be at least 1",
    ("data.resolution_step=8",): r"resolution_step=8 does nothing with input_size_min=null",
    (
        "data.input_size=null",
        "data.input_size_min=64",
        "data.input_size_max=32",
    ): r"input_size_min=64 is above",
    ("eval.sizes=[]",): r"eval.sizes=\[\] is no size",
    ("eval.sizes=[0]",): r"eval.sizes=0: every side",
    ("eval.samples=4", "eval.decode_samples=5"): r"decode_samples=5 is above samples=4",
    ("model.decoder.out_conv_depth=1",): r"out_conv_depth=1 does nothing with out_conv=none",
    (
        "model.encoder={name: vit/mlp-encoder, kind: plain, expansion: 2}",
    ): r"expansion=2 does nothing with kind=plain",
    ("model.quantizer.kmeans_iters=3",): r"kmeans_iters=3 does nothing with kmeans_init=false",
    (
        "model.quantizer.dead_code=null",
        "model.quantizer.threshold_ema_dead_code=1",
    ): r"does nothing with dead_code=null",
    (
        "model.quantizer.threshold_ema_dead_code=1",
        "model.quantizer.coef_ema_dead_code=2",
    ): r"coef_ema_dead_code=2.0 does nothing with threshold_ema_dead_code=1",
    ("model.quantizer.entropy_gamma=2",): r"entropy_gamma=2.0 does nothing with entropy_weight=0",
    ("model.quantizer.shared_codebook=false",): r"shared_codebook=False does nothing with num_codebooks=1",
    (
        "model.quantizer={name: quant/lfq, codebook_size: 16, entropy_weight: 0, group_bits: 3}",
    ): r"group_bits=3 does nothing with entropy_weight=0",
    (
        "model.quantizer={name: quant/ibq, codebook_size: 16, quant_weight: 0, beta: 1}",
    ): r"beta=1.0 does nothing with quant_weight=0",
    (
        "model.quantizer={name: quant/residual, depth: 1, dropout: 0.1, quantizer: {name: quant/fsq, levels: [2]}}",
    ): r"dropout=0.1 does nothing with depth=1",
    (
        "model.quantizer={name: quant/product, groups: 1, shared: true, quantizer: {name: quant/fsq, levels: [2]}}",
    ): r"shared=True does nothing with groups=1",
    (
        "data.modality={name: array, channels: 1, tolerance: 0.2}",
    ): r"data.modality.tolerance=0.2 does nothing with kind=continuous",
    (
        "data.modality={name: vision/features, channels: 1, min_crop_scale: 0.2}",
    ): r"min_crop_scale=0.2 does nothing with crop=cut",
}


@pytest.mark.parametrize(("overrides", "says"), IDLE.items(), ids=[" ".join(words) for words in IDLE])
def test_settings_that_do_nothing_are_errors(overrides, says, tiny):
    with pytest.raises(ConfigError, match=says) as caught:
        config(tiny, *overrides)
    assert str(caught.value).count("\n") == 0 and str(caught.value).startswith(("command line: ", tiny))


# --- what is known when the parts are built -------------------------------------------------------------------------

BUILT = {
    (
        "optim.lr=null",
        "optim.base_lr=1",
        "optim.min_lr=1",
    ): r"optim.min_lr=1 is above the peak, lr 0.01562 = base_lr",
    ("optim={name: sgd, lr: 1, betas: [0, 0]}",): r"optim.betas=\[0.0, 0.0\] does nothing: sgd has no betas",
    ("optim={name: rprop, lr: 1, weight_decay: 1}",): r"optim.weight_decay=1.0 does nothing: rprop has no",
    (
        "optim.horizon=5",
        "optim.warmup_epochs=9",
    ): r"optim.warmup_epochs=9: horizon=5 ends the schedule before",
    (
        "model.encoder.width=1000000000",
    ): r"model.encoder \(vit/encoder\): it needs at least [\d,]+ bytes \(715 GiB\)",
    ("model.encoder.width=100000", "model.encoder.depth=12"): r"it needs at least [\d,]+ bytes",
    (
        "model.quantizer.latent_dim=1000000000000",
        "model.quantizer.codebook_size=2",
    ): r"needs at least [\d,]+ bytes",
    ("data.batch_size=1000000000",): r"data.batch_size=1000000000: a step of .* needs [\d,]+ bytes",
    ("optim.accumulate=1000000000",): r"a step of 4,000,000,000 samples of size \[32, 32\] needs",
    ("data.input_size=1000000000",): r"needs [\d,]+ bytes",
    (
        "data.input_size=null",
        "data.input_size_min=8",
        "data.input_size_max=1000008",
    ): r"needs [\d,]+ bytes|sizes",
    (
        "run.device=gpu",
    ): r"run.device=gpu: there is no such device here. Did you mean '(cpu|cuda)'\? Devices: cpu",
    ("run.device=CPU",): r"run.device=CPU: there is no such device here. Did you mean 'cpu'\?",
    ("run.device=meta",): r"run.device=meta: there is no such device here",
    ("run.device=cpu:1",): r"run.device=cpu:1: there is no such device here",
    ("run.device=None",): r"run.device=None: there is no such device here",
    ("model.full_ckpt=~nobody-here/x",): r"~nobody-here/x: no home folder is known for ~nobody-here",
    ("data.path=~nobody-here/x",): r"~nobody-here/x: no home folder is known",
    ("optim.max_norm=1e-9",): r"the gradient norm of model, .*, is above optim.max_norm=1e-09",
    ("optim.lr=1e12",): r"is not finite|the loss from",
}


@pytest.mark.parametrize(("overrides", "says"), BUILT.items(), ids=[" ".join(words) for words in BUILT])
def test_check_names_what_cannot_be_built(overrides, says, tiny):
    found = [str(one) for one in everything(config(tiny, *overrides)) if one.grade == "error"]
    assert found and any(re.search(says, text) for text in found), found
    assert not any("\n" in text or "Trouble" in text for text in found)
    assert not [path for path in Path().iterdir() if path.name != tiny]


def test_a_device_of_the_command_line_is_named(tiny):
    with pytest.raises(ConfigError, match=r"^--device=tpu: there is no such device here.*Devices: cpu"):
        pick_device("tpu", "--device")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory: you tried to allocate 8 bytes")]
)
def test_memory_that_is_not_there_is_no_bug(error, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr("vqcore.commands.plugins.run", fail)
    assert main(["plugins"]) == 2
    assert capsys.readouterr().err.endswith("Take a smaller model, smaller samples or smaller batches.\n")
    assert no_memory(ValueError("other")) is None


def test_many_small_parts_that_no_memory_holds_together(monkeypatch):
    import torch

    monkeypatch.setattr("vqcore.memory.machine_memory", lambda: 4000)
    with pytest.raises(TooLarge, match=r"at least 4,\d+ bytes"), within_memory():
        [torch.nn.Linear(10, 10) for _ in range(20)]
    with within_memory():
        torch.nn.Linear(10, 10)
    assert machine_memory() > 2**28


# --- ~ --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_home_is_meant_in_every_path(tiny, monkeypatch, capsys):
    """Each door that takes a path finds what lies in the home folder, and writes there."""
    home = Path("home").absolute()
    (home / "pics").mkdir(parents=True)
    for picture in sorted((PHOTOS / "train").iterdir())[:4]:
        (home / "pics" / picture.name).symlink_to(picture)
    (home / "tiny.yaml").write_text(Path(tiny).read_text())
    (home / "out").mkdir()
    monkeypatch.setenv("HOME", str(home))
    Path("b.yaml").write_text("defaults: [~/tiny.yaml]\n")
    words = ["data.path=~/pics", "data.eval_path=~/pics", "run.dir=~/run", "run.steps=1", "eval.pictures=1"]
    for args in (
        ["train", "~/tiny.yaml", *words],
        ["check", "b.yaml", *words[:2], "run.dir=r", "model.full_ckpt=~/run"],
        ["check", "b.yaml", *words[:2], "run.dir=r", "model.encoder_ckpt=~/run"],
        ["eval", "~/run", "--json=~/out/eval.json"],
        ["tokenize", "~/run", "~/pics", "~/tokens"],
        ["decode", "~/run", "~/tokens", "~/rebuilt"],
        ["export", "~/run", "~/mine"],
        ["eval", "--compare", "~/out/eval.json", "~/out/eval.json"],
    ):
        assert main(args) == 0, capsys.readouterr().err
    for written in ("run/checkpoints", "out/eval.json", "tokens/tokens.json", "rebuilt", "mine/config.yaml"):
        assert (home / written).exists()
    assert not Path("~").exists()
    from vqcore.tokenizer import Tokenizer

    tokenizer = Tokenizer.load("~/mine")
    tokenizer.save("~/again")
    tokenizer.read(next(iter(f"~/pics/{p.name}" for p in (home / "pics").iterdir())))
    assert (home / "again" / "config.yaml").exists() and not Path("~").exists()
    assert main(["--help"]) == 0 and main(["show", "rgb", "--plugin=~/none.py"]) == 2
    assert "~/none.py: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["~nobody-here/x", "a\0b"])
def test_no_path(path):
    with pytest.raises(VqcoreError):
        local(path)


# --- the hub is asked for hf:// alone -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["runs/quickstart", "user/name", "user/name@main", "huggingface.co/user/name"]
)
def test_only_hf_addresses_reach_the_hub(name, tiny, monkeypatch, capsys):
    asked = []

    def ask(*args, **more):
        asked.append(args)
        raise VqcoreError("asked")

    monkeypatch.setattr("vqcore.artefacts.hub.download", ask)
    from vqcore.tokenizer import Tokenizer

    with pytest.raises(VqcoreError):
        Tokenizer.load(name)
    doors = (
        ["eval", name],
        ["tokenize", name, str(PHOTOS), "out"],
        ["decode", name, str(PHOTOS), "out"],
        ["export", name, "out"],
        ["report", name],
        ["eval", "--compare", name, name],
        ["train", tiny, f"model.full_ckpt={name}"],
        ["train", tiny, f"model.encoder_ckpt={name}"],
        ["check", tiny, "--borrow", f"decoder={name}"],
    )
    for args in doors:
        assert main(args) == 2, args
        assert "Traceback" not in capsys.readouterr().err
    assert not asked
    with pytest.raises(VqcoreError, match="asked"):
        Tokenizer.load("hf://user/name")
    assert main(["train", tiny, "model.full_ckpt=hf://user/name"]) == 2 and len(asked) == 2


@pytest.mark.parametrize(
    ("value", "least", "above"),
    [
        (None, None, None),
        (0, "at least 1", "above 0"),
        (1, None, None),
        (0.5, "at least 1", None),
        (float("nan"), "at least 1", "above 0"),
        ((2, 1), None, None),
        ((2, 0), "at least 1", "above 0"),
        ((), "[] is empty", "[] is empty"),
    ],
)
def test_numbers_that_are_too_small(value, least, above):
    config = SimpleNamespace(lr=value)
    for refuse, rule in (
        (partial(at_least, config, lr=1), least),
        (partial(above_zero, config, "lr"), above),
    ):
        if rule is None:
            refuse()
            continue
        with pytest.raises(SettingError, match=re.escape(rule)) as raised:
            refuse()
        assert raised.value.names == ("lr",)
