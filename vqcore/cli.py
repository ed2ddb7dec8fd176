"""The command line: parses the arguments, then imports the verb's module. Light layer: `--help` imports no torch and
no omegaconf.
"""

import argparse
import importlib
import keyword
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from vqcore import __version__, network
from vqcore.errors import VqcoreError, cause, no_memory, printable
from vqcore.interrupts import INTERRUPTED, interruptible, status_of
from vqcore.registry import Registry, registry
from vqcore.streams import put

OVERRIDE_HELP = (
    "settings that replace those of the file, e.g. run.steps=100 model.quantizer.codebook_size=1024"
)
RUN_HELP = (
    "a run folder (its last checkpoint, or the best by eval.best), RUN@step_N, an exported tokenizer, "
    "hf://user/name on the hub, or files of another system: FORMAT:PATH"
)


@dataclass(frozen=True)
class Verb:
    """One verb: a summary, an example command, and the arguments."""

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or recipe:NAME (vqcore config --list)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDE_HELP)
    _borrowing(parser)
    _pickles(parser)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help=RUN_HELP)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="settings of the evaluation, e.g. data.eval_path=my/photos eval.sizes=[128,256]",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar="RUN",
        help="compare two: evaluated runs, files of --json, or exported tokenizers (evaluated now)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="file for the metrics; the contact sheet is written beside it as .png (default: eval.json and "
        "samples/eval.png in the run's folder)",
    )
    _weights(parser, "both")
    _borrowing(parser)
    _pickles(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run folder, finished or not")
    parser.add_argument(
        "--samples",
        type=_count,
        default=512,
        metavar="N",
        help="number of held-out samples to look at (default 512)",
    )
    _borrowing(parser)
    _pickles(parser)


def _tokenize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument(
        "input",
        help="a folder (searched at any depth), one file, tar shards (shards/{000..099}.tar), or a data source: "
        "NAME[key=value]:PATH",
    )
    parser.add_argument(
        "output", help="folder for the codes: shards, or a file for each file, and tokens.json"
    )
    parser.add_argument(
        "--store",
        default="arrow",
        help="layout of the codes: arrow (default), parquet, tar (as WebDataset), folder (a .npy for each file), or "
        "that of a plugin",
    )
    parser.add_argument(
        "--shard-size",
        type=_count,
        help="samples in one shard, which is done or not done (default 4096, or the shards of the source)",
    )
    parser.add_argument(
        "--only", metavar="FILE", help="do the shards again that hold the keys in FILE, e.g. failed.txt"
    )
    parser.add_argument(
        "--workers",
        type=_number,
        default=1,
        metavar="N",
        help="threads that read files ahead (default 1; 0: none)",
    )
    parser.add_argument(
        "--size", help="size to tokenize at, e.g. 256 or 256x192 (default: the tokenizer's own)"
    )
    parser.add_argument(
        "--stride",
        help="positions from one window of a record to the next, e.g. 512 (default: the window, without overlap)",
    )
    parser.add_argument(
        "--tiles", action="store_true", help="cover all of a picture with tiles; do not crop it"
    )
    parser.add_argument(
        "--crops",
        type=_count,
        metavar="N",
        help="crops of each sample: the centre, then N - 1 that are drawn and mirrored as in training",
    )
    parser.add_argument(
        "--views",
        metavar="STORE",
        help="take the crops that the rows of this store have, by key; of LAYOUT:FOLDER those that another system has "
        "chosen, e.g. fourm/tokens:data/train/rgb_dvae_BUa_224",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="with --crops: another seed, other crops (default 0)"
    )
    parser.add_argument(
        "--masks",
        metavar="MASKS",
        help="a folder of masks with the names of the files; with settings: 'mask[mask_value=-1,threshold=254]:MASKS'",
    )
    parser.add_argument(
        "--also",
        nargs="+",
        action="append",
        default=[],
        metavar=("RUN OUT", "key=value"),
        help="a further tokenizer for the same files in the same pass, and its output; then settings: size=, store=, "
        "batch_size=, borrow=",
    )
    parser.add_argument(
        "--engine",
        choices=("process", "ray"),
        default="process",
        help="process: this one, or those of torchrun and Slurm (default); ray: shards as tasks of a Ray cluster",
    )
    _batches(parser)
    _borrowing(parser)


def _decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument(
        "tokens",
        help="a store that `vqcore tokenize` wrote, one .npy or .npz of codes, or codes of another system: "
        "LAYOUT:FOLDER, e.g. fourm/tokens:data/train/rgb_dvae_BUa_224",
    )
    parser.add_argument("output", help="folder for the decoded files")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="option=value",
        help="sampling options of the tokenizer's objective, e.g. steps=25; `vqcore show OBJECTIVE` lists them",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="for decoders that draw noise: another seed, other noise (default 0)",
    )
    parser.add_argument(
        "--size",
        help="diffusion decoders: size of the samples, e.g. 256 or 256x192 (default: as the codes were made); "
        "LAYOUT:FOLDER: the size at which the codes were made (default: the nominal size)",
    )
    parser.add_argument("--force", action="store_true", help="decode tokens of another tokenizer too")
    _batches(parser)
    _borrowing(parser)


def _tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("convert", "verify", "stats"),
        help="convert: copy a store into another layout; verify: checksums, ranges, and whether several stores have "
        "the same keys; stats: use of the codebook",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        help="stores of codes; for convert: a store, or LAYOUT:FOLDER with codes of another system, and a new folder",
    )
    parser.add_argument(
        "--store", help="convert: the new layout: arrow (default), parquet, tar, folder, or that of a plugin"
    )
    parser.add_argument(
        "--tokenizer", metavar="RUN", help="convert from LAYOUT:FOLDER: the tokenizer that made the codes"
    )
    parser.add_argument("--size", help="convert: the size at which RUN made them (default: its own)")
    parser.add_argument("--json", action="store_true", help="stats: print all numbers as JSON")
    parser.add_argument("--html", metavar="FILE", help="stats: also write a page for the browser")
    parser.add_argument(
        "--sheet",
        metavar="FILE.png",
        help="verify: decode some rows into a picture, the same keys of each store (with --decode or --source alone: "
        "STORE.png)",
    )
    parser.add_argument(
        "--decode",
        action="append",
        default=[],
        metavar="RUN",
        help="verify: as --sheet, with this tokenizer; repeat it for several stores (default: those that tokens.json "
        "names)",
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="FOLDER",
        help="verify: as --sheet, with the files of a store above; repeat it in the order of the stores",
    )
    _weights(parser)
    _pickles(parser)
    _borrowing(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument("folder", help="new folder for weights, config, provenance and model card")
    _weights(parser)
    parser.add_argument(
        "--push", metavar="USER/NAME", help="also upload the tokenizer to the Hugging Face hub"
    )
    parser.add_argument("--private", action="store_true", help="with --push: make the repository private")
    parser.add_argument(
        "--format", metavar="NAME", help="write the files of another system, e.g. fourm/checkpoint"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="with --format: settings of the format"
    )
    _borrowing(parser)
    _pickles(parser)


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", nargs="?", help="the format that reads, e.g. fourm/checkpoint")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="SOURCE FOLDER key=value",
        help="a path or hf://user/name; a new folder, or FILE.yaml for a training config; settings of the format",
    )
    parser.add_argument(
        "--list", action="store_true", help="list published weights that a format, or each format, reads"
    )
    _borrowing(parser)
    _pickles(parser)


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a YAML file, or recipe:NAME (vqcore config --list)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDE_HELP)
    parser.add_argument("--origin", action="store_true", help="show for each value the layer that set it")
    parser.add_argument("--list", action="store_true", help="list the installed recipes")


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or recipe:NAME (vqcore config --list)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDE_HELP)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--values",
        action="store_true",
        help="only read training samples and print what each channel holds, and the scale to paste",
    )
    _borrowing(parser)
    _pickles(parser)


def _index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", help="a folder (searched at any depth), or tar shards: 'shards/{000..099}.tar'"
    )
    parser.add_argument(
        "--hash", action="store_true", help="hash every file that is new or has changed, and name copies"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write the list to a new Parquet file: path, bytes, time, hash"
    )


def _plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", help="only these plugins")
    parser.add_argument(
        "--check", action="store_true", help="import every component and run the quick conformance checks"
    )


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        help="a component, e.g. vit/encoder or rgb, or a section of a config, e.g. optim; without a name: all of them",
    )


def _new(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["config"], help="what to write: a config for files of your own")
    parser.add_argument("folder", nargs="?", help="the folder of your files")
    parser.add_argument(
        "--like",
        metavar="FAMILY",
        nargs="?",
        const="",
        help="a published tokenizer, e.g. fourm/rgb_ViTB-UNetP4_16k or terramind/DEM: its architecture, quantizer and "
        "schedule for your files; --like alone lists those that installed plugins know",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the config to write (default: the folder's name with .yaml)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="name=value",
        help="answers beforehand: modality, reader, kind, vector, channels_last or nodata, e.g. kind=continuous",
    )


def _text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("train", "encode", "decode", "inspect"),
        help="train CONFIG [key.path=value ...]: make a vocabulary from texts; encode TOKENIZER TEXTS STORE: write a "
        "store of ids; decode TOKENIZER STORE [FILE.jsonl]: turn ids back into texts; inspect TOKENIZER [TEXT ...]: "
        "show the vocabulary, and the pieces of texts",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="WORD",
        help="what the action takes. TOKENIZER is a folder that train wrote, or NAME:FILE, e.g. "
        "text/wordpiece:tokenizer.json; TEXTS is a file, a folder or a pattern: .txt, .jsonl, .json, .parquet or "
        ".tar, also with .gz",
    )
    parser.add_argument(
        "--field", metavar="NAME", help="encode: the member of JSON, or the column, that is the text"
    )
    parser.add_argument(
        "--key", metavar="NAME", help="encode: the member, or the column, that names the text"
    )
    parser.add_argument(
        "--length", type=_count, metavar="N", help="encode: ids of a row (default 256); a longer text is cut"
    )
    parser.add_argument("--store", help="encode: layout of the store: arrow (default), parquet or tar")


def _weights(parser: argparse.ArgumentParser, *more: str) -> None:
    parser.add_argument(
        "--weights",
        choices=("auto", "model", "ema", *more),
        default="auto",
        help=f"model: the trained weights; ema: their running average; {'both: measure both; ' if more else ''}"
        "auto (default): the running average if it exists, else the trained weights",
    )


def _pickles(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read tensors and plain data from pickles of other systems (.pth, .ckpt, ...)",
    )


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1; give at least 1")
    return number


def _borrowing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--borrow",
        action="append",
        default=[],
        metavar="KEY=PATH",
        help="where weights lie that a part borrows, e.g. decoder.base=weights/base.safetensors",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch published and borrowed weights that are not here from their hub",
    )


def _batches(parser: argparse.ArgumentParser) -> None:
    _weights(parser)
    _pickles(parser)
    parser.add_argument(
        "--batch-size", type=_count, default=16, metavar="N", help="samples in one batch (default 16)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if a GPU is available)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="bf16 and fp16 are faster on a GPU; a few results differ from those of fp32 (default fp32)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="overwrite existing files instead of skipping them"
    )


VERBS = {
    "train": Verb(
        "train a tokenizer, or resume an interrupted run",
        "vqcore train cfgs/quickstart.yaml run.dir=runs/mine data.path=~/Pictures",
        _train,
    ),
    "fit": Verb(
        "make a tokenizer that needs no training, in one pass over the data",
        "vqcore fit cfgs/fit/kmeans.yaml data.path=~/Pictures run.dir=runs/kmeans",
        _train,
    ),
    "eval": Verb("measure a tokenizer", "vqcore eval runs/quickstart data.eval_path=~/Pictures", _eval),
    "report": Verb("write an HTML page about a run", "vqcore report runs/quickstart", _report),
    "tokenize": Verb(
        "turn files into codes", "vqcore tokenize runs/quickstart ~/Pictures tokens/pictures", _tokenize
    ),
    "decode": Verb(
        "turn codes back into files",
        "vqcore decode runs/quickstart tokens/pictures rebuilt --seed 7",
        _decode,
    ),
    "tokens": Verb(
        "copy, check and count stores of codes", "vqcore tokens verify tokens/rgb tokens/depth", _tokens
    ),
    "export": Verb(
        "write a tokenizer without its run: weights, config and model card",
        "vqcore export runs/quickstart my-tokenizer",
        _export,
    ),
    "import": Verb(
        "read the files of another system: a tokenizer or a training config",
        "vqcore import fourm/checkpoint rgb.pth my-tokenizer --allow-pickle",
        _import,
    ),
    "text": Verb(
        "make, use and inspect text tokenizers",
        "vqcore text train cfgs/text/wordpiece-30k.yaml data.path='captions/*.txt.gz'",
        _text,
    ),
    "check": Verb(
        "look for mistakes before training: settings, samples, shapes, memory",
        "vqcore check cfgs/quickstart.yaml data.path=~/Pictures",
        _check,
    ),
    "config": Verb(
        "check a config and print all of its settings", "vqcore config cfgs/quickstart.yaml --origin", _config
    ),
    "index": Verb(
        "list the files of a folder once; later commands read again only what has changed",
        "vqcore index ~/Pictures --hash",
        _index,
    ),
    "new": Verb(
        "look at your files and write a config for them",
        "vqcore new config ~/my-data --out my-data.yaml",
        _new,
    ),
    "plugins": Verb("list the installed plugins and their components", "vqcore plugins --check", _plugins),
    "show": Verb(
        "explain the settings of a component or of a section of a config", "vqcore show vit/encoder", _show
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 2 for an error that the user can fix, or 1 for a bug."""
    debug = False
    try:
        args = _arguments(argv)
        debug = args.debug
        if args.plugin:
            registry().add_file(args.plugin)
        verb = importlib.import_module(f"vqcore.commands.{_module(args.verb)}")
        interruptible()
        with network.asking(getattr(args, "download", False)):
            return verb.run(args)
    except SystemExit as ended:  # --help, --version or a wrong command line: argparse has printed its message
        return int(ended.code or 0)
    except VqcoreError as error:
        return 2 if error.elsewhere else _refuse(str(error), debug)
    except KeyboardInterrupt as stop:
        put(INTERRUPTED, error=True)
        return status_of(stop)
    except BrokenPipeError:  # the program that reads the output has ended, e.g. `| head`
        return 141
    except Exception as error:
        if text := no_memory(error):
            return _refuse(f"{text}. Take a smaller model, smaller samples or smaller batches.", debug)
        if isinstance(error, OSError) and isinstance(error.filename, str) and not debug:
            # The system said no to this path: no permission, no room, vanished meanwhile.
            return _refuse(f"{error.filename}: {cause(error)}.")
        whose = culprit(error)
        put(f"{traceback.format_exc()}this is a bug of {whose}; report it with the lines above.", error=True)
        return 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command, for which this process is prepared. `SystemExit` if there is nothing to run."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not args.verb:
        parser.print_help()
        parser.exit()
    if rest:
        args.overrides += rest  # overrides that came after an option
    # A waiting OpenMP thread that spins takes CPU time from other work on a busy machine; a thread that never spins
    # wakes up too late for the next small operation. So threads spin for a short time. Must be set before torch loads;
    # docs/decisions/0003 has the measurement.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Log()])
    warnings.formatwarning = _warning_text
    return args


def _refuse(text: str, debug: bool = False) -> int:
    """Say in one line what the user can mend, with `debug` after its traceback; returns the exit status."""
    if debug:
        put(traceback.format_exc().rstrip(), error=True)
    put(f"error: {printable(text)}", error=True)
    return 2


def _module(verb: str) -> str:
    """The module of a verb; Python does not import a module whose name is a word of the language (`import`)."""
    return f"{verb}_" if keyword.iskeyword(verb) else verb


class _Log(logging.Handler):
    """Shows the messages of the log on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        put(self.format(record), error=True)


_python_text = warnings.formatwarning


def _warning_text(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """One plain line for a warning to users (a renamed component); Python's own text for all others."""
    if issubclass(category, FutureWarning):
        return f"warning: {printable(str(message))}\n"
    return printable(_python_text(message, category, *place, **more), keep="\n")


class _Parser(argparse.ArgumentParser):
    """Says everything through `put`, and a mistake in one line: a command line may hold anything."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            put(message.rstrip("\n"), error=file is not sys.stdout)


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    every = common.add_argument_group("options of every verb")
    every.add_argument(
        "--plugin", metavar="FILE", help="a Python file with a manifest; its components are named local/..."
    )
    every.add_argument("--debug", action="store_true", help="print the traceback of every error")
    parser = _Parser(
        prog="vqcore",
        description="Learned discrete tokenizers for any modality: train, measure, use, export.",
        epilog="vqcore VERB --help explains a verb and shows an example.",
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
    """The component and the distribution that raised an error, or `vqcore or a plugin` if the owner is not known.

    The innermost frame in vqcore or in a plugin decides: an error inside a library comes from the library's caller.
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
    """The full name of the component whose method runs in a frame, or an empty text."""
    try:
        targets = {found.target: found.name for found in catalogue.plugin(id).components}
    except VqcoreError:  # the manifest itself failed
        return ""
    cls = type(frame.f_locals.get("self"))
    name = targets.get(f"{cls.__module__}:{cls.__name__}") or targets.get(f":{cls.__name__}")
    return f"{id}/{name}" if name else ""


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
