"""`python -m vqcore` is `vqcore`; it is what torchrun starts."""

from vqcore.cli import main

raise SystemExit(main())
