"""docs/contracts.md: the suite makes the files of each section, runs its commands and checks its components' laws."""

import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqcore.check.checks import first_batch
from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.config import Config
from vqcore.protocols import Coded
from vqcore.registry import registry
from vqcore.run.state import build
from vqcore.schema import RunConfig, TextConfig
from vqcore.testing import checks
from vqcore.testing.basics import noise
from vqcore.tokenizer import Tokenizer

pytest.importorskip("vqcore_vit")
pytest.importorskip("vqcore_quant")
pytest.importorskip("vqcore_fit")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "contracts.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"# ([\w-]+\.\w+)(, continued)?\n")


@dataclass
class Section:
    """One section: its blocks in order, (language, text)."""

    title: str
    blocks: list[tuple[str, str]] = field(default_factory=list)


def read_page() -> list[Section]:
    parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    return [Section(part.partition("\n")[0], FENCE.findall(part)) for part in parts]


BEFORE, *SECTIONS = read_page()


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that are shown below it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *shown = part.splitlines()
        yield command, [line for line in shown if line.strip()]


def run(command: str) -> int:
    """The exit status of a command, which knows nothing of the commands before it."""
    registry.cache_clear()
    verb, *words = shlex.split(command)
    if verb == "vqcore":
        return main(words)
    assert verb == "python", command
    if words[0] == "-m":
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr("sys.argv", words[1:])
            patch.delitem(sys.modules, words[1], raising=False)  # runpy warns of a module that was imported
            runpy.run_module(words[1], run_name="__main__")
        return int(ended.value.code or 0)
    runpy.run_path(words[0], run_name="__main__")
    return 0


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder with `photos`, `heldout` and `base.yaml` is the working directory; the registry is fresh."""
    monkeypatch.chdir(tmp_path)
    for first, folder in enumerate(("photos", "heldout")):
        (tmp_path / folder).mkdir()
        for number in range(4):
            pixels = np.random.default_rng((first, number)).integers(0, 256, (5, 6, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((24, 20), Image.Resampling.BICUBIC)
            picture.save(f"{folder}/{number}.png")
    registry.cache_clear()
    write(BEFORE.blocks)
    yield tmp_path
    registry.cache_clear()


def write(blocks: list[tuple[str, str]]) -> None:
    for language, text in blocks:
        if language != "console":
            name, continued = NAME.match(text).groups()
            with Path(name).open("a" if continued else "w") as file:
                file.write(("\n\n" if continued else "") + text)


def follow(section: Section, capfd: Any) -> None:
    """Make the files of a section and run its commands; what the page shows must be printed, line by line."""
    write(section.blocks)
    for language, text in section.blocks:
        for command, shown in commands(text) if language == "console" else ():
            wanted = 2 if any(line.startswith("error:") for line in shown) else 0
            capfd.readouterr()
            found = run(command)
            said = capfd.readouterr()
            printed = said.out + said.err
            assert found == wanted, f"$ {command}\nends with {found}:\n{printed}"
            for line in shown:
                pattern = ".*".join(map(re.escape, line.split("...")))
                assert re.search(pattern, printed), f"$ {command}\n{line}\nis not in\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_the_examples_do_what_the_page_says(photos, capfd, section):
    follow(section, capfd)
    if Path("mine.py").exists():
        check_laws(section)


@pytest.mark.parametrize(
    ("console", "says"),
    [
        ("$ vqcore config base.yaml\nnot printed\n", "is not in"),
        ("$ vqcore config base.yaml\nerror: no\n", "ends with 0"),
        ("$ vqcore config nothing.yaml\n", "ends with 2"),
        ("$ ls\n", "ls"),
    ],
)
def test_a_page_that_is_wrong_fails(photos, capfd, console, says):
    with pytest.raises(AssertionError, match=says):
        follow(Section("wrong", [("console", console)]), capfd)


def test_every_section_is_listed_and_has_examples_that_are_run():
    page = PAGE.read_text()
    anchors = [re.sub(r"[^\w -]", "", one.title.lower()).replace(" ", "-") for one in SECTIONS]
    listed = re.findall(r"^\| \[(.+)\]\(#(.+?)\)", page, flags=re.MULTILINE)
    assert listed == [(one.title, anchor) for one, anchor in zip(SECTIONS, anchors)]
    for section in SECTIONS:
        languages = [language for language, _ in section.blocks]
        assert {"python", "yaml", "console"} <= set(languages) <= {"python", "yaml", "console", "text"}, (
            section
        )
        assert languages[-1] == "console"  # nothing stands below it that nobody runs
    assert page.count("```") == 2 * sum(len(one.blocks) for one in (BEFORE, *SECTIONS))


# The laws of the components


WAIVED = {"local/blocks": {"round-trip": "pictures go in, and numbers come out"}}


def check_laws(section: Section) -> None:
    """The laws of all components of `mine.py`, with the settings that the section's configs have."""
    registry().add_file("mine.py")
    files = [text for language, text in section.blocks if language == "yaml"]
    configs = [load(NAME.match(text)[1], schema=None).config for text in files]
    used = {cfg.name: (cfg, config) for config in configs for cfg in components(config)}
    for component in registry().plugin("local").components:
        kind, name = component.kind, f"local/{component.name}"
        checks.check_config(registry().load(kind, name))
        if kind == "format":
            checks.check_format(built(kind, name, prefix="a."), Path("box"), config=Path("old.box"))
        elif kind == "store":
            layout(built(kind, name))
        else:
            LAWS[kind](name, *used[name])


def layout(store: Any) -> None:
    manifest = {"grid": [2, 3], "num_codebooks": 1, "codebook_size": 300, "dtype": "uint16"}
    crops = [
        Coded(f"{key}#crop{n}", np.full((2, 3, 1), 10 * n), {"record": key, "crop": n})
        for key in "abc"
        for n in (0, 1)
    ]
    waived = {"missing": "the files that are there are the store"}
    checks.check_store(store, given=[(manifest, (crops[:2], crops[2:]))], waived=waived)


def text(name: str, cfg: Config, config: TextConfig) -> None:
    texts = ("a cat", "", "two hats")
    checks.check_learning(lambda file: made("text", replace(cfg, file=file)), texts)
    one = made("text", cfg)
    one.train(texts)
    checks.check_text(one, texts)


def components(config: Any) -> Iterator[Config]:
    """All settings of components in a config, at any depth."""
    if isinstance(config, Config):
        yield config
    if is_dataclass(config):
        for f in fields(config):
            yield from components(getattr(config, f.name))
    elif isinstance(config, Mapping):
        for value in config.values():
            yield from components(value)


def built(kind: str, name: str, **settings: Any) -> Any:
    return registry().build(kind, registry().load(kind, name).Config(name=name, **settings), name)


def made(kind: str, cfg: Config, seed: int = 0, **wiring: Any) -> Any:
    torch.manual_seed(seed)
    return registry().build(kind, cfg, cfg.name, **wiring)


def spec_of(config: RunConfig) -> Any:
    return made("modality", config.data.modality, size=config.data.input_size).spec


def encoder(name: str, cfg: Config, config: RunConfig) -> None:
    one, other = (made("encoder", cfg, seed, spec=spec_of(config)) for seed in (0, 1))
    checks.check_encoder(one, noise(3, 3, 16, 16), fresh=other)


def quantizer(name: str, cfg: Config, config: RunConfig) -> None:
    checks.check_quantizer(made("quantizer", cfg))


def decoder(name: str, cfg: Config, config: RunConfig) -> None:
    one, other = (made("decoder", cfg, seed, dim=3, spec=spec_of(config)) for seed in (0, 1))
    if name == "local/mixing":
        checks.check_denoiser(one, noise(3, 2, 2, 3), (3, 3, 16, 16), times=(0.1, 0.9), fresh=other)
        return
    checks.check_decoder(one, noise(3, 2, 2, 3), (3, 3, 16, 16), fresh=other)
    bare = replace(cfg, weights=None)
    checks.check_borrowed(
        lambda: made("decoder", bare, dim=3, spec=spec_of(config)), {"base": "base.safetensors"}
    )


def objective(name: str, cfg: Config, config: RunConfig) -> None:
    run = build(config, torch.device("cpu"))
    batch = replace(run.tokenizer.prepare(first_batch(run), run.extra), codes=None)  # all parts learn here
    fresh = Tokenizer(run.tokenizer.cfg)
    checks.check_objective(fresh.objective, fresh, batch)


def adversary(name: str, cfg: Config, config: RunConfig) -> None:
    one, other = (made("adversary", cfg, seed, spec=spec_of(config)) for seed in (0, 1))
    checks.check_adversary(one, noise(3, 3, 16, 16), noise(3, 3, 16, 16, seed=1), fresh=other)
    objective("reconstruction", config.objective, config)


def percept(name: str, cfg: Config, config: RunConfig) -> None:
    one = made("percept", cfg, spec=spec_of(config))
    checks.check_percept(one, noise(3, 3, 16, 16), noise(3, 3, 16, 16, seed=1))


def modality(name: str, cfg: Config, config: RunConfig) -> None:
    one = made("modality", cfg, size=config.data.input_size)
    checks.check_modality(one, Path("photos/0.png"), waived=WAIVED.get(name))


def data(name: str, cfg: Config, config: RunConfig) -> None:
    main = made("modality", cfg.modality, size=cfg.input_size)
    checks.check_data(made("data", cfg, split="train", modality=main, extra={}), main)


def metric(name: str, cfg: Config, config: RunConfig) -> None:
    spec = spec_of(config)
    checks.check_metric(made("metric", cfg, spec=spec), spec)


def scheduler(name: str, cfg: Config, config: RunConfig) -> None:
    checks.check_scheduler(made("scheduler", cfg))


LAWS = {
    "encoder": encoder,
    "quantizer": quantizer,
    "decoder": decoder,
    "objective": objective,
    "adversary": adversary,
    "percept": percept,
    "modality": modality,
    "data": data,
    "metric": metric,
    "scheduler": scheduler,
    "text": text,
}
