"""Setup code that does nothing but define things: the template may run it once and give it to every completion.

The code is the data set's, not a model's; what might compute at length, call out or read a file when it is loaded runs
with each completion instead, under its limits.
"""

import ast
import functools
import hashlib

_CALLS = {"float", "int", "lru_cache", "functools.lru_cache", "cache", "functools.cache", "dataclass", "set", "dict"}
MAX_EXPONENT = 100


@functools.lru_cache(maxsize=256)
def setup_key(setup_code: str) -> str | None:
    """A name for the code, from its content; None where it is more than imports, definitions and constants."""
    try:
        body = ast.parse(setup_code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return hashlib.sha256(setup_code.encode()).hexdigest() if all(map(_defines, body)) else None


def _defines(node: ast.stmt) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Pass():
            return True
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            arguments = node.args
            evaluated = [*node.decorator_list, *arguments.defaults, *filter(None, arguments.kw_defaults)]
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            annotations = [argument.annotation for argument in every]
            return all(map(_is_constant, [*evaluated, *filter(None, [*annotations, node.returns])]))
        case ast.ClassDef(body=body, bases=bases, keywords=[], decorator_list=decorators):
            return all(map(_is_constant, [*bases, *decorators])) and all(map(_defines, body))
        case ast.Assign(targets=targets, value=value):
            return all(isinstance(target, ast.Name) for target in targets) and _is_constant(value)
        case ast.AnnAssign(target=ast.Name(), annotation=annotation, value=value):
            return _is_constant(annotation) and (value is None or _is_constant(value))
        case ast.Expr(value=ast.Constant()):
            return True
    return False


def _is_constant(root: ast.expr) -> bool:
    """Whether evaluating the expression takes no time and does nothing: names, constants, small arithmetic."""
    for node in ast.walk(root):
        match node:
            case ast.Call(func=function):
                if ast.unparse(function) not in _CALLS:
                    return False
            case ast.BinOp(op=ast.Pow(), right=right):
                if (
                    not isinstance(right, ast.Constant)
                    or not isinstance(right.value, int)
                    or right.value > MAX_EXPONENT
                ):
                    return False
            case ast.BinOp(
                op=ast.Mult(), left=ast.Constant(value=int() | float()), right=ast.Constant(value=int() | float())
            ):
                pass
            case ast.BinOp(op=ast.LShift(), left=ast.Constant(value=int()), right=ast.Constant(value=int(by))):
                if by > MAX_EXPONENT:
                    return False
            case ast.BinOp(op=ast.Mult() | ast.LShift()):
                return False
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp() | ast.Lambda():
                return False
            case ast.NamedExpr() | ast.Await() | ast.Yield() | ast.YieldFrom() | ast.JoinedStr():
                return False
    return True
