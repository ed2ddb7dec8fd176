"""Finds components by name and imports only what is named. Light layer.

The registry reads the entry points of installed distributions and imports nothing. Looking up `vit/encoder` imports the
manifest of the plugin `vit`; loading `vit/encoder` imports the class. So a broken or slow plugin has no effect on a run
that does not name the plugin. Two distributions with the same id are refused when the id is first used, so no plugin
can replace another silently. pluggy validates manifests; pluggy's own entry-point loader is not used, because it stops
at the first broken plugin and drops conflicts silently.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pluggy

from vqcore import __version__
from vqcore.config import Config
from vqcore.errors import (
    ConfigError,
    PluginApiError,
    PluginConflict,
    PluginLoadError,
    UnknownName,
    UnknownPlugin,
    VqcoreError,
    did_you_mean,
    first_line,
    listed,
    reason,
)
from vqcore.files import local
from vqcore.plugin import KINDS, SUPPORTED_API, Component, ManifestHooks, Plugin, a_kind, kind_name

OURS = {  # plugin id -> (distribution, folder); error messages tell people to install these distributions only
    id: (f"vqcore-{id}", f"plugins/vqcore_{id}")
    for id in (
        "vit",
        "quant",
        "vision",
        "audio",
        "synth",
        "track",
        "percept",
        "unet",
        "controlnet",
        "fourm",
        "terramind",
        "text",
        "fit",
    )
}
_RESERVED = ("core", "local")
_ID = re.compile(r"[a-z][a-z0-9]*")
_NAME = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Origin:
    """The distribution and manifest module of a plugin. `digest` is the SHA-256 of a `--plugin` file, else empty."""

    id: str
    distribution: str
    version: str
    module: str
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class Found:
    """A component with its full name, as used in configs, and its origin."""

    name: str
    component: Component
    origin: Origin


@dataclass(frozen=True)
class Status:
    """One plugin as `vqcore plugins` shows it: the plugin's record, or the reason why the plugin cannot be used."""

    id: str
    origins: tuple[Origin, ...]
    plugin: Plugin | None
    problem: str = ""


class Registry:
    """All installed components. Call `registry()` to get the registry of this process; tests create their own.

    `entry_points` defaults to the entry points of the group `vqcore`. `disabled` are names of distributions; by default
    the comma-separated names in the environment variable `VQCORE_DISABLED_PLUGINS`.
    """

    def __init__(
        self,
        entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
        disabled: Iterable[str] | None = None,
    ):
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group="vqcore")
        if disabled is None:
            disabled = os.environ.get("VQCORE_DISABLED_PLUGINS", "").split(",")
        off = {_canonical(name) for name in disabled if name.strip()}
        claims: dict[str, set[Origin]] = {}
        self._refused: list[Status] = []
        self._disabled: dict[str, Origin] = {}
        for origin in map(_origin, entry_points):
            if _canonical(origin.distribution) in off:
                self._disabled[origin.id] = origin
            elif problem := _bad_id(origin):
                self._refused.append(Status(origin.id, (origin,), None, problem))
            else:
                claims.setdefault(origin.id, set()).add(origin)
        core = Origin("core", "vqcore", __version__, "vqcore.builtin")
        self._origins = {"core": [core], **{id: _ranked(claims[id]) for id in sorted(claims)}}
        self._plugins: dict[str, Plugin] = {}
        self._files: dict[str, ModuleType] = {}

    def __deepcopy__(self, memo: object) -> "Registry":
        """The registry itself: it describes this process, so a copied tokenizer has the same one."""
        return self

    def ids(self) -> dict[str, tuple[Origin, ...]]:
        """Every plugin id with the distributions that use this id. Imports nothing."""
        return {id: tuple(origins) for id, origins in self._origins.items()}

    def origin(self, id: str) -> Origin:
        """The distribution behind an id. Raises `UnknownPlugin` or `PluginConflict`."""
        origins = self._origins.get(id, [])
        if not origins:
            raise UnknownPlugin(self._no_plugin(id))
        if len(origins) > 1:
            claims = " and ".join(str(origin) for origin in origins)
            others = ",".join(origin.distribution for origin in origins[1:])
            raise PluginConflict(
                f"plugin '{id}' is claimed by {claims}. Uninstall one, or set "
                f"VQCORE_DISABLED_PLUGINS={others}."
            )
        return origins[0]

    def plugin(self, id: str) -> Plugin:
        """The record of a plugin. The first call imports the plugin's manifest, and nothing else."""
        if id not in self._plugins:
            origin = self.origin(id)
            if ":" in origin.module:
                raise PluginLoadError(
                    f"plugin '{id}' ({origin}): its entry point is '{origin.module}', but must be "
                    f"the manifest module alone: '{origin.module.partition(':')[0]}'."
                )
            self._plugins[id] = _record(origin, self._import(origin, origin.module))
        return self._plugins[id]

    def find(self, kind: str, name: str, where: str = "") -> Found:
        """The component of this kind and name. `where` is the config key that holds the name, for error messages."""
        id, _, short = name.rpartition("/")
        id = id or "core"
        if id == "core" and name != short:
            raise UnknownName(
                f"no plugin 'core': the names of vqcore's own components have no slash.{did_you_mean(short, [short])}"
            )
        plugin, origin = self.plugin(id), self.origin(id)
        full = {component: _full(id, component.name) for component in plugin.components}
        for component in plugin.components:
            if component.kind == kind and component.name == short:
                return Found(full[component], component, origin)
        for component in plugin.components:
            if component.kind == kind and short in component.renamed_from:
                place = f"{where}: " if where else ""
                # FutureWarning, because Python hides a DeprecationWarning from people who write configs.
                warnings.warn(
                    f"{place}'{name}' is now called '{full[component]}'.", FutureWarning, stacklevel=2
                )
                return Found(full[component], component, origin)
        for component in plugin.components:
            if component.name == short:
                place = where or "this place"
                raise UnknownName(f"'{name}' is {a_kind(component.kind)}; {place} needs {a_kind(kind)}.")
        names = [full[component] for component in plugin.components if component.kind == kind]
        if id == "core":
            everywhere = [f.name for f in self.components(kind)]
            same = [other for other in everywhere if other.rpartition("/")[2] == short]
            hint = f" Did you mean '{same[0]}'?" if same else did_you_mean(name, everywhere)
            hint = hint or f" Installed: {listed(everywhere) or 'none'}."
        else:
            hint = did_you_mean(name, names) or f" It has: {listed(names) or f'no {kind_name(kind)} at all'}."
        raise UnknownName(f"{origin} has no {kind_name(kind)} '{name}'.{hint}")

    def is_disabled(self, id: str) -> bool:
        """Whether a plugin is installed but disabled by `VQCORE_DISABLED_PLUGINS`."""
        return id in self._disabled

    def identity(self, kind: str, name: str) -> str:
        """The component's first name, with the plugin's id; the same before and after a renaming.

        A component that is not installed has the identity `name`.
        """
        try:
            found = self.find(kind, name)
        except VqcoreError:  # the caller built the component with a registry of its own
            return name
        first = next(iter(found.component.renamed_from), found.component.name)
        return _full(found.origin.id, first)

    def same(self, a: Any, b: Any) -> bool:
        """Whether two values of `name` are equal, or are the old and the new name of a renamed component."""
        if a == b or not isinstance(a, str) or not isinstance(b, str):
            return a == b
        (id, _, one), (other_id, _, other) = a.rpartition("/"), b.rpartition("/")
        try:
            components = self.plugin(id or "core").components if id == other_id else ()
        except VqcoreError:  # the error is reported when the component is built
            return False
        return any({one, other} <= {component.name, *component.renamed_from} for component in components)

    def load(self, kind: str, name: str, where: str = "") -> type:
        """The class behind a name, after a check that the class has a `Config`. Imports the plugin's code."""
        found = self.find(kind, name, where)
        module_name, _, attribute = found.component.target.partition(":")
        module = self._import(found.origin, module_name or found.origin.module)
        cls = getattr(module, attribute, None)
        if not isinstance(cls, type):
            raise PluginLoadError(
                f"'{found.name}' of {found.origin} points to {found.component.target}, but {module.__name__} "
                f"has no class '{attribute}'.{did_you_mean(attribute, vars(module))}"
            )
        config = getattr(cls, "Config", None)
        if not (isinstance(config, type) and issubclass(config, Config)):
            raise PluginLoadError(
                f"'{found.name}' of {found.origin} has no nested class Config(vqcore.config.Config); "
                "every component declares its settings there."
            )
        return cls

    def build(self, kind: str, cfg: Any, where: str = "", **wiring: Any) -> Any:
        """`Class(cfg, **wiring)`, after a check that the object has every member that its kind requires.

        A `ValueError` of the constructor becomes a `ConfigError` that names the config key `where`.
        """
        from vqcore.memory import within_memory
        from vqcore.protocols import missing_members

        try:
            with within_memory():
                built = self.load(kind, cfg.name)(cfg, **wiring)
        except ValueError as error:
            raise ConfigError(f"{f'{where} ' if where else ''}({cfg.name}): {error}.") from error
        lacks = missing_members(kind, built)
        if lacks:
            found = self.find(kind, cfg.name)
            raise PluginLoadError(
                f"{found.name} was built but is not a valid {kind_name(kind)}: it lacks {listed(map(repr, lacks))}. "
                f"Run: vqcore plugins --check {found.origin.id}"
            )
        return built

    def catalogue(self) -> list[Status]:
        """Every plugin with its record, or with the reason why the plugin cannot be used. Imports all manifests."""
        listings = []
        for id, origins in self._origins.items():
            try:
                listings.append(Status(id, tuple(origins), self.plugin(id)))
            except VqcoreError as error:
                listings.append(Status(id, tuple(origins), None, str(error)))
        return listings + self._refused

    def components(self, kind: str | None = None) -> list[Found]:
        """All components of the usable plugins; with `kind`, those of one kind."""
        return [
            Found(_full(listing.id, component.name), component, listing.origins[0])
            for listing in self.catalogue()
            if listing.plugin
            for component in listing.plugin.components
            if kind in (None, component.kind)
        ]

    def add_file(self, path: str) -> None:
        """Read a manifest from a Python file, as `--plugin FILE` does. The components get names `local/...`.

        In Python, call `registry().add_file("mine.py")` before `Tokenizer.load` of a tokenizer with such components.
        Reading the same file again changes nothing. Raises `PluginLoadError` for a second file.
        """
        source = local(path)
        if not source.is_file():
            raise PluginLoadError(f"--plugin {path}: there is no such file.")
        if source.suffix != ".py":
            raise PluginLoadError(f"--plugin {path}: the name of the Python file must end in .py.")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        if "local" in self._files and self._origins["local"][0].digest == digest:
            return
        if "local" in self._files:
            raise PluginLoadError(
                f"--plugin {path}: only one file can be given; put all components into one manifest."
            )
        origin = Origin("local", str(source), "", "vqcore_local", digest)
        spec = importlib.util.spec_from_file_location("vqcore_local", source)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["vqcore_local"] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            sys.modules.pop("vqcore_local", None)
            raise PluginLoadError(f"--plugin {path}: the file does not run: {_reason(error)}.") from error
        self._plugins["local"] = _record(origin, module)
        self._files["local"], self._origins["local"] = module, [origin]

    @property
    def file(self) -> str:
        """The path of the `--plugin` file, or an empty text."""
        return self._origins["local"][0].distribution if "local" in self._files else ""

    def _import(self, origin: Origin, module: str) -> ModuleType:
        if module == origin.module and origin.id in self._files:
            return self._files[origin.id]
        try:
            return importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise PluginLoadError(_does_not_import(origin, module, error)) from error

    def _no_plugin(self, id: str) -> str:
        for listing in self._refused:
            if listing.id == id:
                return f"plugin '{id}' ({listing.origins[0]}) cannot be used: {listing.problem}"
        if id in self._disabled:
            origin = self._disabled[id]
            return (
                f"plugin '{id}' ({origin}) is disabled: "
                f"VQCORE_DISABLED_PLUGINS contains {origin.distribution}."
            )
        if id == "local":
            return (
                "no plugin 'local': its components come from a Python file. Give this file with --plugin FILE; "
                "in Python, first call vqcore.registry.registry().add_file('FILE')."
            )
        if id in OURS:
            distribution, folder = OURS[id]
            return (
                f"no plugin '{id}' is installed. It comes with {distribution}: "
                f"in a checkout of vqcore, run: pip install ./{folder}"
            )
        # Ids are short: with a lower cutoff, unet would suggest quant.
        hint = did_you_mean(id, [*self._origins, *OURS], cutoff=0.7)
        hint = hint or f" Installed: {listed(sorted(set(self._origins)))}."
        return f"no plugin '{id}'.{hint}"


@functools.cache
def registry() -> Registry:
    """The registry of this process."""
    return Registry()


def _record(origin: Origin, module: ModuleType) -> Plugin:
    """Call a manifest's hook through pluggy and check the record that the hook returns."""
    who = _who(origin, origin.module)
    manager = pluggy.PluginManager("vqcore")
    manager.add_hookspecs(ManifestHooks)
    try:
        manager.register(module, name=origin.id)
        manager.check_pending()
        records = manager.hook.vqcore_plugin()
    except pluggy.PluginValidationError as error:
        reason = str(error).strip().splitlines()[-1].partition(" in plugin ")[0]
        raise PluginLoadError(
            f"{who} has an invalid manifest: {reason}. "
            "A manifest has one hook, vqcore_plugin(), without arguments."
        ) from error
    except (Exception, SystemExit) as error:
        raise PluginLoadError(f"{who} has a manifest that fails: {_reason(error)}.") from error
    if len(records) != 1 or not isinstance(records[0], Plugin):
        raise PluginLoadError(f"{who} must implement vqcore_plugin() and return one vqcore.plugin.Plugin.")
    plugin = records[0]
    _check_api(origin, plugin.api)
    if not isinstance(plugin.components, tuple) or not all(
        isinstance(c, Component) for c in plugin.components
    ):
        raise PluginLoadError(
            f"{who}: components must be a tuple of Component (a single one needs a comma: (Component(...),))."
        )
    seen: dict[tuple[str, str], Component] = {}
    for component in plugin.components:
        problem = _problem_of(component)
        if (component.kind, component.name) in seen:
            problem = f"is declared twice as {a_kind(component.kind)}."
        if problem:
            raise PluginLoadError(f"{who}: component '{component.name}' {problem}")
        seen[component.kind, component.name] = component
    for component in plugin.components:
        for former in component.renamed_from:
            if seen.setdefault((component.kind, former), component) is not component:
                raise PluginLoadError(
                    f"{who}: component '{component.name}' has the former name '{former}', which is also a name of "
                    f"another {kind_name(component.kind)}. Each name belongs to one component, because fingerprints "
                    "contain the name."
                )
    return plugin


def _check_api(origin: Origin, api: int) -> None:
    if api in SUPPORTED_API:
        return
    if not isinstance(api, int):
        raise PluginLoadError(f"{_who(origin, origin.module)}: api={api!r} is not an integer.")
    spoken = f"{min(SUPPORTED_API)}" + (f"-{max(SUPPORTED_API)}" if len(SUPPORTED_API) > 1 else "")
    if api > max(SUPPORTED_API):
        cure = "Upgrade vqcore."
    else:
        cure = f"Upgrade {origin.distribution}, or install an older vqcore."
    raise PluginApiError(f"{origin} was written for plugin API {api}; this vqcore supports {spoken}. {cure}")


def _problem_of(component: Component) -> str:
    texts = (component.kind, component.name, component.target, component.summary)
    if not all(isinstance(text, str) for text in texts):
        return "has a kind, name, target or summary that is not text."
    if component.kind not in KINDS:
        hint = did_you_mean(component.kind, KINDS) or f" Kinds: {listed(KINDS, len(KINDS))}."
        return f"is of kind '{component.kind}', which does not exist.{hint}"
    if not _NAME.fullmatch(component.name):
        return "has an invalid name: use a-z, 0-9 and '-', and begin with a letter."
    if component.target.count(":") != 1 or component.target.endswith(":"):
        return f"has target '{component.target}', but must be 'module:Class'."
    if not isinstance(component.renamed_from, tuple):
        return "has a renamed_from that is not a tuple (a single name needs a comma: ('old',))."
    for former in component.renamed_from:
        if not isinstance(former, str) or not _NAME.fullmatch(former):
            return (
                f"has the former name {former!r}; a former name is made of a-z, 0-9 and '-', "
                "without the plugin's id."
            )
    return ""


def _origin(entry: importlib.metadata.EntryPoint) -> Origin:
    name = version = None
    with contextlib.suppress(Exception):  # METADATA may be missing; then the module's name is used
        if entry.dist:
            name, version = entry.dist.name, entry.dist.version
    return Origin(entry.name, name or entry.value, version or "", entry.value)


def _bad_id(origin: Origin) -> str:
    if origin.id in _RESERVED:
        return f"the id '{origin.id}' is reserved for vqcore; {origin.distribution} must choose another id."
    if not _ID.fullmatch(origin.id):
        return f"the id '{origin.id}' is invalid: use a-z and 0-9, and begin with a letter."
    return ""


def _ranked(origins: Iterable[Origin]) -> list[Origin]:
    """The origins in a fixed order, ours first. An error message proposes to disable those after the first."""
    ours = {_canonical(distribution) for distribution, _ in OURS.values()}
    return sorted(origins, key=lambda o: (_canonical(o.distribution) not in ours, o.distribution, o.module))


def _who(origin: Origin, module: str) -> str:
    return f"plugin '{origin.id}' ({origin}, {module})"


def _does_not_import(origin: Origin, module: str, error: BaseException) -> str:
    text = f"{_who(origin, module)} does not import: {_reason(error)}."
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return text
    missing = error.name.partition(".")[0]
    if missing in (module.partition(".")[0], origin.module.partition(".")[0]) or origin.id == "core":
        return (
            f"{text} {origin.distribution} is not completely installed; install {origin.distribution} again."
        )
    if missing == "vqcore":
        return f"{text} {origin} does not fit vqcore {__version__}; install matching versions."
    return f"{text} {missing} is a dependency of {origin.distribution}, not of vqcore."


def _reason(error: BaseException) -> str:
    return first_line(error) if isinstance(error, ImportError) and str(error) else reason(error)


def _full(id: str, name: str) -> str:
    return name if id == "core" else f"{id}/{name}"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
