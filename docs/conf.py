"""Sphinx's configuration. scripts/docs.sh builds the pages, and takes a warning for an error."""

import re
from typing import Any

import tile_mhc

project = "tile_mhc"
author = "tile_mhc maintainers"
release = tile_mhc.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"tile_mhc {release}"
html_show_copyright = False
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False
napoleon_numpy_docstring = False

# Every reference must lead somewhere, but for those to what is documented elsewhere.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|types|contextlib)\..*"),
    ("py:.*", r"(Tensor|nn\.Module|Callable|Mapping|Sequence|Any|optional)"),
    ("py:exc", "(ImportError|ValueError|TypeError)"),
]

# The docstrings are plain text, with words of code in single backticks; autodoc reads them as
# reStructuredText. A paragraph that begins with a formula keeps its lines.
default_role = "literal"
FORMULA = re.compile(r"\w+(\[[^]]*\])?(, \w+(\[[^]]*\])?)* = ")
CODE = re.compile(r"(``.+?``|`[^`]+`)")
BULLET = re.compile(r"\s*- ")
SPECIAL = re.compile(r"([*|\\]|_\b)")


def escape(line: str) -> str:
    parts = CODE.split(line)  # what stands in backticks has the odd places
    return "".join(p if i % 2 else SPECIAL.sub(r"\\\1", p) for i, p in enumerate(parts))


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring, as reStructuredText."""
    result: list[str] = []
    in_code = in_list = False
    for line in lines:
        begins = not result or not result[-1].strip()
        if not line.strip():
            in_code = in_list = False
        elif begins and (FORMULA.match(line) or line.startswith("    ")):
            result += ["::", ""]
            in_code = True
        elif BULLET.match(line):
            if not (in_list or begins):
                result.append("")
            in_list = True
        result.append("    " + line if in_code else escape(line))
    return result


def convert(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def forget_overloads() -> None:
    """autodoc shows overloads instead of the signature, and only that has the defaults."""
    # Not at the top: a test reads this file without Sphinx.
    from sphinx.pycode import ModuleAnalyzer

    analyze = ModuleAnalyzer.analyze

    def analyze_and_forget(analyzer: ModuleAnalyzer) -> None:
        analyze(analyzer)
        analyzer.overloads.clear()

    ModuleAnalyzer.analyze = analyze_and_forget


def setup(app: Any) -> None:
    forget_overloads()
    # Before napoleon, which has the usual priority of 500, and makes lists of `Args`.
    app.connect("autodoc-process-docstring", convert, priority=100)
