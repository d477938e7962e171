"""What the strings under the fields of a dataclass say: the one place of a field's documentation, read for help."""

import ast
import functools
import inspect
import textwrap


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, on one line; those of fields that it inherits too."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {
        name: doc for base in reversed(cls.__bases__) if base is not object for name, doc in field_docs(base).items()
    }
    for entry, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[ast.unparse(entry.target)] = " ".join(str(below.value.value).split())
    return docs
