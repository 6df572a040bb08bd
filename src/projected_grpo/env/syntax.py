"""Which parts of Python a test may use. What is left out is refused when the test is loaded, with its name.

Left out on purpose: exceptions, classes, attributes of results (a node's `.val`), generators of one's own, `global`.
"""

import ast

from projected_grpo.env import operators

_STATEMENTS: tuple[type[ast.stmt], ...] = (ast.Assert, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.If)
_STATEMENTS += (ast.For, ast.While, ast.FunctionDef, ast.Return, ast.Pass, ast.Break, ast.Continue)
_STATEMENTS += (ast.Import, ast.ImportFrom)
_EXPRESSIONS: tuple[type[ast.expr], ...] = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Name, ast.UnaryOp)
_EXPRESSIONS += (ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript, ast.Slice, ast.Call, ast.Lambda)
_EXPRESSIONS += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Attribute, ast.Starred, ast.JoinedStr)
_EXPRESSIONS += (ast.FormattedValue,)


class UnsupportedTest(ValueError):
    """A test that cannot be judged from plain data; the message says which part of it."""


def check(body: list[ast.stmt], known: set[str]) -> None:
    """Raises UnsupportedTest for what `Interpreter` cannot run. `known`: names that the setup code gives."""
    nodes = [node for statement in body for node in _walk(statement)]
    bound = known | _bound(nodes)
    holders = _instances(nodes)
    for node in nodes:
        _check_node(node, bound, holders)


def mentions_solution(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Name) and part.id == "Solution" for part in _walk(node))


def _walk(root: ast.AST) -> list[ast.AST]:
    """Every node that would be run: annotations, type comments and the messages of asserts are not."""
    found, todo = [], [root]
    while todo:
        node = todo.pop()
        found.append(node)
        match node:
            case ast.Assert(test=test):
                todo.append(test)
            case ast.AnnAssign(target=target, value=value):
                todo += [target] if value is None else [target, value]
            case ast.FunctionDef(args=args, body=body):
                todo += [*args.args, *args.defaults, *body]
            case ast.arg():
                pass
            case _:
                todo += ast.iter_child_nodes(node)
    return found


def _bound(nodes: list[ast.AST]) -> set[str]:
    bound = set()
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name) | ast.arg(arg=name):
                bound.add(name)
            case ast.alias(name=name, asname=asname):
                bound.add(asname or name)
    return bound


def _instances(nodes: list[ast.AST]) -> set[str]:
    """Names that may hold an object of class Solution: assigned from one, looped over some, or a parameter of a test
    that passes one on."""
    found = {"Solution"}
    for _ in range(2):  # a name may be made from one that stands further down, in a function
        for node in nodes:
            match node:
                case ast.Assign(targets=targets, value=value) if _may_hold(value, found):
                    found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if _may_hold(value, found):
                    found.add(name)
                case ast.For(target=target, iter=items) | ast.comprehension(target=target, iter=items):
                    if _may_hold(items, found):
                        found |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
                case ast.Call(args=args) if any(_may_hold(arg, found) for arg in args):
                    found |= {part.arg for part in nodes if isinstance(part, ast.arg)}
    return found


def _may_hold(node: ast.expr, holders: set[str]) -> bool:
    """Whether an expression may be an object of class Solution, or hold some; what its methods return is none."""
    match node:
        case ast.Name(id=name):
            return name in holders
        case ast.Call(func=ast.Name(id=name)):
            return name == "Solution"
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return any(_may_hold(part, holders) for part in parts)
        case ast.Dict(values=parts):
            return any(_may_hold(part, holders) for part in parts)
        case ast.ListComp(elt=part) | ast.Subscript(value=part):
            return _may_hold(part, holders)
    return False


def _check_node(node: ast.AST, bound: set[str], holders: set[str]) -> None:
    if isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS):
        raise UnsupportedTest(f"uses the statement `{ast.unparse(node)[:60]}`")
    if isinstance(node, ast.expr) and not isinstance(node, _EXPRESSIONS):
        raise UnsupportedTest(f"uses the expression `{ast.unparse(node)[:60]}`")
    match node:
        case ast.FunctionDef(name=name, args=args, decorator_list=decorators):
            if decorators or args.vararg or args.kwarg or args.kwonlyargs or args.posonlyargs:
                raise UnsupportedTest(f"defines {name} with decorators or parameters that are not plain")
        case ast.Lambda(args=args):
            if args.vararg or args.kwarg or args.kwonlyargs or args.posonlyargs:
                raise UnsupportedTest(f"uses the expression `{ast.unparse(node)[:60]}`")
        case ast.For(orelse=[_, *_]) | ast.While(orelse=[_, *_]):
            raise UnsupportedTest("uses `else` after a loop")
        case ast.Import(names=names) if not all(name.name in operators.MODULES and not name.asname for name in names):
            raise UnsupportedTest(f"uses the statement `{ast.unparse(node)[:60]}`")
        case ast.ImportFrom(module=module, names=names):
            if not all(f"{module}.{name.name}" in operators.FUNCTIONS and not name.asname for name in names):
                raise UnsupportedTest(f"uses the statement `{ast.unparse(node)[:60]}`")
        case ast.Name(id=name) if name not in bound and name not in operators.NAMES and name != "Solution":
            if name not in operators.MODULES:
                raise UnsupportedTest(f"uses the name `{name}`")
        case ast.Attribute(value=value, attr=attr):
            known = attr in operators.METHODS or ast.unparse(node) in operators.FUNCTIONS
            if not (known or _may_hold(value, holders)) or not isinstance(node.ctx, ast.Load):
                raise UnsupportedTest(f"uses `{ast.unparse(node)[:60]}`")
        case ast.Call(func=ast.Name(id="Solution"), args=args, keywords=keywords) if args or keywords:
            raise UnsupportedTest("makes a Solution with arguments")
        case ast.Compare(ops=ops, left=left, comparators=comparators):
            sides = (left, *comparators)
            for op, *pair in zip(ops, sides, sides[1:], strict=False):
                if isinstance(op, ast.Is | ast.IsNot) and not any(isinstance(side, ast.Constant) for side in pair):
                    raise UnsupportedTest(f"asks for identity in `{ast.unparse(node)[:60]}`")
        case ast.FormattedValue(format_spec=spec) if spec is not None:
            raise UnsupportedTest("uses a format specification")
