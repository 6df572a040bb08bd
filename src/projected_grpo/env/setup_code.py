"""Setup code that does nothing but define things: the template may run it once and give it to every completion.

The code is the data set's, not a model's, but the template has no limits and no walls around it. So what is accepted is
a short list (imports, functions, plain classes, constants), and anything else runs with each completion.
"""

import ast
import functools
import hashlib

_MAKERS = {"float", "int", "set", "dict", "list"}
_DECORATORS = {"cache", "lru_cache", "dataclass", "staticmethod", "classmethod", "property"}
_HOMES = {"functools": {"cache", "lru_cache"}, "dataclasses": {"dataclass"}}
_METHODS = {"__init__", "__repr__", "__str__", "__eq__", "__lt__", "__hash__", "__len__", "__iter__"}
"""Special methods that nothing calls while the class is made."""
_NUMERIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.LShift)
MAX_FACTOR, MAX_EXPONENT = 10**12, 100


@functools.lru_cache(maxsize=256)
def setup_key(setup_code: str) -> str | None:
    """A name for the code, from its content; None where it is more than imports, definitions and constants."""
    try:
        body = ast.parse(setup_code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes = [node for statement in body for node in ast.walk(statement)]
    if any(name in _MAKERS | _DECORATORS | {"functools"} for node in nodes for name in _rebound(node)):
        return None
    return hashlib.sha256(setup_code.encode()).hexdigest() if all(map(_defines, body)) else None


def _rebound(node: ast.AST) -> list[str]:
    """Names that get another meaning than Python's own or their module's."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
            return [name]
        case ast.ImportFrom(module=module, names=names):
            own = _HOMES.get(module or "", set())
            return [name.asname or name.name for name in names if name.asname or name.name not in own]
        case ast.Import(names=names):
            return [name.asname for name in names if name.asname]
    return []


def _defines(node: ast.stmt) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom(level=0) | ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case (
            ast.FunctionDef(args=given, decorator_list=decorators, returns=returns)
            | ast.AsyncFunctionDef(args=given, decorator_list=decorators, returns=returns)
        ):
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            annotations = [returns, *(argument.annotation for argument in every)]
            defaults = [*given.defaults, *filter(None, given.kw_defaults)]
            return all(map(_is_decorator, decorators)) and all(map(_is_constant, defaults)) and _are_types(annotations)
        case ast.ClassDef(name=name, body=body, bases=bases, keywords=[], decorator_list=decorators):
            methods = [part.name for part in body if isinstance(part, ast.FunctionDef)]
            plain = all(not method.startswith("__") or method in _METHODS for method in methods)
            named = all(isinstance(base, ast.Name) for base in bases) and name != "type"
            return plain and named and all(map(_is_decorator, decorators)) and all(map(_defines, body))
        case ast.Assign(targets=targets, value=value):
            return all(isinstance(target, ast.Name) for target in targets) and _is_constant(value)
        case ast.AnnAssign(target=ast.Name(), annotation=annotation, value=value):
            return _are_types([annotation]) and (value is None or _is_constant(value))
    return False


def _is_decorator(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=function, args=args, keywords=keywords):
            given = [*args, *(keyword.value for keyword in keywords)]
            return _is_decorator(function) and all(isinstance(value, ast.Constant) for value in given)
        case ast.Attribute(value=ast.Name(id="functools"), attr=name) | ast.Name(id=name):
            return name in _DECORATORS
    return False


def _are_types(annotations: list) -> bool:
    """Whether annotations are names, and names in brackets; a class of the setup code has no `__class_getitem__`."""
    allowed = (
        ast.Name,
        ast.Constant,
        ast.Subscript,
        ast.Tuple,
        ast.List,
        ast.Attribute,
        ast.BinOp,
        ast.BitOr,
        ast.Load,
    )
    return all(isinstance(part, allowed) for node in annotations if node for part in ast.walk(node))


def _is_constant(node: ast.expr) -> bool:
    """Whether evaluating the expression takes no time and does nothing."""
    match node:
        case ast.Constant() | ast.Name() | ast.UnaryOp(op=ast.USub(), operand=ast.Name()):
            return True
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return name in _MAKERS and len(args) <= 1 and all(isinstance(arg, ast.Constant) for arg in args)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _NUMERIC):
            if isinstance(op, ast.Pow | ast.LShift):
                return _is_number(left, MAX_FACTOR) and _is_number(right, MAX_EXPONENT)
            return all(_is_number(side, MAX_FACTOR) or _is_sum(side) for side in (left, right))
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return False
    return True


def _is_sum(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and _is_constant(node)


def _is_number(node: ast.expr, most: int) -> bool:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value) | float(value))):
            return abs(value) <= most
        case ast.Constant(value=int(value) | float(value)):
            return abs(value) <= most
    return False
