"""The command line: parses, then imports the verb's module. Light layer: `--help` imports no torch, no omegaconf."""

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from vqcore import __version__
from vqcore.errors import VqcoreError
from vqcore.registry import Registry, registry

OVERRIDE_HELP = "settings that win over the file, e.g. run.steps=100 model.quantizer.codebook_size=1024"
RUN_HELP = "a run folder (best checkpoint, else the last), a checkpoint, an exported tokenizer, or user/name on the hub"


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, an example that works, and its arguments."""

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or recipe:NAME (vqcore config --list)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDE_HELP)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help=RUN_HELP)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="e.g. data.eval_path=my/photos eval.sizes=[128,256]",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar="RUN",
        help="set two side by side: runs that were measured, files of --json, exported tokenizers (measured now)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="where figures and contact sheet go (default: eval.json and samples/eval.png in the run's folder)",
    )
    _weights(parser, "both")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run folder, finished or not")
    parser.add_argument(
        "--samples", type=_count, default=512, help="evaluation samples to look through (default 512)"
    )


def _tokenize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument("input", help="a folder (searched at any depth) or one file")
    parser.add_argument("output", help="folder for the codes: one .npy per sample, and tokens.json")
    parser.add_argument("--size", help="size to tokenize at, e.g. 256 or 256x192 (default: the nominal size)")
    _batches(parser)


def _decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument("tokens", help="a folder that `vqcore tokenize` wrote, or one .npy file of codes")
    parser.add_argument("output", help="folder for what is decoded")
    parser.add_argument(
        "--force", action="store_true", help="decode tokens of another tokenizer all the same"
    )
    _batches(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument("folder", help="folder to make: weights, config, provenance and model card")
    _weights(parser)
    parser.add_argument("--push", metavar="USER/NAME", help="upload it to the Hugging Face hub as well")
    parser.add_argument("--private", action="store_true", help="with --push: make the repository private")
    parser.add_argument(
        "--format", metavar="NAME", help="RUN is made by another system, e.g. fourm/checkpoint"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="with --format: read tensors and plain data out of a pickle",
    )


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a YAML file, or recipe:NAME")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDE_HELP)
    parser.add_argument("--origin", action="store_true", help="say beside each value which layer gave it")
    parser.add_argument("--list", action="store_true", help="list the recipes that are installed")


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or recipe:NAME (vqcore config --list)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDE_HELP)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", help="only these plugins")
    parser.add_argument(
        "--check", action="store_true", help="import every target and run the cheap conformance checks"
    )


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", help="a component, e.g. vit/encoder or rgb, or a section of a config, e.g. optim"
    )


def _weights(parser: argparse.ArgumentParser, *more: str) -> None:
    parser.add_argument(
        "--weights",
        choices=("auto", "model", "ema", *more),
        default="auto",
        help=f"the trained weights, their running average, {'both, ' if more else ''}"
        "or (auto) the average where there is one",
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _batches(parser: argparse.ArgumentParser) -> None:
    _weights(parser)
    parser.add_argument("--batch-size", type=_count, default=16, help="samples at once (default 16)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument(
        "--overwrite", action="store_true", help="write files that exist again instead of skipping them"
    )


VERBS = {
    "train": Verb(
        "train a tokenizer, or go on with a run that was interrupted",
        "vqcore train cfgs/quickstart.yaml run.dir=runs/mine data.path=~/Pictures",
        _train,
    ),
    "eval": Verb("measure a tokenizer", "vqcore eval runs/quickstart data.eval_path=~/Pictures", _eval),
    "report": Verb("write one page about a run, for a browser", "vqcore report runs/quickstart", _report),
    "tokenize": Verb(
        "turn files into codes", "vqcore tokenize runs/quickstart ~/Pictures tokens/pictures", _tokenize
    ),
    "decode": Verb(
        "turn codes back into files", "vqcore decode runs/quickstart tokens/pictures rebuilt", _decode
    ),
    "export": Verb(
        "write a tokenizer that stands alone", "vqcore export runs/quickstart my-tokenizer", _export
    ),
    "check": Verb(
        "look for mistakes before training: settings, samples, shapes, memory",
        "vqcore check cfgs/quickstart.yaml data.path=~/Pictures",
        _check,
    ),
    "config": Verb(
        "check a config and print it whole", "vqcore config cfgs/quickstart.yaml --origin", _config
    ),
    "plugins": Verb("list what is installed", "vqcore plugins --check", _plugins),
    "show": Verb(
        "explain the settings of a component or of a section of a config", "vqcore show vit/encoder", _show
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 2 for what the user can mend, 1 for a bug of ours."""
    parser = _parser()
    try:
        args, rest = parser.parse_known_args(argv)
        if rest and (any(word.startswith("-") for word in rest) or not hasattr(args, "overrides")):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except SystemExit as ended:  # --help, --version, or a wrong command line that argparse has explained
        return int(ended.code or 0)
    if not args.verb:
        parser.print_help()
        return 0
    if rest:
        args.overrides += rest  # overrides that stood behind an option
    # Threads that wait spin against other work on a busy machine, and sleep through the next small operation if they
    # never spin: let them spin for a moment. Must be set before torch loads; docs/decisions/0003 has the measurement.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.plugin:
            registry().add_file(args.plugin)
        return importlib.import_module(f"vqcore.commands.{args.verb}").run(args)
    except VqcoreError as error:
        if args.debug:
            traceback.print_exc()
        if not error.elsewhere:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved is complete.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        sys.stderr.close()
        return 141
    except Exception as error:
        traceback.print_exc()
        whose = culprit(error)
        print(f"this is a bug of {whose}; please report it with the lines above.", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--plugin", metavar="FILE", help="a Python file with a manifest; its names are local/..."
    )
    common.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser = argparse.ArgumentParser(
        prog="vqcore",
        description="Learned discrete tokenizers for any modality: train, measure, use, ship.",
        epilog="vqcore VERB --help explains a verb and gives an example.",
    )
    parser.add_argument("--version", action="version", version=f"vqcore {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.summary,
            description=verb.summary[0].upper() + verb.summary[1:] + ".",
            epilog=f"example: {verb.example}",
            parents=[common],
        )
        verb.arguments(sub)
    return parser


def culprit(error: BaseException, catalogue: Registry | None = None) -> str:
    """The component and the distribution that raised an error, or `vqcore or a plugin` where that cannot be told.

    The innermost frame that is vqcore's or a plugin's decides: libraries fail because of what they are given.
    """
    catalogue = catalogue or registry()
    packages = {
        origin.module.partition(".")[0]: id for id, origins in catalogue.ids().items() for origin in origins
    }
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = [(frame, id) for frame in reversed(frames) if (id := packages.get(_package(frame)))]
    if not known or known[0][1] == "core":
        return "vqcore or a plugin"
    id = known[0][1]
    origin = catalogue.origin(id)
    names = (_component(frame, id, catalogue) for frame, owner in known if owner == id)
    name = next(filter(None, names), f"plugin '{id}'")
    return f"{name}, which comes from {origin}"


def _component(frame: FrameType, id: str, catalogue: Registry) -> str:
    """The full name of the component whose method a frame is."""
    try:
        targets = {found.target: found.name for found in catalogue.plugin(id).components}
    except VqcoreError:  # it is the manifest that failed
        return ""
    cls = type(frame.f_locals.get("self"))
    name = targets.get(f"{cls.__module__}:{cls.__name__}") or targets.get(f":{cls.__name__}")
    return f"{id}/{name}" if name else ""


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
