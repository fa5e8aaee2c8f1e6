"""Operations -> kernels: ``linear, add`` -> ``kernel.call {callee="k0"}`` and a ``kernel @k0`` with both as its body.

Kernels with the same canonical text are one kernel. Reshapes between kernels stay: they move nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tilewright.ir import Argument, Function, Module, Op, Return, Value, canonical, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.fuse_rules import (
    DECODING,
    is_anchor,
    is_copied,
    is_creation,
    is_rotated_by,
    is_view_of_columns,
    may_pull,
    may_trail,
)


@dataclass
class Group:
    """Operations that become one kernel; ``root`` is the last of them, the only one whose results leave."""

    root: Op
    ops: dict[Op, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ops[self.root] = None

    def owns_users_of(self, op: Op) -> bool:
        return all(user in self.ops for r in op.results for user in r.users)


@dataclass(frozen=True)
class Fuse(Pass):
    """Cut each function into kernels. ``mode="single"`` makes every operation its own kernel."""

    name: ClassVar[str] = "fuse"
    mode: Literal["full", "single"] = "full"

    def run(self, module: Module, ctx: PassContext) -> bool:
        kernels = {canonical(k): k.name for k in module.kernels()}
        changed = False
        for function in module.entries():
            for group in self.groups(function):
                outline(module, group, kernels)
                changed = True
            drop_dead(function)
        return changed

    def groups(self, function: Function) -> list[Group]:
        """Disjoint groups that cover every operation but reshapes and the return, in order of their roots."""
        taken: dict[Op, Group] = {}
        order = {op: i for i, op in enumerate(function.body)}
        work = [op for op in function.body if not isinstance(op, (Return, ops.Reshape, ops.Call))]
        for op in (o for o in work if is_anchor(o)):
            taken[op] = group = self.anchored(op, taken)
            taken.update(dict.fromkeys(group.ops, group))
        for op in reversed(work):
            if op not in taken and not self.only_cloned(op):
                group = Group(op)
                self.pull(group, taken)
                taken.update(dict.fromkeys(group.ops, group))
        return sorted({id(g): g for g in taken.values()}.values(), key=lambda g: order[g.root])

    def only_cloned(self, op: Op) -> bool:
        """A constant or view that each of its users copies into its own kernel needs none itself."""
        if self.mode == "single":
            return False
        users = [u for r in op.results for u in r.users]
        if is_creation(op):
            return not any(is_anchor(u) or isinstance(u, (Return, ops.Reshape, ops.Call)) for u in users)
        if isinstance(op, (*DECODING, ops.Threshold)):
            return all(is_copied(op, user) for user in users)
        return isinstance(op, ops.Slice) and is_view_of_columns(op) and all(map(reads_columns, users))

    def anchored(self, anchor: Op, taken: dict[Op, Group]) -> Group:
        """The anchor with the rotation it does on the way, and the elementwise operations that trail it."""
        group = Group(anchor)
        if self.mode == "single":
            return group
        rotations = [op for v in anchor.operands if (op := v.owner) is not None and is_rotated_by(op, anchor)]
        group.ops.update(dict.fromkeys(rotations))
        tail = anchor
        while len(tail.results) == 1 and len(tail.result.users) == 1:
            user = next(iter(tail.result.users))
            if user in taken or not may_trail(anchor, user):
                break
            group.ops[user] = None
            group.root = tail = user
        return group

    def pull(self, group: Group, taken: dict[Op, Group]) -> None:
        """Grow the group towards its operands while the rules let it."""
        if self.mode == "single":
            return
        work = [group.root]
        while work:
            for value in work.pop().operands:
                chain = producers(value)
                if not chain or any(p in taken or p in group.ops or not self.fits(group, p, chain) for p in chain):
                    continue
                group.ops.update(dict.fromkeys(chain))
                work.append(chain[-1])

    def fits(self, group: Group, op: Op, chain: list[Op]) -> bool:
        inside = all(u in group.ops or u in chain for r in op.results for u in r.users)
        return inside and (isinstance(op, ops.Reshape) or may_pull(op, group.ops))


def producers(value: Value) -> list[Op]:
    """The operation behind ``value``, with a reshape in between when there is one."""
    op = value.owner
    if not isinstance(op, ops.Reshape):
        return [op] if op is not None and not isinstance(op, ops.Call) else []
    behind = op.x.owner
    return [op, behind] if behind is not None and not isinstance(behind, (ops.Reshape, ops.Call)) else []


def reads_columns(user: Op) -> bool:
    """Whether ``user`` is an attention kernel's operation, or the rotation or the reshape into heads before some."""
    if isinstance(user, ops.Reshape):
        return is_view_of_columns(user) and all(map(reads_columns, user.result.users))
    if isinstance(user, ops.Rope):
        return any(is_rotated_by(user, u) for u in user.result.users)
    return isinstance(user, (ops.Attention, ops.Attend, ops.Append, ops.Select, ops.Choose))


def outline(module: Module, group: Group, kernels: dict[str, str]) -> None:
    """Move the group into a kernel function, or find the equal one, and call it where the root stood."""
    function = group.root.parent
    assert function is not None
    members = with_copies(group, [op for op in function.body if op in group.ops])
    kernel, operands = extract(free_name(module), members, group.root)
    name = kernels.setdefault(canonical(kernel), kernel.name)
    if name == kernel.name:
        module.add(kernel)
    call = ops.Call(operands, callee=name, types=group.root.result_types, loc=group.root.loc)
    function.insert(function.body.index(group.root), call)
    for old, new in zip(group.root.results, call.results):
        old.replace_all_uses(new)
    for op in sorted(group.ops, key=function.body.index, reverse=True):
        op.drop()


def free_name(module: Module) -> str:
    """A name for the next kernel."""
    n = len(module.kernels())
    while f"k{n}" in module.functions:
        n += 1
    return f"k{n}"


def with_copies(group: Group, members: list[Op]) -> list[Op]:
    """The members, led by the constants and column views that are copied into the kernel, operands first."""
    out: list[Op] = []

    def visit(op: Op) -> None:
        for value in op.operands:
            owner = value.owner
            if owner is not None and owner not in group.ops and copied_into(op, owner):
                visit(owner)
        if op not in out:
            out.append(op)

    for op in members:
        visit(op)
    return out


def copied_into(user: Op, producer: Op) -> bool:
    if not isinstance(user, ops.Reshape) and reads_columns(user):
        return is_view_of_columns(producer)
    if isinstance(user, ops.Reshape) and isinstance(producer, ops.Slice):
        return is_view_of_columns(producer)
    return is_copied(producer, user) or (is_creation(producer) and not is_anchor(user))


def extract(name: str, members: Iterable[Op], root: Op) -> tuple[Function, tuple[Value, ...]]:
    """A kernel function with copies of ``members``, and the outer values its arguments stand for."""
    kernel = Function(name, kind="kernel")
    mapping: dict[Value, Value] = {}
    operands: list[Value] = []
    for op in members:
        for value in op.operands:
            if value not in mapping:
                mapping[value] = kernel_arg = Argument(f"a{len(operands)}", value.type)
                kernel.args.append(kernel_arg)
                operands.append(value)
        copy = kernel.append(op.clone(mapping))
        mapping.update(zip(op.results, copy.results))
    kernel.append(Return(tuple(mapping[r] for r in root.results)))
    return kernel, tuple(operands)


def unfuse(module: Module, name: str) -> None:
    """Undo the fusion of kernel ``name``: every call becomes one kernel an operation, unplanned."""
    kernel = module.functions.pop(name)
    for call in [op for op in module.ops(ops.Call) if isinstance(op, ops.Call) and op.callee == name]:
        function = call.parent
        assert function is not None
        mapping: dict[Value, Value] = dict(zip(kernel.args, call.args))
        for op in kernel.body[:-1]:
            copy = function.insert(function.body.index(call), op.clone(mapping))
            mapping.update(zip(op.results, copy.results))
        for old, new in zip(call.results, kernel.returns):
            old.replace_all_uses(mapping[new])
        call.drop()
    Fuse(mode="single").run(module, PassContext())


def drop_dead(function: Function) -> None:
    """Drop the originals of copied constants and views."""
    for op in reversed(function.body[:]):
        if not op.has_effect and not any(r.users for r in op.results):
            op.drop()
