"""What the modes look for in a completion's syntax tree."""

import ast
from collections.abc import Iterator, Sequence


def strings(tree: ast.Module | None) -> Iterator[str]:
    """Every text of the code that is no docstring of it; none where it does not parse."""
    if tree is None:
        return
    said = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


def binds(tree: ast.Module | None, wanted: str, *, module_level: bool) -> bool:
    """Whether the code binds a name on Solution, on a base of it or on any object, or (`module_level`) at the top."""
    if tree is None:
        return False
    module = list(_scope(tree.body))
    bound = {name for node in module for name in _bound_names(node)} if module_level else set()
    for owner in _solution_classes(module):
        bound |= {name for node in _scope(owner.body) for name in _bound_names(node)}
    for node in ast.walk(tree):
        bound.update(_bound_from_anywhere(node, module_level))
    return wanted in bound


def _scope(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Every node of one scope: functions and classes in it are named, not entered."""
    nodes: list[ast.AST] = list(body)
    while nodes:
        node = nodes.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)


def _solution_classes(module: list[ast.AST]) -> list[ast.ClassDef]:
    """Class Solution and the classes of the module that it inherits from."""
    named: dict[str, list[ast.ClassDef]] = {}
    for node in module:
        if isinstance(node, ast.ClassDef):
            named.setdefault(node.name, []).append(node)
    found, wanted = [], ["Solution"]
    while wanted:
        new = named.pop(wanted.pop(), [])
        found += new
        wanted += [base.id for node in new for base in node.bases if isinstance(base, ast.Name)]
    return found


def _bound_names(node: ast.AST) -> tuple[str, ...]:
    """Names that a statement binds in its own scope: a definition, an assignment, an import."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return (name,)
        case ast.Name(id=name, ctx=ast.Store()):
            return (name,)
        case ast.alias(name=name, asname=asname):
            return (asname or name,)
    return ()


def _bound_from_anywhere(node: ast.AST, module_level: bool) -> Sequence[str]:
    """Names that reach an object or the module out of any scope: an attribute, setattr, `global`."""
    match node:
        case ast.Attribute(attr=name, ctx=ast.Store()):
            return (name,)
        case ast.Global(names=names) if module_level:
            return names
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=str(name)), _]):
            return (name,)
    return ()
