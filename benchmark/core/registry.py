"""What is registered in a folder of one-file entries, read from the files' text: nothing is imported to list it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def registered(folder: Path, decorator: str) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(name, module stem, class name, keywords) of every class decorated with `@decorator("name", key=literal, ...)`.

    Raises ValueError when a name is registered twice.
    """
    seen: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for call in node.decorator_list:
                if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == decorator):
                    continue
                name = str(ast.literal_eval(call.args[0]))
                if name in seen:
                    raise ValueError(f"{name!r} is registered in {seen[name]}.py and in {path.stem}.py")
                seen[name] = path.stem
                keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
                yield name, path.stem, node.name, keywords
