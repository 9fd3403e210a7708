"""A captured group of operations as one plain Python function.

What `fx` makes of a group looks up each constant and each layer in its modules and calls operations by their overloads,
which costs as much as a small operation takes. Here constants and layers are the function's globals, layers are called
without hooks, and operations by torch's own functions where these give the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx


def lowered(group: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
    """The same on any inputs of which `given` is an example. Hooks of the group's modules are not called."""
    return _Writer(group, given).function()


class _Writer(fx.Interpreter):
    """Writes the source while it runs the example."""

    def __init__(self, group: fx.GraphModule, given: Sequence[Any]) -> None:
        super().__init__(group)
        self._space: dict[str, Any] = {}
        self._lines: list[str] = []
        self._names = {node.name for node in group.graph.nodes}
        self._last = {one: node for node in group.graph.nodes for one in node.all_input_nodes}
        self.run(*given)

    def function(self) -> Callable[..., Any]:
        names = ", ".join(node.name for node in self.graph.nodes if node.op == "placeholder")
        own = self._constant("group", None)
        source = "\n    ".join((f"def {own}({names}):", *self._lines))
        exec(source, self._space)  # noqa: S102 - of names that were made here
        made: Callable[..., Any] = self._space[own]
        return made

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        match n.op:
            case "get_attr":
                self._space[n.name] = value
                return value
            case "output":
                self._lines.append(f"return {self._text(n.args[0])}")
                return value
            case "call_function" if n.target is operator.getitem:
                self._lines.append(f"{n.name} = {self._text(n.args[0])}[{self._text(n.args[1])}]")
            case "call_function":
                self._call(n, self._function(n, value))
            case "call_module":
                self._call(n, self.fetch_attr(str(n.target)).forward)
            case "call_method":
                self._call(n, getattr(Tensor, str(n.target)))
        if n.op != "placeholder":
            read = [one.name for one in (*n.all_input_nodes, n) if self._last.get(one, n) is n and one.op != "get_attr"]
            if read:
                self._lines.append(f"{' = '.join(read)} = None")  # its memory is free for what follows
        return value

    def _call(self, node: fx.Node, function: Callable[..., Any]) -> None:
        name = self._constant(f"call_{node.name}", function)
        named = [f"{key}={self._text(one)}" for key, one in node.kwargs.items()]
        self._lines.append(f"{node.name} = {name}({', '.join([*map(self._text, node.args), *named])})")

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, tuple | list):
            inner = "".join(f"{self._text(one)}, " for one in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        return self._constant("constant", value)

    def _constant(self, name: str, value: Any) -> str:
        """The name that it has: like this one, and no other value's."""
        while name in self._names:
            name += "_"
        self._names.add(name)
        self._space[name] = value
        return name

    def _function(self, node: fx.Node, value: Any) -> Callable[..., Any]:
        """What gives the same bits as the operation, the cheapest to call."""
        target: Any = node.target
        itself: Callable[..., Any] = target
        if not isinstance(target, torch._ops.OpOverload) or not isinstance(value, Tensor) or target._schema.is_mutable:
            return itself
        given, named = self.fetch_args_kwargs_from_env(node)
        for function in _named(target._schema.name.split("::")[-1]):
            try:
                found = function(*given, **named)
            except (TypeError, RuntimeError):
                continue
            if isinstance(found, Tensor) and found.stride() == value.stride() and torch.equal(found, value):
                return function
        return itself


def _named(name: str) -> Iterator[Callable[..., Any]]:
    for place in (torch, torch._C._nn, Tensor):
        function: Any = getattr(place, name, None)
        if type(function).__name__ in ("builtin_function_or_method", "method_descriptor"):
            yield function
