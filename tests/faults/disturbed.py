"""A program for tests: run vqcore, and disturb it where a module is imported or a function is called.

    python disturbed.py HOW PLACE ARGUMENTS...

HOW is the number of a signal, which this process sends itself, or `wait`: it says `ready` and waits for a line.
PLACE is `import:NAME` (the first search for that module) or `NAME:FUNCTION` (the first call of a function or a method).
A signal that this process inherited as ignored is set to its default first: suites run in the background, too.
"""

import _signal
import importlib.util
import os
import sys

how, place, *arguments = sys.argv[1:]
module, _, path = place.rpartition(":")


def disturb() -> None:
    if how == "wait":
        os.write(1, b"ready\n")
        os.read(0, 1)
    else:
        os.kill(os.getpid(), int(how))


class AtImport:
    """Disturbs when a module is looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == place.removeprefix("import:"):
            sys.meta_path.remove(self)
            disturb()


class AtCall:
    """Replaces a function when its module is complete."""

    def find_spec(self, name, path=None, target=None):
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module

        def then_replace(made):
            real(made)
            replace(made)

        spec.loader.exec_module = then_replace
        return spec


def replace(made) -> None:
    *above, last = path.split(".")
    for each in above:
        made = getattr(made, each)
    real, called = getattr(made, last), []

    def once(*given, **options):
        if not called:
            called.append(True)
            disturb()
        return real(*given, **options)

    setattr(made, last, once)


if __name__ == "__main__":
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    sys.path.pop(0)
    sys.argv = ["vqcore", *arguments]
    if module == "import":
        sys.meta_path.insert(0, AtImport())
    else:
        sys.meta_path.insert(0, AtCall())
    from vqcore.__main__ import start

    raise SystemExit(start())
