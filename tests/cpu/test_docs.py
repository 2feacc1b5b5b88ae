"""What scripts/docs.sh would not see: relative links of Markdown, and names without a page."""

import importlib.util
import re
from pathlib import Path

import pytest

import tile_mhc
from tile_mhc import config, nn

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("findings/*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
NAMED = re.compile(r"`((?:docs|findings|scripts|tests|tile_mhc|kernels)/[\w./-]+)`")


def load_conf():
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    return conf


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = [t for t in LINK.findall(page.read_text()) if not t.startswith("https://")]
    missing = [target for target in targets if not (page.parent / target).exists()]
    # The log tells of files as they were; `x` stands for any op.
    if page.name not in ("log.md", "CHANGELOG.md"):
        names = [n for n in NAMED.findall(page.read_text()) if Path(n).stem not in ("x", "test_x")]
        missing += [name for name in names if not (ROOT / name).exists()]
    assert missing == []


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"auto(?:function|class|exception):: ([\w.]+)", text))
    members = re.findall(r":members: ([\w, \n]+)", text)
    documented |= {f"tile_mhc.{name}" for group in members for name in re.split(r"[,\s]+", group)}
    names = {f"tile_mhc.{name}" for name in tile_mhc.__all__}
    assert names - documented == set()
    # These pages list what their modules have.
    for module in (nn, config):
        assert f"automodule:: {module.__name__}\n   :members:\n" in text


def test_findings_are_listed():
    listed = set(re.findall(r"\((\S+\.sh)\)", (ROOT / "findings" / "README.md").read_text()))
    scripts = list(ROOT.glob("findings/*.sh"))
    assert listed == {script.name for script in scripts}
    assert all(script.stat().st_mode & 0o111 for script in scripts)


def test_docstrings_become_restructuredtext():
    docstring = """\
Do something with n*H numbers of `weight*`.

out[t, i] = a * b
            + c
(then more)

What it does:
- this *here*,
  and `x_`;
- that.
"""
    assert load_conf().to_rst(docstring.splitlines()) == [
        r"Do something with n\*H numbers of `weight*`.",
        "",
        "::",
        "",
        "    out[t, i] = a * b",
        "                + c",
        "    (then more)",
        "",
        "What it does:",
        "",
        r"- this \*here\*,",
        "  and `x_`;",
        "- that.",
    ]
