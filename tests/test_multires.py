"""Several sizes: a run at one size, adapted to many, serves the small size, the large one and one that is no square."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

pytest.importorskip("vqcore_vit")
pytest.importorskip("vqcore_quant")
ROOT = Path(__file__).resolve().parent.parent
BASE, ADAPTED = (str(ROOT / f"cfgs/multires/{name}.yaml") for name in ("base", "adapted"))
HELD_OUT = ROOT / "data/photos/heldout"
SMALL, LARGE, OBLONG = (32, 32), (128, 128), (96, 128)
ONE_SIZE = ("data.input_size=32", "data.input_size_min=null", "data.input_size_max=null")
"""Makes of the adaptation as many more steps at the size of the base run, all else being equal."""


def test_the_recipes_differ_in_sizes_and_schedule_alone():
    base, adapted = (load(path, schema=RunConfig).config for path in (BASE, ADAPTED))
    assert adapted.model.full_ckpt == base.run.dir != adapted.run.dir
    assert adapted.model.bare == base.model
    assert (adapted.data.modality, adapted.objective, adapted.eval) == (
        base.data.modality,
        base.objective,
        base.eval,
    )
    assert adapted.data.input_size_min == base.data.input_size == base.model.encoder.input_size_enc
    assert (
        adapted.eval.sizes[0] == base.data.input_size < adapted.data.input_size_max == adapted.eval.sizes[-1]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The runs of the recipes, trained by the command line and measured at its end: base, adapted, longer."""
    folder = tmp_path_factory.mktemp("multires")
    threads, start = torch.get_num_threads(), ["run.threads=1", f"model.full_ckpt={folder / 'base'}"]
    plans = {"base": (BASE, start[:1]), "adapted": (ADAPTED, start), "longer": (ADAPTED, [*start, *ONE_SIZE])}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            for name, (recipe, overrides) in plans.items():
                assert main(["train", recipe, f"run.dir={folder / name}", *overrides]) == 0
        finally:
            torch.set_num_threads(threads)
    return folder


def psnr(run: Path, size: tuple[int, ...]) -> float:
    """What the evaluation at the end of a run measured at a size."""
    name = f"eval@{'x'.join(map(str, size))}/metric/psnr"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (figure,) = [line[name] for line in lines if name in line]
    return figure


@pytest.mark.slow
def test_adapted_beats_unadapted_where_the_base_run_was_not_trained(runs):
    """By a margin, even when the base run goes on for as many steps; nothing is lost at the size it came from."""
    for other in ("base", "longer"):
        assert psnr(runs / "adapted", LARGE) > psnr(runs / other, LARGE) + 0.3
        assert psnr(runs / "adapted", OBLONG) > psnr(runs / other, OBLONG) + 0.25
        assert psnr(runs / "adapted", SMALL) > psnr(runs / other, SMALL) - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("size", [SMALL, OBLONG, LARGE], ids=str)
def test_an_adapted_tokenizer_turns_files_into_codes_and_back_at_every_size(runs, tmp_path, size):
    """The command line makes the codes and pictures that the tokenizer makes in memory, as good as measured."""
    run, tokens, rebuilt = str(runs / "adapted"), tmp_path / "tokens", tmp_path / "rebuilt"
    assert main(["tokenize", run, str(HELD_OUT), str(tokens), "--size", "x".join(map(str, size))]) == 0
    found = Tokenizer.load(run).load_tokens(tokens)
    assert main(["decode", run, str(tokens), str(rebuilt)]) == 0
    tokenizer, errors = Tokenizer.load(run), []
    for path in sorted(HELD_OUT.glob("*.jpg")):
        x = tokenizer.read(path, size)
        codes = tokenizer.encode(x)
        assert codes.shape == (1, size[0] // 8, size[1] // 8, 1)
        assert np.array_equal(found[path.stem], codes[0].numpy())
        x_hat = tokenizer.decode(codes)
        assert x_hat.shape == x.shape == (1, 3, *size)
        picture = np.asarray(Image.open(rebuilt / f"{path.stem}.png"))
        assert np.abs(picture.astype(int) - np.asarray(tokenizer.show(x_hat))).max() <= 1
        errors.append(float((x_hat.clamp(-1, 1) - x).square().mean()))
    assert len(errors) == 7
    assert np.mean([10 * np.log10(4 / error) for error in errors]) == pytest.approx(
        psnr(runs / "adapted", size), abs=0.02
    )
