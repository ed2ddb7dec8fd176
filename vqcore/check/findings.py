"""What a check finds: an error, a warning or a note."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vqcore import dist
from vqcore.errors import ConfigError

log = logging.getLogger(__name__)
Grade = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One finding: its grade, where (a key of the config or a file), what is wrong, and what to do."""

    grade: Grade
    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        end = "" if not self.remedy or self.what.endswith((".", "?", "!")) else "."
        return f"{self.where}: {self.what}{end} {self.remedy}".rstrip()


def settle(findings: Iterable[Finding]) -> None:
    """Log every warning, then raise `ConfigError` for the first error, if there is one."""
    findings = list(findings)
    for finding in findings:
        if finding.grade == "warning" and dist.is_main():
            log.warning("warning: %s", finding)
    errors = [finding for finding in findings if finding.grade == "error"]
    if errors:
        more = f" ({len(errors) - 1} more: vqcore check shows all.)" if len(errors) > 1 else ""
        raise ConfigError(f"{errors[0]}{more}")
