"""``x += y`` on a tensor that nothing else sees -> ``x = x + y``.

torch can remove all writes in place, by tracing a second time; that costs as much as the first. Most writes are of
this plain kind, and need no tracing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tilewright.frontend.table import TABLE

aten = torch.ops.aten
_MAY_GIVE_ITS_INPUT = {aten.dropout.default, aten.type_as.default}  # though their schemas do not say so


def make_plain_writes_functional(graph: fx.Graph) -> None:
    """Change every write in place that is certain to be seen only through its own result and its target."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        functional = _functional_form(node.target)
        if functional not in TABLE or not node.args or not _is_private(node.args[0]):
            continue
        target = node.args[0]
        node.target = functional
        target.replace_all_uses_with(node, delete_user_cb=lambda user, at=order[node]: order[user] > at)


def _functional_form(target: Any) -> Any:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``; None where there is nothing of that kind."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    if not name.endswith("_") or name.endswith("__"):
        return None
    return getattr(getattr(aten, name[:-1], None), overload, None)


def _is_private(node: Any) -> bool:
    """Whether ``node`` makes a new tensor, of which no view is taken."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    maker = node.args[0] if node.target is operator.getitem else node
    made = isinstance(maker, fx.Node) and maker.op == "call_function" and not _aliases(maker)
    return made and not any(_aliases(user) and _functional_form(user.target) is None for user in node.users)


def _aliases(node: fx.Node) -> bool:
    """Whether the node's result may share memory with an operand."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returns = node.target._schema.returns
    return node.target in _MAY_GIVE_ITS_INPUT or any(r.alias_info is not None for r in returns)
