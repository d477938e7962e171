"""What the Markdown files promise: links lead somewhere, and commands are ones that mmcl and make know."""

import argparse
import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mmcl_launch.cli import build_parser
from mmcl_launch.config import field_lines, recipe_names

ROOT = Path(__file__).parents[2]
NOT_OURS = {"build", "dist", "runs"}
"""Folders at the top that hold what programs wrote. Hidden folders are left out, too."""
SHELLS = ("bash", "sh")
WRAPPERS = ("srun", "nice", "time", "env")


def documents(root: Path) -> list[Path]:
    """The Markdown files below `root`."""
    found = []
    for folder, inner, names in os.walk(root):
        at_top = Path(folder) == root
        inner[:] = sorted(name for name in inner if not name.startswith(".") and not (at_top and name in NOT_OURS))
        found += [Path(folder) / name for name in sorted(names) if name.lower().endswith((".md", ".markdown"))]
    return found


def parse(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


# Links


def link_problems(root: Path) -> list[str]:
    """`FILE:LINE: what is wrong` for each link below `root` that leads nowhere. Other hosts are not asked."""
    problems = []
    for path in documents(root):
        for token in parse(path):
            line = token.map[0] + 1 if token.map else 0
            for target in targets(token):
                if cause := broken(target, path, root):
                    problems.append(f"{path.relative_to(root)}:{line}: {target}: {cause}")
    return problems


def targets(token: Token) -> Iterator[str]:
    """What a block links to; also what was meant as a link and is none."""
    if token.type == "html_block":
        yield from html_targets(token.content)
    for part in token.children or []:
        if part.type in ("link_open", "image"):
            yield str(part.attrs.get("href") or part.attrs.get("src") or "")
        if part.type == "image":
            yield from targets(part)
        if part.type == "html_inline":
            yield from html_targets(part.content)
        if part.type == "text":  # an undefined reference, or a target with a space
            yield from re.findall(r"\[[^\[\]]*\](?:\[[^\]]*\]|\([^)]*\))", part.content)


def html_targets(html: str) -> list[str]:
    return re.findall(r"""\b(?:href|src)\s*=\s*["']([^"']*)""", html)


def broken(target: str, path: Path, root: Path) -> str | None:
    """Why a link of `path` leads nowhere."""
    if target.startswith("["):
        return "not a link: the reference is not defined, or the target holds a space"
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return None if parts.scheme in ("http", "https", "mailto") else f"scheme {parts.scheme!r}"
    if not target.strip("#") or parts.path.startswith("/"):
        return "empty, or an absolute path"
    file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    return broken_file(file, root) or broken_anchor(file, unquote(parts.fragment))


def broken_file(file: Path, root: Path) -> str | None:
    if not file.is_relative_to(root.resolve()):
        return "outside the repository"
    return None if file.exists() else "no such file"


def broken_anchor(file: Path, anchor: str) -> str | None:
    if anchor and file.suffix.lower() != ".md":
        return "an anchor in a file that is not Markdown"
    return "no such heading" if anchor and anchor not in anchors(file) else None


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a file, and anchors given in HTML."""
    tokens = parse(path)
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for before, token in itertools.pairwise(tokens):
        if before.type == "heading_open":
            text = "".join(part.content for part in token.children or [] if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    found.update(re.findall(r"""<a\s+(?:id|name)=["']([^"']+)""", path.read_text(encoding="utf-8")))
    return found


# Commands


def command_problems(root: Path) -> list[str]:
    """`FILE:LINE: COMMAND: what is wrong` for each command in a block of code below `root`."""
    problems = []
    for path in documents(root):
        for token in parse(path):
            if token.type in ("fence", "code_block"):
                where = f"{path.relative_to(root)}:{token.map[0] + 1 if token.map else 0}"
                problems += [f"{where}: {problem}" for problem in block_problems(token, root)]
    return problems


def block_problems(token: Token, root: Path) -> Iterator[str]:
    if (token.info.split() or [""])[0] not in SHELLS:
        if found := re.search(r"^\s*(?:\$ )?(?:\S*/)?(?:mmcl|make) .*", token.content, re.MULTILINE):
            yield f"{found[0].strip()}: a command, but the block is not marked bash or sh, so nobody would check it"
        return
    for words in commands(token.content):
        if cause := wrong(words, root):
            yield f"{shlex.join(words)}: {cause}"


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a script, without variables and wrappers in front."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                if words := list(without_wrappers(words)):
                    yield words
                words = []
            else:
                words.append(word)


def without_wrappers(words: list[str]) -> list[str]:
    for number, word in enumerate(words):
        if not (re.match(r"\w+=", word) or word in WRAPPERS or (number and word.startswith("-"))):
            return [word.rsplit("/", 1)[-1] if word.endswith(("/mmcl", "/make")) else word, *words[number + 1 :]]
    return []


def wrong(words: list[str], root: Path) -> str | None:
    """Why a command cannot work."""
    if words[0] == "$":
        return "leave the prompt out, so that the command can be copied"
    if words[0] == "mmcl":
        return wrong_mmcl(words[1:])
    if words[0] == "make":
        known = make_targets(root)
        unknown = [word for word in words[1:] if word not in known and "=" not in word]
        return f"no target {unknown}, there are {sorted(known)}" if unknown else None
    missing = [word for word in words if re.search(r"\.(py|sh|sbatch)(::|$)", word)]
    missing = [word for word in missing if not (root / word.split("::")[0]).exists()]
    return f"no such file: {missing}" if missing else None


def wrong_mmcl(words: list[str]) -> str | None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            args, rest = build_parser().parse_known_args(words)
    except SystemExit as end:  # --help ends with 0
        return said.getvalue().strip().splitlines()[-1] if end.code else None
    return wrong_overrides(args, rest) or wrong_recipes(args)


def wrong_overrides(args: argparse.Namespace, rest: list[str]) -> str | None:
    if rest and not args.overridable:
        return f"unrecognized arguments: {rest}"
    pairs = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(pairs) % 2:
        return f"overrides are pairs of --field value, found {rest}"
    known = [re.escape(name).replace("NAME", "[^.]+") for name, _, _ in field_lines()]
    for name in pairs[::2]:  # below a field that is a dict, anything goes
        if not any(re.fullmatch(rf"--{field}(\..+)?", name) for field in known):
            return f"no field {name}"
    return None


def wrong_recipes(args: argparse.Namespace) -> str | None:
    unknown = [name for name in getattr(args, "config", []) if "." not in name and name not in recipe_names()]
    return f"no recipe {unknown}" if unknown else None


def make_targets(root: Path) -> set[str]:
    return set(re.search(r"^\.PHONY:(.*)$", (root / "Makefile").read_text(), re.MULTILINE)[1].split())  # type: ignore


# What holds


def test_every_link_in_the_repository_leads_somewhere():
    assert ROOT / "README.md" in documents(ROOT)
    assert link_problems(ROOT) == []


def test_every_command_in_the_documents_is_one_that_exists():
    assert command_problems(ROOT) == []


def test_make_alone_lists_every_target():
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert {line.split()[1] for line in listed.splitlines()} == make_targets(ROOT)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/other.md").write_text("# The `a.b` rule: x_y!\n\n## Twice\n\n## Twice\n\n<a id='here'></a>\n")
    (tmp_path / "docs/tool.py").touch()
    (tmp_path / "Makefile").write_text(".PHONY: check test\n")
    return tmp_path


GOOD_LINKS = """
[a](docs/other.md) [`b`](docs/other.md#the-ab-rule-x_y) [c](docs/) [d](#top "title") [e](https://example.com/none)
[f](docs/other.md#twice-1) [g](docs/other.md#here) [h][ref] ![i](docs/tool.py) <a href="docs/tool.py">j</a> `[k](none)`

| table | |
|---|---|
| [l](docs/tool.py) | a[i] (or b) |

```text
[m](none.md)
```

[ref]: docs/tool.py

# Top
"""


def test_links_that_lead_somewhere_are_no_problem(tree):
    (tree / "README.md").write_text(GOOD_LINKS)
    assert link_problems(tree) == []


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[a](none.md)", "no such file"),
        ("[`a`](none.md)", "no such file"),
        ("![a](none.png)", "no such file"),
        ("[![a](none.png)](README.md)", "no such file"),
        ("<img src='none.png'>", "no such file"),
        ("text <a href='none.md'>a</a>", "no such file"),
        ("| a |\n|---|\n| [a](none.md) |", "no such file"),
        ("[a][r]\n\n[r]: none.md", "no such file"),
        ("[a][r]", "not a link"),
        ("[a](my file.md)", "not a link"),
        ("[a](#none)", "no such heading"),
        ("[a](docs/other.md#twice-2)", "no such heading"),
        ("[a](docs/tool.py#L3)", "not Markdown"),
        ("[a](/README.md)", "absolute"),
        ("[a](../README.md)", "outside"),
        ("[a](ftp://example.com/a)", "scheme"),
        ("[a]()", "empty"),
    ],
)
def test_a_link_that_leads_nowhere_is_named_with_file_and_line(tree, text, cause):
    (tree / "README.md").write_text(f"# Top\n\n{text}\n")
    (problem,) = link_problems(tree)
    assert re.match(r"README\.md:[35]: ", problem)
    assert cause in problem


def test_documents_deep_in_the_tree_are_read_and_those_of_runs_are_not(tree):
    for folder in ("a/b/c", "runs/x", ".venv/lib", "a/build"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "x.md").write_text("[a](none.md)")
    assert [problem.split(":")[0] for problem in link_problems(tree)] == ["a/b/c/x.md", "a/build/x.md"]


GOOD_COMMANDS = """
mmcl --help                # anything may be said here
mmcl train --config world --out runs/a --train.steps 10 --optim.lr=0.1 && mmcl eval runs/a --evals.limit 5
mmcl train --config world mine.yaml \\
  --data.sources.image_text.weight 2
A=1 srun --ntasks=2 .venv/bin/mmcl data check 'a/{0..9}.tar' > log.txt
make check test PYTHON=python3.12
python docs/tool.py --json x; pytest docs/tool.py::test_a
git clone https://example.com/mmcl
"""


def test_commands_that_exist_are_no_problem(tree):
    (tree / "README.md").write_text(f"```bash\n{GOOD_COMMANDS}```\n\n```text\nmmcl/  the core\nmakes sense\n```\n")
    assert command_problems(tree) == []


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("mmcl trian --config world", "invalid choice"),
        ("mmcl train", "--config"),
        ("mmcl train --config wrld", "no recipe"),
        ("mmcl train --config world --train.stepz 10", "no field --train.stepz"),
        ("mmcl train --config world --data.sources.a.weigth 10", "no field"),
        ("mmcl train --config world --train.steps", "pairs"),
        ("mmcl export runs/a --out b --train.steps 10", "unrecognized"),
        ("mmcl data world --out a --samples ten", "invalid"),
        ("cd a && A=1 nice .venv/bin/mmcl none", "invalid choice"),
        ("true | mmcl none", "invalid choice"),
        ("mmcl data \\\n  none", "invalid choice"),
        ("make everything", "no target ['everything']"),
        ("make check everything", "no target ['everything']"),
        ("pytest docs/none.py::test_a", "no such file"),
        ("sbatch --nodes=2 slurm/none.sbatch", "no such file"),
        ("$ make check", "prompt"),
    ],
)
@pytest.mark.parametrize("shell", SHELLS)
def test_a_command_that_does_not_exist_is_named(tree, shell, command, cause):
    (tree / "docs/other.md").write_text(f"Text.\n\n```{shell}\n{command}\n```\n")
    (problem,) = command_problems(tree)
    assert problem.startswith("docs/other.md:3: ")
    assert cause in problem


@pytest.mark.parametrize(
    "block", ["```\nmmcl train\n```", "```console\n$ make check\n```", "    .venv/bin/mmcl train\n"]
)
def test_a_command_in_a_block_that_would_not_be_checked_is_named(tree, block):
    (tree / "README.md").write_text(f"Text.\n\n{block}\n")
    (problem,) = command_problems(tree)
    assert "not marked bash" in problem
