"""Test that docstrings, comments, messages and documents are in plain English."""

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from inspect import cleandoc
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("projects", "tools", "tests", "configs", "docs", "setup.py", *ROOT.glob("*.md"))
BANNED = {
    "write 'None' or 'no ...' for 'none'": re.compile(r"\b(is|are) none\b"),
    "write 'so that ... not' for 'lest'": re.compile(r"\blest\b", re.I),
    "write 'fix' for 'mend'": re.compile(r"\bmend(s|ed|ing)?\b", re.I),
    "write 'image' for 'picture'": re.compile(r"\bpictures?\b", re.I),
    "begin with a subject": re.compile(r"^(what|of|whether|how far)\b(?!.*\?$)", re.I),
}
SUFFIXES = {".md", ".py", ".yaml"}
MAX_WORDS = 25
MATH = re.compile(r"[=<>^|√∑Σ∈⊙←→⌊²·\u2212\u00d7]")  # no word limit for equations
CODE = re.compile(r"``.*?``|`[^`]*`|\"[^\"]*\"|\]\(.*?\)|https?://\S+", re.DOTALL)
BLOCK = re.compile(r"::\n(?:\n| {4}.*(?:\n|$))+")
NAMES = r"[\w*]+(?:, [\w*]+)*: "  # in Args
UNIT = re.compile(rf"\n\s*\n(?:\w+:\n)?|\n(?= {{4}}{NAMES})|\n(?=\s*(?:[-*]|\d+\.) )")
LABEL = re.compile(rf"\s*(?:[-*] |\d+\. |{NAMES})?")
SENTENCE = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<! al\.)(?<!Sec\.)(?<!Eq\.)\s+")
NO_PROSE = re.compile(r"```.*?```|^[|#<][^\n]*", re.DOTALL | re.MULTILINE)  # in Markdown

Prose = tuple[int, str, bool]  # line, text, True for a docstring


def prose_in(source: str, suffix: str, messages: bool) -> Iterator[Prose]:
    """Yield docstrings, comments, messages and paragraphs."""
    if suffix == ".md":
        text = NO_PROSE.sub(lambda m: "\n" * m[0].count("\n"), source)
        for m in re.finditer(r".+(?:\n.+)*", text):
            yield text.count("\n", 0, m.start()) + 1, m[0], False
    elif suffix == ".yaml":
        found = ((k, x, re.search(r"(?<!\S)#.*", x)) for k, x in enumerate(source.split("\n"), 1))
        yield from joined((k, x, m[0]) for k, x, m in found if m)
    else:
        yield from strings(ast.parse(source), messages)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = (t for t in tokens if t.type == tokenize.COMMENT)
        yield from joined((t.start[0], t.line, t.string) for t in comments)


def strings(node: ast.AST, messages: bool) -> Iterator[Prose]:
    """Yield docstrings and, if ``messages``, all strings of more than three words."""
    for child in ast.iter_child_nodes(node):
        value = child.value if isinstance(child, ast.Expr) else child
        parts = value.values if isinstance(value, ast.JoinedStr) else [value]
        text = "".join(str(x.value) if isinstance(x, ast.Constant) else "x" for x in parts)
        if not isinstance(value, ast.JoinedStr | ast.Constant):
            yield from strings(child, messages)
        elif value is not child or (messages and len(text.split()) > 3):
            yield value.lineno, cleandoc(text), value is not child


def joined(comments: Iterable[tuple[int, str, str]]) -> list[Prose]:
    """Join the lines of block comments, given (line, whole line, comment)."""
    prose: list[Prose] = []
    last = -1
    for line, whole, comment in comments:
        block = whole.lstrip().startswith("#")
        if not block or last != line - 1:
            prose.append((line, "", False))
        prose[-1] = prose[-1][0], f"{prose[-1][1]}{comment.lstrip('#- ')}\n", False
        last = line if block and not comment.startswith("# --") else -1
    return prose


def faults(source: str, suffix: str = ".py", messages: bool = True) -> Iterator[str]:
    """Yield "line: rule: sentence" for every sentence that breaks a rule."""
    for line, text, docstring in prose_in(source, suffix, messages):
        if docstring and text.startswith("That "):
            yield f"{line}: begin with a verb or a noun: {text.splitlines()[0]}"
        for unit in UNIT.split(CODE.sub("code", BLOCK.sub("\n\n", text))):
            for sentence in SENTENCE.split(" ".join(LABEL.sub("", unit, count=1).split())):
                rules = [rule for rule, pattern in BANNED.items() if pattern.search(sentence)]
                long = len(re.findall(r"[^\W\d]\S*", sentence)) > MAX_WORDS
                rules += [f"write at most {MAX_WORDS} words"] * (long and not MATH.search(sentence))
                yield from (f"{line}: {rule}: {sentence}" for rule in rules)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS, ids=lambda part: Path(part).name)
def test_prose(part: str) -> None:
    paths = [x for x in (ROOT / part, *(ROOT / part).rglob("*")) if x.suffix in SUFFIXES]
    assert paths and not [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in sorted(paths)
        for fault in faults(path.read_text("utf-8"), path.suffix, messages=part != "tests")
    ]


LONG = " ".join(["word"] * 26)
SAMPLES = [
    ('"""What it is."""', ".py", "subject"),
    ('"""That of the head."""', ".py", "verb or a noun"),
    ('"""Return x.\n\n    Args:\n        x: whether it is so.\n    """', ".py", "subject"),
    ("x = 1  # of the head", ".py", "subject"),
    ("# Short. How far it\n# goes.", ".py", "subject"),
    ("# There is\n# one, and there are none.", ".py", "'none'"),
    ("def f():\n    '''Wait lest it fails.'''", ".py", "'lest'"),
    ("raise ValueError(f'{x} must be mended by hand')", ".py", "'mend'"),
    (f"# {LONG[:60]}\n# {LONG[60:]}", ".py", "25 words"),
    ("KEY: 1  # size of the picture", ".yaml", "'picture'"),
    (f"| picture |\n\n- {LONG}.\n", ".md", "25 words"),
]


@pytest.mark.parametrize("source, suffix, rule", SAMPLES)
def test_the_checker_finds_every_pattern(source: str, suffix: str, rule: str) -> None:
    (fault,) = faults(source, suffix)
    assert rule in fault


def test_the_checker_accepts_code_and_equations() -> None:
    block = f"Return x.\n\nThe form::\n\n    picture = {LONG}\n\n``picture`` is None.\n\na = {LONG}"
    assert not list(faults(f'"""{block}"""\n# What is it?\ntext = "The picture"'))
