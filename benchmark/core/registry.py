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
import json
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dualcl.benchmark.core.errors import UserError, nearest

#: NAME, FILE.py or FILE.py:NAME; the hash is what another process must find
_REFERENCE = re.compile(r"(.*?)(?:@([0-9a-f]{64}))?", re.DOTALL)
_FILE = re.compile(r"(.+?\.py)(?::([^/\\]*))?", re.DOTALL)
#: names stand in folders' names, in lists and in dotted keys
_NAME = re.compile(r"[A-Za-z]\w*(-\w+)*", re.ASCII)


@dataclass(frozen=True)
class Plugin:
    """Where something that is not built in is registered."""

    name: str
    #: absolute
    file: Path
    #: of the file's bytes, and of the modules beside it that it imports
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

    def record(self) -> dict[str, str]:
        """For the record of a run."""
        own = {"package": self.package, "version": self.version} if self.package else {"file": self.file.name}
        return {"kind": "package" if self.package else "file", **own, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True)
class Registered:
    """What is known of a registered class without importing it; subclasses add the keywords of their decorator."""

    noun: ClassVar[str]
    decorator: ClassVar[str]

    name: str
    #: to be imported; "" for a file
    module: str
    class_name: str
    #: None: built in
    plugin: Plugin | None = None

    @property
    def reference(self) -> str:
        """What finds it again, in any process."""
        return self.name if self.plugin is None else self.plugin.reference

    @property
    def place(self) -> str:
        """For errors."""
        plugin = self.plugin
        if plugin is None:
            return self.module
        return f"{plugin.origin} ({plugin.file})" if plugin.package else plugin.origin

    def load(self) -> Any:
        """Imports the class; whatever a plug-in raises becomes a UserError of one line."""
        return getattr(_module(self.module, self.plugin), self.class_name)


Found = TypeVar("Found", bound=Registered)


def registered(folder: Path, package: str, kind: type[Found]) -> dict[str, Found]:
    """What a folder's files, then entry points of installed packages, register with `@decorator("name", key=literal)`.

    `package`: the folder's, as it is imported, and the entry points' group. Raises UserError for a name given twice.
    """
    out: dict[str, Found] = {}
    built_in = (
        info for path in sorted(folder.glob("*.py")) for info in _read(path, kind, module=f"{package}.{path.stem}")
    )
    for info in (*built_in, *_installed(kind, package)):
        check_free(out, info)
        out[info.name] = info
    return out


def check_free(taken: Mapping[str, Registered], info: Registered) -> None:
    """UserError when something else has the name, with both places."""
    other = taken.get(info.name, info)
    if other != info:
        places = f"{other.place} and in {info.place}"
        raise UserError(f"the name {info.name!r} is registered in {places}; rename one of the two, or take it away")


def _read(path: Path, kind: type[Found], *, module: str = "", plugin: bool = False, **source: str) -> list[Found]:
    """Every class that the file registers; `source`: package and version of a plug-in."""
    text = _bytes(path)
    out: dict[str, Found] = {}
    there = _registrations(text, path, kind.decorator)
    sha256 = _hash(path, text, _imported(path, text, module)) if plugin and there else ""
    for name, class_name, line, given in there:
        own = Plugin(name, path, sha256, **source) if plugin else None
        try:
            info = kind(name=name, module=module, class_name=class_name, plugin=own, **given)
        except TypeError as error:  # keywords that are not the decorator's
            raise UserError(f"{path}, line {line}: @{kind.decorator} {str(error).partition('() ')[2]}") from None
        if name in out:
            raise UserError(f"{path} registers {name!r} twice; rename one of the two")
        out[name] = info
    return [*out.values()]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


@functools.lru_cache(maxsize=256)
def _registrations(text: bytes, path: Path, decorator: str) -> list[tuple[str, str, int, dict[str, Any]]]:
    """(name, class name, line, keywords) of each."""
    try:
        body = ast.parse(text, filename=str(path)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{path}{line} is no Python: {getattr(error, 'msg', error)}") from error
    out: list[tuple[str, str, int, dict[str, Any]]] = []
    for node in (node for node in body if isinstance(node, ast.ClassDef)):
        for call in node.decorator_list:
            called = call.func if isinstance(call, ast.Call) else call
            if decorator not in (getattr(called, "id", ""), getattr(called, "attr", "")):
                continue
            where = f"{path}, line {call.lineno}: @{decorator}"
            try:
                (name,) = map(ast.literal_eval, call.args)  # type: ignore[attr-defined]
                given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}  # type: ignore[attr-defined]
            except (AttributeError, ValueError, TypeError):
                form = '("name", key=value, ...)'
                raise UserError(f"{where}{form} wants literals, as it is read without an import") from None
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise UserError(f"{where}: the name must be a letter, then letters, digits, _ and -; got {name!r}")
            out.append((name, node.name, call.lineno, given))
    return out


# --- what a plug-in's file imports from its own folder ----------------------------------------------------------------


def texts(plugin: Plugin) -> dict[str, bytes]:
    """The file of a plug-in that is none of a package, then the modules beside it that it imports, by relative path."""
    text = _bytes(plugin.file)
    root = _folders(plugin.file)[-1][0]
    own = {plugin.file: text, **dict(_imported(plugin.file, text).values())}
    return {file.relative_to(root).as_posix(): body for file, body in own.items()}


def _hash(path: Path, text: bytes, imported: Mapping[str, tuple[Path, bytes]]) -> str:
    """sha256 of a plug-in's text; where it imports modules beside it, of all of them by relative path."""
    own = hashlib.sha256(text).hexdigest()
    beside = {os.path.relpath(f, path.parent): hashlib.sha256(body).hexdigest() for f, body in imported.values()}
    return hashlib.sha256(json.dumps([own, *sorted(beside.items())]).encode()).hexdigest() if beside else own


def _imported(path: Path, text: bytes, module: str = "") -> dict[str, tuple[Path, bytes]]:
    """By dotted name, file and text of the modules in its own folder that a plug-in imports, and that those import.

    Read from `import` statements, wherever they stand: what a process has imported already makes no difference.
    `module`: of an installed package, all of which counts as the folder.
    """
    folders = _folders(path, module)
    found: dict[str, tuple[Path, bytes]] = {}
    left = [(text, module if path.name == "__init__.py" else module.rpartition(".")[0])]
    while left:
        for name in _import_names(*left.pop()):
            for folder, top in folders:
                for own, file in _on_the_way(folder, name) if top in ("", name.partition(".")[0]) else ():
                    if own not in found and file != path:
                        found[own] = file, _bytes(file)
                        left.append((found[own][1], own if file.name == "__init__.py" else own.rpartition(".")[0]))
    return found


def _folders(path: Path, module: str = "") -> list[tuple[Path, str]]:
    """Where modules are looked for, with the one package that counts there; "": any."""
    if module:
        return [(path.parents[module.count(".") + (path.name == "__init__.py")], module.partition(".")[0])]
    root = next((folder for folder in path.parents if not (folder / "__init__.py").is_file()), path.parent)
    return [(path.parent, ""), *([(root, path.relative_to(root).parts[0])] if root != path.parent else [])]


@functools.lru_cache(maxsize=256)
def _import_names(text: bytes, package: str) -> tuple[str, ...]:
    """Dotted names of what a module of `package` imports; some are of a module's contents. None of this suite."""
    try:
        nodes = [*ast.walk(ast.parse(text))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # its import says so
        return ()
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # beyond its package
                continue
            names += (f"{base}.{alias.name}" for alias in node.names)
    return tuple(dict.fromkeys(name for name in names if name.partition(".")[0] != "dualcl"))


def _on_the_way(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """The modules below a folder that an import of the dotted name runs: packages, then itself."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:i])
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if os.path.isfile(file):
                yield ".".join(parts[:i]), file
                break


def _check_imported(imported: Mapping[str, tuple[Path, bytes]]) -> None:
    """UserError where this process has other modules than those that were hashed."""
    for name, (file, text) in imported.items():
        loaded = sys.modules.get(name)
        place = getattr(loaded, "__file__", None)
        if loaded is None or place is None:  # imported later, or never
            continue
        if not os.path.isfile(place) or _bytes(Path(place)) != text:
            raise UserError(f"it imports {name} from {place}, but {file} lies beside it; rename one of the two")
        sha256 = hashlib.sha256(text).hexdigest()
        if vars(loaded).setdefault("__dualcl_sha256__", sha256) != sha256:
            raise UserError(f"{place} has changed since this process imported it; start a new one")


# --- installed packages -----------------------------------------------------------------------------------------------


def _installed(kind: type[Found], group: str) -> Iterator[Found]:
    points = importlib.metadata.entry_points(group=group)
    for package, point in sorted(("" if p.dist is None else p.dist.name, p) for p in points):
        module, _, class_name = point.value.replace(" ", "").partition(":")
        said = f"package {package}: its entry point {point.name} = {point.value} ({group})"
        path = _file_of(module, point.dist)
        if path is None:
            raise UserError(f"{said} names no file of the package; install it again, or take it away")
        version = "" if point.dist is None else point.dist.version
        found = _read(path, kind, module=module, plugin=True, package=package, version=version)
        found = [info for info in found if class_name in ("", info.class_name)]
        if not found:
            raise UserError(f"{said} registers no {kind.noun}; mend it, or take it away")
        yield from found


def _file_of(module: str, dist: importlib.metadata.Distribution | None) -> Path | None:
    """A module's file, found without importing anything."""
    endings = [module.replace(".", "/") + end for end in (".py", "/__init__.py")]
    for file in (dist.files if dist is not None else None) or ():
        if file.as_posix() in endings:
            return Path(str(file.locate())).absolute()
    # an editable installation lists none of its modules; to find a top-level package imports nothing
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        spec = None
    where = [] if spec is None else [*(spec.submodule_search_locations or ([spec.origin] if spec.origin else []))]
    found = (Path(place).parent / end for place in where for end in endings)
    return next((path.absolute() for path in found if path.is_file()), None)


# --- one by its name or file ------------------------------------------------------------------------------------------


def is_file(reference: str) -> bool:
    """Whether it means a file and not a name."""
    return any(c in "./\\" for c in _parts(reference)[0])


def absolute(reference: str, folder: Path) -> str:
    """A file's reference as from `folder`; a name as it is."""
    return os.path.join(folder.absolute(), os.path.expanduser(reference)) if is_file(reference) else reference


def _parts(reference: str) -> tuple[str, str | None]:
    match = _REFERENCE.fullmatch(reference)
    assert match is not None
    return match[1], match[2]


def find(reference: str, known: Mapping[str, Found], kind: type[Found], unknown: str = "") -> Found:
    """What NAME, FILE.py or FILE.py:NAME means; `unknown` stands before a name that nobody registers."""
    what, sha256 = _parts(reference)
    if is_file(reference):
        info = _named(what, kind)
        check_free(known, info)
    elif what in known:
        info = known[what]
    else:
        raise UserError(f"unknown {kind.noun} {unknown}{what!r}; {nearest(what, known, f'{kind.noun}s')}")
    if sha256 is not None and (info.plugin is None or info.plugin.sha256 != sha256):
        now = f"{info.place} {'is built in' if info.plugin is None else 'has changed'}"
        raise UserError(f"{now}: the run was planned with sha256 {sha256[:12]}; put it back, or start anew")
    return info


def _named(what: str, kind: type[Found]) -> Found:
    match = _FILE.fullmatch(what)
    if match is None:
        raise UserError(f"{what} is no .py file; give the {kind.noun}'s, FILE.py:NAME where it has several, or a name")
    path, name = Path(os.path.abspath(os.path.expanduser(match[1]))), match[2]
    found = {info.name: info for info in _read(path, kind, plugin=True)}
    if not found:
        raise UserError(f"{path} registers no {kind.noun}: decorate its class with @{kind.decorator}(...)")
    first = next(iter(found))
    if name is None and len(found) > 1:
        several = f"{len(found)} {kind.noun}s, {', '.join(found)}"
        raise UserError(f"{path} registers {several}; choose one, {path.name}:{first}")
    if name is not None and name not in found:
        raise UserError(f"{path} registers no {kind.noun} {name!r}; {nearest(name, found, 'there')}")
    return found[name or first]


def check_plugins(told: Mapping[str, Any], plugins: Mapping[str, Plugin], where: str, mend: str) -> None:
    """UserError unless the `run` of a record in `where` is by the same text of method and data set as `plugins`.

    A record that names none is of what is built in.
    """
    for part, noun in (("method", "method"), ("data", "data set")):
        then = told.get(f"{part}_source")
        now = plugins[part].record() if part in plugins else None
        hashes = [str(s.get("sha256"))[:12] if isinstance(s, Mapping) else "built in" for s in (then, now)]
        if hashes[0] != hashes[1]:
            raise UserError(f"{where} has another {noun}: sha256 there {hashes[0]}, now {hashes[1]}; {mend}")


# --- imports ----------------------------------------------------------------------------------------------------------


def _module(module: str, plugin: Plugin | None) -> types.ModuleType:
    """The module that registers something; of a plug-in only if its text has the hash still."""
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
    """The module of a file, made of the bytes that have the hash, as have those of what it imports beside it."""
    place = hashlib.sha256(os.fsencode(plugin.file)).hexdigest()
    name = f"dualcl_plugin_{place[:8]}_{plugin.sha256[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    text = plugin.file.read_bytes()
    imported = _imported(plugin.file, text)
    if _hash(plugin.file, text, imported) != plugin.sha256:
        raise UserError("it has changed while it was read; call again")
    sys.modules[name] = module = types.ModuleType(name)  # dataclasses look their module up there
    module.__file__ = str(plugin.file)
    try:
        exec(compile(text, str(plugin.file), "exec"), vars(module))
        _check_imported(imported)
    except BaseException:
        del sys.modules[name]
        raise
    return module
