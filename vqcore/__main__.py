"""The start of the process `vqcore`: also `python -m vqcore`, which is what torchrun starts."""

from vqcore.streams import close_streams, leave_on_interrupt, open_streams


def start() -> int:
    """Run the command of this process and return its exit status."""
    leave_on_interrupt()
    open_streams()
    from vqcore.cli import main

    return close_streams(main())


if __name__ == "__main__":
    raise SystemExit(start())
