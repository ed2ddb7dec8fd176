"""The tokenizer in Python: what `read`, `encode` and `decode` take, and a generator trained from a token folder."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import run_config, tokenizer_of, toy  # noqa: F401

from vqcore.errors import DataError
from vqcore.tokens.passes import tokenize_folder
from vqcore.tokens.sharded import tokenize_shards

pytestmark = pytest.mark.usefixtures("toy")
PAGE = Path(__file__).parents[1] / "docs" / "train-on-tokens.md"


@pytest.fixture
def tokenizer():
    return tokenizer_of(run_config("unused", data__modality={"name": "rgb"}, data__input_size=[8, 8])).eval()


def photo(seed=0, sides=(12, 8)):
    levels = np.random.default_rng(seed).integers(0, 256, (*sides, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def test_encode_takes_what_read_takes(tokenizer, tmp_path):
    photo().save(tmp_path / "a.png")
    expected = tokenizer.encode(tokenizer.read(photo()))
    for source in (photo(), tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(photo())):
        assert torch.equal(tokenizer.encode(source), expected)


def test_the_size_of_read_may_be_one_number(tokenizer):
    assert tokenizer.read(photo(), size=16).shape == (1, 3, 16, 16)
    assert tokenizer.read(photo(), size=(8, 16)).shape == (1, 3, 8, 16)
    with pytest.raises(ValueError, match="has 3 axes, but samples have 2"):
        tokenizer.read(photo(), size=(8, 8, 8))


def test_decode_takes_what_tokenize_wrote(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    photo().save(tmp_path / "in/a.png")
    tokenize_folder(tokenizer, tmp_path / "in", tmp_path / "tok", size=(8, 8))
    stored = np.load(tmp_path / "tok/a.npy")
    expected = tokenizer.reconstruct(tokenizer.read(photo()))
    assert stored.dtype == np.uint8 and stored.shape == (2, 2, 1)
    for codes in (stored, stored[None], stored.astype(np.uint16), torch.from_numpy(stored)):
        assert torch.equal(tokenizer.decode(codes), expected)


def test_one_sample_of_another_size_needs_the_size_or_the_axis(tokenizer):
    codes = tokenizer.encode(tokenizer.read(photo(), size=16))[0]
    with pytest.raises(ValueError, match=r"integers \(b, grid0, grid1, 1\), not torch.int64 \(4, 4, 1\)"):
        tokenizer.decode(codes)
    assert (
        tokenizer.decode(codes[None]).shape == tokenizer.decode(codes, size=(16, 16)).shape == (1, 3, 16, 16)
    )


def test_an_input_without_a_batch_is_told_how_to_get_one(tokenizer):
    with pytest.raises(
        ValueError, match=r"\(b, 3, size0, size1\), not \(3, 8, 8\); a batch of one sample is x\[None\]"
    ):
        tokenizer.encode(tokenizer.read(photo())[0])


class TestTokenFiles:
    def test_they_are_a_mapping_by_key(self, tokenizer, tmp_path):
        for name in ("a", "b/c"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            photo(len(name)).save(tmp_path / "in" / f"{name}.png")
        tokenize_folder(tokenizer, tmp_path / "in", tmp_path / "tok", size=(8, 8))
        found = tokenizer.load_tokens(tmp_path / "tok")
        assert list(found) == ["a", "b/c"] and len(found) == 2 and "b" not in found
        assert found["a"].dtype == np.int64
        assert torch.equal(torch.from_numpy(found["a"])[None], tokenizer.encode(photo(1)))
        with pytest.raises(KeyError, match="Did you mean 'b/c'"):
            found["b/x"]

    def test_those_of_another_tokenizer_are_refused(self, tokenizer, tmp_path):
        (tmp_path / "in").mkdir()
        photo().save(tmp_path / "in/a.png")
        tokenize_folder(tokenizer, tmp_path / "in", tmp_path / "tok", size=(8, 8))
        config = run_config("unused", data__modality={"name": "rgb"}, data__input_size=[8, 8])
        other = tokenizer_of(config)
        with torch.no_grad():
            other.proj.weight += 1
        with pytest.raises(
            DataError, match=r"made by another tokenizer: .* Load the tokenizer that made them"
        ):
            other.load_tokens(tmp_path / "tok")


def test_the_page_about_training_on_tokens_runs(tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(12):
        photo(number).save(tmp_path / f"photos/{number}.png")
    tokenizer.save(tmp_path / "my-tokenizer")
    tokenize_shards(tokenizer, tmp_path / "photos", tmp_path / "tokens", size=(8, 8))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    code = "\n".join(blocks).replace("range(2000)", "range(20)")
    exec(compile(code, str(PAGE), "exec"), {})
    losses = [
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")
    ]
    assert len(losses) == 2 and losses[-1] < losses[0]
    with Image.open(tmp_path / "new.png") as made:
        assert made.size == (8, 8)
