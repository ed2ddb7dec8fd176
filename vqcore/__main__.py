"""The start of the process `vqcore`: also `python -m vqcore`, which is what torchrun starts. Not for import."""

from vqcore import interrupts

interrupts.leave_on_signals()  # before the next import, so that there is no moment in which Ctrl-C is a traceback

from vqcore.streams import close_streams, open_streams  # noqa: E402


def start() -> int:
    """Run the command of this process and return its exit status."""
    open_streams()
    from vqcore.cli import main

    return close_streams(main())


if __name__ == "__main__":
    raise SystemExit(start())
