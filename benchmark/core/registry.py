"""What is registered: in a folder of the project, by an installed package, in a file that a command names.

All is read from the files' text: nothing is imported to list it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dualcl.benchmark.core.errors import UserError, nearest

#: NAME, FILE.py or FILE.py:NAME; the hash is what another process must find
_REFERENCE = re.compile(r"(?P<what>.*?)(?:@(?P<sha256>[0-9a-f]{64}))?", re.DOTALL)
_FILE = re.compile(r"(?P<file>.+?\.py)(?::(?P<name>[^/\\]*))?", re.DOTALL)
#: names stand in folders' names, in lists and in dotted keys
_NAME = re.compile(r"[A-Za-z]\w*(-\w+)*", re.ASCII)
#: keyword -> its type, and whether it may be left out; by decorator
_KEYWORDS: Mapping[str, Mapping[str, tuple[type, bool]]] = {
    "register_method": {"domains": (tuple, False), "summary": (str, False), "source": (str, False)}
    | {"stores_data": (bool, True)},
    "register_dataset": {"domain": (str, False), "summary": (str, False), "needs_prepare": (bool, True)},
}
_NOUNS = {"register_method": "method", "register_dataset": "data set"}


@dataclass(frozen=True)
class Plugin:
    """Where something that is not built in is registered."""

    name: str
    #: absolute
    file: Path
    #: of the file's bytes
    sha256: str
    #: the installed distribution; "": a file that the command names
    package: str = ""
    version: str = ""

    @property
    def reference(self) -> str:
        """What names it on the command line of another process, which then takes the same text or none."""
        return f"{self.name if self.package else f'{self.file}:{self.name}'}@{self.sha256}"

    @property
    def origin(self) -> str:
        """`package 1.2`, or the file."""
        return f"{self.package} {self.version}" if self.package else str(self.file)

    @property
    def place(self) -> str:
        """For errors."""
        return f"{self.origin} ({self.file})" if self.package else self.origin

    def record(self) -> dict[str, str]:
        """For the record of a run."""
        own = {"package": self.package, "version": self.version} if self.package else {"file": self.file.name}
        return {"kind": "package" if self.package else "file", **own, "sha256": self.sha256}


class Info(Protocol):
    """What is known of something registered, without importing it; `plugin` None: built in."""

    @property
    def name(self) -> str:
        """As registered."""

    @property
    def module(self) -> str:
        """To be imported; "" for a file."""

    @property
    def plugin(self) -> Plugin | None:
        """Where it comes from."""


@dataclass(frozen=True)
class Entry:
    """A registered class as read."""

    name: str
    class_name: str
    module: str
    #: the decorator's keywords
    given: dict[str, Any]
    plugin: Plugin | None = None


Found = TypeVar("Found", bound=Info)


def registered(folder: Path, package: str, decorator: str, make: Callable[[Entry], Found]) -> dict[str, Found]:
    """What a folder's files, then entry points of installed packages, register with `@decorator("name", key=literal)`.

    `package`: the folder's, as it is imported, and the entry points' group. Raises UserError for a name given twice.
    """
    out: dict[str, Found] = {}
    for path in sorted(folder.glob("*.py")):
        for name, class_name, given in _read(path.read_bytes(), path, decorator):
            info = make(Entry(name, class_name, f"{package}.{path.stem}", given))
            check_free(out, info)
            out[name] = info
    for entry in _installed(decorator, package):
        check_free(out, info := make(entry))
        out[info.name] = info
    return out


def check_free(taken: Mapping[str, Info], info: Info) -> None:
    """UserError when something else has the name, with both places."""
    other = taken.get(info.name, info)
    if other != info:
        places = " and in ".join(i.module if i.plugin is None else i.plugin.place for i in (other, info))
        raise UserError(f"the name {info.name!r} is registered in {places}; rename one of the two, or take it away")


@functools.lru_cache(maxsize=256)
def _read(text: bytes, path: Path, decorator: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, class name, keywords) of every class that the file registers."""
    try:
        body = ast.parse(text, filename=str(path)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{path}{line} is no Python: {getattr(error, 'msg', error)}") from error
    out: list[tuple[str, str, dict[str, Any]]] = []
    for node in (node for node in body if isinstance(node, ast.ClassDef)):
        for call in node.decorator_list:
            called = call.func if isinstance(call, ast.Call) else call
            if decorator in (getattr(called, "id", ""), getattr(called, "attr", "")):
                name, given = _arguments(call, f"{path}, line {call.lineno}", decorator)
                if name in {n for n, *_ in out}:
                    raise UserError(f"{path} registers {name!r} twice; rename one of the two")
                out.append((name, node.name, given))
    return out


def _arguments(call: ast.expr, where: str, decorator: str) -> tuple[str, dict[str, Any]]:
    wanted = _KEYWORDS[decorator]
    form = f'@{decorator}("name", {", ".join(f"{k}=..." for k, (_, optional) in wanted.items() if not optional)})'
    try:
        assert isinstance(call, ast.Call)
        (name,) = (ast.literal_eval(a) for a in call.args)
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (AssertionError, ValueError, TypeError):
        raise UserError(f"{where}: {form} wants literals, as it is read without an import") from None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{where}: the name is {name!r}; it must be letters, digits, _ and -, and begin with a letter")
    for key, value in given.items():
        if key not in wanted:
            raise UserError(f"{where}: @{decorator} takes no {key}; {nearest(key, wanted, 'keywords')}")
        kind = wanted[key][0]
        if not isinstance(value, kind) or (kind is tuple and not all(isinstance(v, str) for v in value)):
            what = "a tuple of texts" if kind is tuple else {str: "a text", bool: "True or False"}[kind]
            raise UserError(f"{where}: {key} must be {what}, got {value!r}")
    lacking = [key for key, (_, optional) in wanted.items() if not optional and key not in given]
    if lacking:
        raise UserError(f"{where}: {', '.join(lacking)} is missing in {form}")
    return name, given


# --- installed packages -----------------------------------------------------------------------------------------------


def _installed(decorator: str, group: str) -> Iterator[Entry]:
    for point in importlib.metadata.entry_points(group=group):
        module, _, class_name = point.value.replace(" ", "").partition(":")
        package = point.dist.metadata["Name"] if point.dist is not None else point.name
        said = f"package {package}: its entry point {point.name} = {point.value} ({group})"
        path = _file_of(module, point.dist)
        if path is None:
            raise UserError(f"{said} names no file of the package; install it again, or take it away")
        text = _bytes(path)
        found = [e for e in _read(text, path, decorator) if class_name in ("", e[1])]
        if not found:
            raise UserError(f"{said} registers no {_NOUNS[decorator]}; mend it, or take it away")
        version = point.dist.version if point.dist is not None else ""
        for name, cls, given in found:
            plugin = Plugin(name, path, hashlib.sha256(text).hexdigest(), package, version)
            yield Entry(name, cls, module, given, plugin)


def _file_of(module: str, dist: importlib.metadata.Distribution | None) -> Path | None:
    """A module's file, found without importing anything."""
    endings = [module.replace(".", "/") + end for end in (".py", "/__init__.py")]
    for file in (dist.files if dist is not None else None) or ():
        if file.as_posix() in endings:
            return Path(str(file.locate())).absolute()
    # an editable installation lists none of its modules; to find a top-level package imports nothing
    top, *_ = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    places = [Path(place).parent for place in (spec.submodule_search_locations or ())] if spec is not None else []
    if spec is not None and not places and spec.origin is not None:
        places = [Path(spec.origin).parent]
    found = (place / end for place in places for end in endings)
    return next((path.absolute() for path in found if path.is_file()), None)


# --- one by its name or file ------------------------------------------------------------------------------------------


def is_file(reference: str) -> bool:
    """Whether it means a file and not a name."""
    what = _parts(reference)[0]
    return any(c in what for c in "./\\")


def absolute(reference: str, folder: Path) -> str:
    """A file's reference as from `folder`; a name as it is."""
    return os.path.join(folder.absolute(), os.path.expanduser(reference)) if is_file(reference) else reference


def _parts(reference: str) -> tuple[str, str | None]:
    match = _REFERENCE.fullmatch(reference)
    assert match is not None
    return match["what"], match["sha256"]


def find(
    reference: str, known: Mapping[str, Found], decorator: str, make: Callable[[Entry], Found], unknown: str = ""
) -> Found:
    """What NAME, FILE.py or FILE.py:NAME means; `unknown` begins the error for a name that nobody registers."""
    what, sha256 = _parts(reference)
    if is_file(reference):
        info = make(_named(what, decorator))
        check_free(known, info)
    elif what in known:
        info = known[what]
    else:
        noun = _NOUNS[decorator]
        raise UserError(f"unknown {noun} {unknown}{what!r}; {nearest(what, known, noun + 's')}")
    if sha256 is not None and (info.plugin is None or info.plugin.sha256 != sha256):
        now = f"{info.module} is built in" if info.plugin is None else f"{info.plugin.place} has changed"
        raise UserError(f"{now}: the run was planned with sha256 {sha256[:12]}; put it back, or start anew")
    return info


def _named(what: str, decorator: str) -> Entry:
    noun, match = _NOUNS[decorator], _FILE.fullmatch(what)
    if match is None:
        raise UserError(f"{what} is no .py file; give the {noun}'s file, FILE.py:NAME where it has several, or a name")
    path = Path(os.path.abspath(os.path.expanduser(match["file"])))
    text = _bytes(path)
    sha256 = hashlib.sha256(text).hexdigest()
    found = {name: (cls, given) for name, cls, given in _read(text, path, decorator)}
    if not found:
        raise UserError(f"{path} registers no {noun}: decorate its class with @{decorator}(...)")
    name = match["name"]
    if name is None and len(found) > 1:
        first = next(iter(found))
        raise UserError(f"{path} registers {len(found)} {noun}s, {', '.join(found)}; choose one, {path.name}:{first}")
    if name is not None and name not in found:
        raise UserError(f"{path} registers no {noun} {name!r}; {nearest(name, found, 'there')}")
    name = name or next(iter(found))
    return Entry(name, found[name][0], "", found[name][1], Plugin(name, path, sha256))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def check_plugins(told: Mapping[str, Any], plugins: Mapping[str, Plugin], where: str, mend: str) -> None:
    """UserError unless the `run` of a record in `where` is by the same text of method and data set as `plugins`.

    A record that names none is of what is built in.
    """
    for part in ("method", "data"):
        then = told.get(f"{part}_source")
        now = plugins[part].record() if part in plugins else None
        hashes = [str(s.get("sha256"))[:12] if isinstance(s, Mapping) else "built in" for s in (then, now)]
        if hashes[0] != hashes[1]:
            noun = "method" if part == "method" else "data set"
            raise UserError(f"{where} has another {noun}: sha256 there {hashes[0]}, now {hashes[1]}; {mend}")


# --- imports ----------------------------------------------------------------------------------------------------------


def module_of(module: str, plugin: Plugin | None) -> types.ModuleType:
    """The module that registers something; of a plug-in only if its text has the hash still.

    Whatever a plug-in raises becomes a UserError of one line.
    """
    if plugin is None:
        return importlib.import_module(module)
    try:
        found = importlib.import_module(module) if plugin.package else _executed(plugin)
    except UserError as error:
        raise UserError(f"{plugin.file}: {error}") from error
    except (Exception, SystemExit) as error:
        line = (str(error).splitlines() or [""])[0]
        raise UserError(f"{plugin.file} cannot be imported: {type(error).__name__}: {line}") from error
    if plugin.package and not os.path.samefile(str(found.__file__), plugin.file):
        raise UserError(f"{module} of {plugin.origin} is {plugin.file}, but Python imports {found.__file__}")
    return found


def _executed(plugin: Plugin) -> types.ModuleType:
    """The module of a file, made of the bytes that have the hash."""
    key = hashlib.sha256(f"{plugin.file}\0{plugin.sha256}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    name = f"dualcl_plugin_{key}"
    if name in sys.modules:
        return sys.modules[name]
    text = plugin.file.read_bytes()
    if hashlib.sha256(text).hexdigest() != plugin.sha256:
        raise UserError("it has changed while it was read; call again")
    module = types.ModuleType(name)
    module.__file__ = str(plugin.file)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(text, str(plugin.file), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module
