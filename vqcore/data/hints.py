"""Which installed component reads a file, for the errors that need it."""

from collections.abc import Sequence

from vqcore.errors import VqcoreError, listed
from vqcore.registry import registry


def readers_of(suffixes: Sequence[str]) -> str:
    """Sentences that say which components read files of these suffixes, and what to do about the others."""
    known: dict[str, list[str]] = {}
    for kind in ("modality", "reader"):
        for found in registry().components(kind):
            try:
                cls = registry().load(kind, found.name)
            except VqcoreError:
                continue
            for suffix in getattr(cls, "suffixes", ()):
                word = (
                    f"{found.name} (modality)"
                    if kind == "modality"
                    else f"array with the reader {found.name}"
                )
                known.setdefault(suffix, []).append(word)
    sources = {".tar": "tar", ".parquet": "parquet"}
    rows = [f"Samples in {suffix}: data.name={sources[suffix]}." for suffix in suffixes if suffix in sources]
    texts = rows + [
        f"{suffix} is read by {listed(known[suffix], 6)}." for suffix in suffixes if suffix in known
    ]
    strange = [
        each for each in suffixes if each.startswith(".") and each not in known and each not in sources
    ]
    if strange:
        texts.append(
            f"Nothing here reads {listed(strange, 6)}: a plugin can add a reader, or write one .npy file for each "
            "sample, of shape (channels, *size), or (*size, channels) with data.modality.channels_last=true."
        )
    return " ".join(texts)
