"""YAML by the safe loader, with limits: aliases that stand for a billion values, nesting, numbers of any length."""

from __future__ import annotations

import re
from typing import Any

import yaml

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import DEEPEST, HALVES, TOO_LARGE

#: values of a YAML file after its aliases are replaced: nine lines can stand for a billion
MOST_VALUES = 1_000_000


class MissingValueError(UserError):
    """A mapping with a key that has no value."""


class WrittenInt(int):
    """An integer that as text is what was written: 001 may be a name."""

    text = ""

    def __str__(self) -> str:
        return self.text


class WrittenFloat(float):
    """A number that as text is what was written: 1e3 may be a name."""

    text = ""

    def __str__(self) -> str:
        return self.text


# libyaml's parser is several times faster; its nodes are composed in Python all the same, for the limits below
_BASE: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_BASES: Any = type("_Bases", (yaml.composer.Composer, _BASE) if yaml.__with_libyaml__ else (_BASE,), {})


class _Loader(_BASES):
    """SafeLoader that reads 1e-3 as a float, as YAML 1.2 does, and refuses duplicate keys and what has no end."""

    depth = 0
    #: whether keys outside braces want a value too
    strict = False

    def __init__(self, stream: Any) -> None:
        _BASE.__init__(self, stream)
        yaml.composer.Composer.__init__(self)
        #: values that each node stands for
        self.sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As SafeLoader's, but what nests too deep, holds itself, or grows too large by aliases is an error."""
        event, alias = self.peek_event(), self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {DEEPEST} levels", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and node not in self.sizes:
            raise yaml.MarkedYAMLError(problem="an alias holds itself", problem_mark=event.start_mark)
        if isinstance(node, yaml.ScalarNode) and HALVES.search(node.value):
            raise yaml.MarkedYAMLError(problem="half a character", problem_mark=event.start_mark)
        if node is not None and not alias:
            inner = [] if isinstance(node, yaml.ScalarNode) else node.value
            pairs = isinstance(node, yaml.MappingNode)
            self.sizes[node] = 1 + sum(self.sizes[n] for entry in inner for n in (entry if pairs else (entry,)))
            if self.sizes[node] > MOST_VALUES:
                raise yaml.MarkedYAMLError(problem=f"more than {MOST_VALUES} values", problem_mark=event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's, but a key given twice, or without a value in braces, is an error."""
        for key, value in node.value if self.strict or node.flow_style else ():
            if isinstance(value, yaml.ScalarNode) and value.value == "" and not value.style:
                name = str(key.value) if isinstance(key, yaml.ScalarNode) else "a key"
                first, _, rest = name.partition(":")
                mend = f"{first}: {rest.strip() or 'VALUE'}"
                raise MissingValueError(f"{name!r} has no value: write {mend!r}, with a blank after the colon")
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep)  # which says what is wrong with a key
        keys = [self.construct_object(key, deep=True) for key in own]
        if len(set(keys)) < len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise UserError(f"line {node.start_mark.line + 1}: key {twice!r} is given twice")
        return mapping

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """As SafeLoader's, but below TOO_LARGE."""
        # 20 digits, or 64 bits, a sign and `0b`, with as many underscores
        if len(node.value) > 132 or abs(value := int(super().construct_yaml_int(node))) >= TOO_LARGE:
            raise ValueError(f"the integer {node.value[:20]}... is too large")
        if str(value) == node.value:
            return value
        written = WrittenInt(value)
        written.text = str(node.value)
        return written

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """As SafeLoader's, and knows how it was written."""
        value = WrittenFloat(super().construct_yaml_float(node))
        value.text = str(node.value)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    key: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class _StrictLoader(_Loader):
    strict = True


def read_yaml(text: str, where: str, *, strict: bool = False) -> Any:
    """Parses YAML safely; UserError that names `where` when it is not valid, too deep or large, or lacks a value."""
    line = ""
    try:
        return yaml.load(text, Loader=_StrictLoader if strict else _Loader)
    except MissingValueError as error:
        raise MissingValueError(f"{where}: {error}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark, why = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        if "invalid Unicode character escape" in str(why):  # libyaml's words, also for what HALVES finds
            why = "half a character, or none"
        # libyaml counts the end of the file as a line of its own
        line = f" (line {min(mark.line + 1, max(1, len(text.splitlines())))})" if mark else ""
    except ValueError as error:
        why = error  # of a date such as 2001-99-99, say
    except (LookupError, TypeError, AttributeError, OverflowError):
        why = "a tag such as !!int or !!timestamp on what is none"
    raise UserError(f"{where} is not valid YAML{line}: {' '.join(str(why).split())}; mend it there")
