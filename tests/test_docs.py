"""README and docs: links lead somewhere, the README keeps its size, the pages work in a browser. `test_docs_run.py` runs their code."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from trl import ModelConfig

from skd_trl import SKDConfig, SpecKDConfig, explained_options
from skd_trl.__main__ import COMMANDS


ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# What a page may be without: `make docs` writes it.
GENERATED = {DOCS / "options.md"}
PAGES = [README, *sorted(set(DOCS.glob("*.md")) - GENERATED), ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md",
         ROOT / "benchmarks" / "README.md"]  # fmt: skip
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) < 900
    assert max(map(len, text.splitlines())) <= 120


INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:python|skd) [^`\n]+)`")


def inline_commands() -> list:
    found = [(page, command) for page in PAGES for command in INLINE.findall(page.read_text(encoding="utf-8"))]
    return [pytest.param(command, id=f"{page.name}: {command}") for page, command in dict.fromkeys(found)]


@pytest.mark.parametrize("command", inline_commands())
def test_a_command_within_a_sentence_names_what_exists(command):
    """Those in blocks are run, by `test_docs_run.py`."""
    program, first, *rest = re.sub(r"^([A-Z_]+=\S+ )*", "", command).split()
    if program == "skd" or (first, *rest[:1]) == ("-m", "skd_trl"):
        words = [first, *rest] if program == "skd" else rest[1:]
        assert words[0] in COMMANDS, command
        source = "".join(path.read_text() for path in (ROOT / "skd_trl").rglob("*.py"))
        known = {field.name for config in (SpecKDConfig, ModelConfig) for field in fields(config)}
    elif first == "-m":
        return
    else:
        script, words, known = ROOT / first, rest, set()
        assert script.is_file(), command
        source = script.read_text() + (ROOT / "benchmarks" / "common.py").read_text()
    for word in words:
        if word.startswith("--"):
            assert word in source or f"{word[2:]}:" in source or word[2:] in known or word == "--help", command


def anchors_of(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked in GENERATED or linked.exists(), f"{page.name}: {target}"
        if anchor and linked not in GENERATED:
            assert anchor in anchors_of(linked), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_empty_line_ends_a_table(page):
    """Without it the paragraph that follows becomes the table's last row."""
    lines = page.read_text(encoding="utf-8").splitlines()
    after = [
        line for row, line in zip(lines, lines[1:], strict=False) if row.startswith("|") and line[:1] not in ("", "|")
    ]
    assert not after


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert pages == listed & pages


def test_the_options_page_explains_every_field_and_is_that_of_the_source(tmp_path):
    sys.path.insert(0, str(DOCS))
    try:
        import conf
    finally:
        sys.path.remove(str(DOCS))
    conf.write_options(type("App", (), {"srcdir": tmp_path}))
    text = (tmp_path / "options.md").read_text()
    assert text == (DOCS / "options.md").read_text(), "run `make options`"
    assert "## Other" not in text, "conf.GROUPS has no place for a field: " + text.partition("## Other")[2]
    rows = re.findall(r"^\| `(\w+)` \| `.*` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 40 and all(len(help_text) > 10 for name, help_text in rows if name != "beta"), rows


@pytest.mark.parametrize("config", [SKDConfig, SpecKDConfig])
def test_an_option_is_explained_once_in_its_help_from_which_the_docstring_is_written(config):
    explained = dict(
        re.findall(r"^    (\w+) \(`[^`]+`, \*optional\*.*\):\n        (.+)$", config.__doc__, re.MULTILINE)
    )
    own = {
        name: config.__dataclass_fields__[name].metadata["help"] for name in config.__annotations__ if name[0] != "_"
    }
    assert explained == own and len(own) >= 10
    with pytest.raises(TypeError, match="Silent.silent has no help"):

        @explained_options.explained
        @dataclass
        class Silent:
            silent: int = 1


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(directory)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.mark.slow
def test_the_docs_build_without_warnings(site):
    assert "interleaved_sample" in (site / "reference.html").read_text()


@pytest.mark.slow
def test_the_pages_work_in_a_browser(site):
    """Links and pictures load, pages fit a phone, both themes differ, and the search finds a name. Needs playwright and chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    pages = sorted(set(site.glob("*.html")) - {site / "search.html", site / "genindex.html"})
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        colours = set()
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
            errors: list[str] = []
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            for file in pages:
                page.goto(file.as_uri())
                assert not page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"), (
                    file.name
                )
                assert page.evaluate("document.documentElement.scrollWidth") <= 400, (
                    f"{file.name} is wider than a phone"
                )
                for link in page.evaluate("[...document.links].map(a => a.href)"):
                    target, _, anchor = link.partition("#")
                    if target.startswith("file:"):
                        linked = Path(target.removeprefix("file://"))
                        assert linked.is_file(), f"{file.name}: {link}"
                        assert not anchor or f'id="{anchor}"' in linked.read_text(), f"{file.name}: {link}"
            colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert not errors, errors
        assert len(colours) == 2
        page.goto((site / "search.html").as_uri() + "?q=interleaved_sample")
        page.wait_for_selector("ul.search li a", timeout=20_000)
        assert "reference" in " ".join(page.locator("ul.search li a").evaluate_all("a => a.map(x => x.href)"))
        browser.close()
