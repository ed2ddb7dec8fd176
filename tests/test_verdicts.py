"""Verdicts on a tokenizer: codes that say only where they are, few tokens, and whether a baseline is as good."""

import itertools
import math

import numpy as np
import pytest
import torch
from toys import run_config, toy  # noqa: F401

from vqcore.cli import main
from vqcore.evaluate import collisions
from vqcore.evaluate.collisions import NAMES, Collisions
from vqcore.evaluate.usage import CodeWindow, reachable
from vqcore.evaluate.verdict import verdicts
from vqcore.trainer import train

HERE, ANYWHERE = NAMES


def told(codes: torch.Tensor, size: int) -> dict[str, float]:
    """What the codes of some samples say, added in two batches."""
    counted = Collisions(size, codes.shape[-1])
    for part in codes.split(max(1, len(codes) // 2)):
        counted.add(part)
    return counted.metrics()


class TestCollisions:
    def test_the_chances_are_those_of_pairs_of_different_samples(self):
        codes = torch.randint(5, (7, 2, 3, 1), generator=torch.Generator().manual_seed(0))
        flat = codes.reshape(7, 6)
        pairs = list(itertools.permutations(range(7), 2))
        here = sum(float((flat[a] == flat[b]).float().mean()) for a, b in pairs) / len(pairs)
        anywhere = sum(float((flat[a][:, None] == flat[b]).float().mean()) for a, b in pairs) / len(pairs)
        expected = {HERE: -math.log2(here), ANYWHERE: -math.log2(anywhere)}
        assert told(codes, 5) == pytest.approx(expected, abs=1e-6)

    def test_codes_that_say_only_where_they_are(self):
        codes = torch.arange(256).reshape(1, 256, 1).expand(20, 256, 1)
        assert told(codes, 256) == pytest.approx({HERE: 0.0, ANYWHERE: 8.0}, abs=1e-6)

    def test_codes_that_know_nothing_of_their_place(self):
        codes = torch.randint(64, (200, 16, 1), generator=torch.Generator().manual_seed(1))
        assert told(codes, 64) == pytest.approx({HERE: 6.0, ANYWHERE: 6.0}, abs=0.05)

    def test_the_estimate_has_no_bias_for_few_samples(self):
        rng = torch.Generator().manual_seed(2)
        chances = [2 ** -told(torch.randint(8, (3, 64, 1), generator=rng), 8)[HERE] for _ in range(200)]
        assert sum(chances) / len(chances) == pytest.approx(1 / 8, rel=0.03)

    def test_codebooks_are_averaged(self):
        rng = torch.Generator().manual_seed(3)
        free = torch.randint(16, (300, 16, 1), generator=rng)
        fixed = torch.zeros(300, 16, 1, dtype=torch.int64)
        assert told(torch.cat([free, fixed], -1), 16)[HERE] == pytest.approx(2.0, abs=0.05)

    def test_counters_that_codes_share_change_little(self, monkeypatch):
        codes = torch.randint(40_000, (60, 16, 1), generator=torch.Generator().manual_seed(4)) // 100
        exact = told(codes, 40_000)
        monkeypatch.setattr(collisions, "CELLS", 16 * 2048)
        assert told(codes, 40_000) == pytest.approx(exact, abs=0.3)

    def test_a_long_grid_is_looked_at_in_places(self, monkeypatch):
        codes = torch.randint(4, (50, 300, 1), generator=torch.Generator().manual_seed(5))
        exact = told(codes, 4)
        monkeypatch.setattr(collisions, "POSITIONS", 100)
        assert told(codes, 4) == pytest.approx(exact, abs=0.02)

    def test_codes_that_are_not_valid_make_no_pairs(self):
        rng = torch.Generator().manual_seed(6)
        codes = torch.randint(3, (7, 5, 1), generator=rng)
        valid = torch.rand(7, 5, generator=rng) < 0.6
        counted = Collisions(3, 1)
        for part in (slice(3), slice(3, 7)):
            counted.add(codes[part], valid[part])
        flat = codes.squeeze(-1)
        places = list(itertools.product(range(7), range(5)))
        pairs = [
            (p == q, bool(flat[a, p] == flat[b, q]))
            for (a, p), (b, q) in itertools.product(places, places)
            if a != b and valid[a, p] and valid[b, q]
        ]
        here = [equal for at_one, equal in pairs if at_one]
        expected = {HERE: sum(here) / len(here), ANYWHERE: sum(equal for _, equal in pairs) / len(pairs)}
        assert counted.metrics() == pytest.approx({k: -math.log2(v) for k, v in expected.items()}, abs=1e-6)

    @pytest.mark.parametrize("shape", [(1, 16, 1), (9, 1, 1)])
    def test_one_sample_or_one_position_says_nothing(self, shape):
        assert told(torch.zeros(shape, dtype=torch.int64), 4) == {}

    def test_no_equal_pair_is_a_bound(self):
        codes = torch.arange(2 * 8).reshape(2, 8, 1)
        assert told(codes, 16)[HERE] == pytest.approx(math.log2(8 * 2))


# ------------------------------------------------------------------------------------------------------ verdicts


def figures(error: float, **more: float) -> dict[str, float]:
    return {"error": error, "metric/psnr": -10 * math.log10(error / 4), **more}


class TestVerdicts:
    def test_a_good_tokenizer_gets_no_sentence(self):
        metrics = figures(0.1, **{HERE: 1.0, ANYWHERE: 8.0})  # codes may well follow places if they are good
        assert verdicts(metrics, {"constant": figures(1.0), "k-means": figures(0.13)}) == []

    def test_a_tokenizer_that_is_no_better_is_told_so_with_figures(self):
        (said,) = verdicts(figures(0.12), {"constant": figures(1.0), "k-means": figures(0.13)})
        assert "not clearly better than k-means on raw patches" in said and "92% of that of k-means" in said
        assert "(psnr 15.23, k-means 14.88)" in said and "optim.lr" in said

    @pytest.mark.parametrize(
        ("error", "here", "anywhere", "warns"),
        [(0.9, 1.0, 8.0, True), (0.9, 4.1, 8.0, False), (0.5, 1.0, 8.0, False), (0.9, None, None, False)],
    )
    def test_codes_that_say_only_where_they_are_are_named(self, error, here, anywhere, warns):
        places = {} if here is None else {HERE: here, ANYWHERE: anywhere}
        said = verdicts(figures(error, **places), {"constant": figures(1.0)})
        assert any("where they are" in sentence and "1.0 bits" in sentence for sentence in said) == warns

    def test_a_fitted_tokenizer_is_not_told_to_train(self):
        baselines = {"constant": figures(1.0), "k-means": figures(0.13)}
        assert verdicts(figures(0.12), baselines, fitted=True) == []
        flat = {"codes/perplexity": 1.0, "codes/perplexity_possible": 999.0}
        said = " ".join(verdicts(figures(0.9, **flat), baselines, fitted=True))
        assert "codebook_size" in said and "docs/fit.md" in said
        assert not any(word in said for word in ("rain", "optim", "learning", "docs/quantizers.md"))

    def test_a_baseline_without_error_is_no_division_by_zero(self):
        assert verdicts({"error": 0.0}, {"constant": {"error": 0.0}}) == []
        assert "no error" in verdicts({"error": 0.1}, {"constant": {"error": 0.0}})[0]


class TestReach:
    @pytest.mark.parametrize(("tokens", "size"), [(100, 4096), (1792, 4096), (5000, 64), (1, 5), (3, 1)])
    def test_it_is_what_even_draws_have(self, tokens, size):
        rng = torch.Generator().manual_seed(0)
        usage, entropy, tries = 0.0, 0.0, 200
        for _ in range(tries):
            counts = torch.randint(size, (tokens,), generator=rng).bincount().double()
            share = counts[counts > 0] / tokens
            usage += len(share) / size / tries
            entropy -= float((share * share.log()).sum()) / tries
        assert reachable(tokens, size) == pytest.approx((usage, math.exp(entropy)), rel=0.02)

    def test_large_numbers_take_no_memory(self):
        usage, perplexity = reachable(10**13, 2**18)
        assert usage == 1.0 and perplexity == pytest.approx(2**18, rel=1e-3)


# ----------------------------------------------------------------------------------------------- a run, end to end


@pytest.mark.usefixtures("toy")
class TestTrained:
    def test_codes_that_follow_a_large_offset_warn(self, tmp_path, capsys, caplog):
        """Each position has its own large value, and what differs between samples is small."""
        rng = np.random.default_rng(0)
        places = np.linspace(-0.9, 0.9, 64).reshape(1, 1, 8, 8)
        np.save(tmp_path / "x.npy", (places + rng.normal(0, 0.005, (40, 2, 8, 8))).astype(np.float32))
        tree = run_config(
            tmp_path / "run",
            data__name="array",
            data__path=str(tmp_path / "x.npy"),
            data__eval_path=str(tmp_path / "x.npy"),
            optim__lr=1e-6,
        )
        run = train(tree)
        # The toy tokenizer has learned nothing: its constant is better, but a mean over places is not.
        found = run.progress.evaluation
        assert found["eval/codes/bits_at_position"] < 0.5 * found["eval/codes/bits_anywhere"]
        said = capsys.readouterr().out
        assert "warning: the tokenizer is not clearly better than a constant" in said
        assert "warning: the codes say little but where they are" in said
        assert main(["eval", str(tmp_path / "run")]) == 0
        assert "the codes say little but where they are" in caplog.text

    def test_a_collapse_waits_for_the_end_of_the_warm_up(self, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(CodeWindow, "change", lambda self, metrics: calls.append(1))
        train(run_config(tmp_path / "run", optim__warmup=4))
        assert len(calls) == 2  # after steps 5 and 6
