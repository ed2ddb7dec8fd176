"""`vqcore plugins`: list every plugin with origin, status and components. Imports manifests only, unless --check."""

import argparse

from vqcore.errors import UnknownName, did_you_mean, listed
from vqcore.registry import Registry, Status, registry
from vqcore.streams import put


def run(args: argparse.Namespace) -> int:
    """Print the catalogue. Status 2 if --check finds a problem."""
    listings = registry().catalogue()
    known = [listing.id for listing in listings]
    for id in args.ids:
        if id not in known:
            raise UnknownName(f"no plugin '{id}'.{did_you_mean(id, known)} Installed: {listed(known)}.")
    problems = 0
    for listing in listings:
        if args.ids and listing.id not in args.ids:
            continue
        problems += _print(listing)
        if args.check and listing.plugin:
            problems += _check(registry(), listing)
    return 2 if args.check and problems else 0


def _print(listing: Status) -> int:
    origins = ", ".join(str(origin) for origin in listing.origins)
    put(f"{listing.id:10} {origins:24} {'ok' if listing.plugin else 'unusable'}")
    if not listing.plugin:
        put(f"           {listing.problem}")
        return 1
    put(f"           {listing.plugin.summary}")
    for component in listing.plugin.components:
        name = component.name if listing.id == "core" else f"{listing.id}/{component.name}"
        put(f"           {component.kind:14} {name:22} {component.summary}")
    return 0


def _check(catalogue: Registry, listing: Status) -> int:
    from vqcore.testing.checks import check_plugin, plugin_warnings

    failures = check_plugin(catalogue, listing.id)
    for warning in plugin_warnings(catalogue, listing.id):
        put(f"           WARNING {warning}")
    for failure in failures:
        put(f"           FAILED {failure}")
    if not failures:
        put("           checked: manifest, targets, settings and protocols")
    return len(failures)
