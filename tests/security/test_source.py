"""No module of ours can run what it reads: the calls that could are in none of them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file for folder in ("mmcl", "data_pipelines", "evals", "launch") for file in (ROOT / folder).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load"),
    *("yaml.full_load", "os.system", "os.popen", "pty.spawn", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("shutil.unpack_archive", "tarfile.open", "wds.WebDataset"),
}
METHODS = {"extractall", "extract", "unsafe_load", "full_load"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def offences(source: str) -> list[str]:
    """What a module does that ours must not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: import {name}" for name in modules if name.partition(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {what}" for what in _of_call(node)]
    return found


def _of_call(node: ast.Call) -> list[str]:
    name = dotted(node.func)
    values = {keyword.arg: keyword.value for keyword in node.keywords}
    found = []
    if name in ("np.load", "numpy.load"):
        if not (isinstance(allow := values.get("allow_pickle"), ast.Constant) and allow.value is False):
            found.append(f"{name} without allow_pickle=False")
    elif name == "tarfile.open":
        mode = values.get("mode", node.args[1] if len(node.args) > 1 else None)
        if not (isinstance(mode, ast.Constant) and str(mode.value).startswith("w")):
            found.append("tarfile.open for reading")
    elif name in CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
        found.append(name or node.func.attr)
    for word in ("shell", "trust_remote_code", "allow_pickle"):
        if word in values and not (isinstance(value := values[word], ast.Constant) and value.value is False):
            found.append(f"{word}=")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_runs_nothing_that_it_reads(file):
    assert offences(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "torch.load('x', weights_only=True)",
            "yaml.load(x)",
            "eval('1')",
        ),
        *(
            "subprocess.run('ls', shell=True)",
            "tar.extractall()",
            "os.system('ls')",
            "np.load('x')",
            "tarfile.open('x')",
        ),
        *("exec(code)", "np.load('x', allow_pickle=True)", "AutoModel.from_pretrained(x, trust_remote_code=flag)"),
    ],
)
def test_what_would_run_something_is_seen(source):
    assert len(offences(source)) >= 1
