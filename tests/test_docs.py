"""README and docs: code runs, commands exist, links lead somewhere, and the README keeps its size."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from skd_trl import ACCEPTANCE_RULES, DIVERGENCES, GATES, SKDConfig, SpecKDConfig, explained_options


ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# What a page may be without: `make docs` writes it.
GENERATED = {DOCS / "options.md"}
PAGES = [README, *sorted(set(DOCS.glob("*.md")) - GENERATED), ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md",
         ROOT / "benchmarks" / "README.md"]  # fmt: skip
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Code that loads models or data from a hub is parsed, and its imports are run.
NEEDS_HUB = re.compile(r"Qwen/|trl-lib/")


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for number, (name, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")), start=1):
            if name == language:
                found.append(pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}"))
    return found


def commands() -> list:
    lines = []
    for block in blocks("bash"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            if line.strip() and not line.strip().startswith("#"):
                lines.append(pytest.param(line, id=line[:60]))
    return lines


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) < 900
    assert max(map(len, text.splitlines())) <= 120


def pages_with_python() -> list:
    pages: dict[str, list[str]] = {}
    for block in blocks("python"):
        pages.setdefault(block.id.rpartition("-")[0], []).append(block.values[0])
    return [pytest.param(codes, id=page) for page, codes in pages.items()]


@pytest.mark.parametrize("codes", pages_with_python())
def test_python_runs(codes, tmp_path, monkeypatch):
    """The blocks of a page, one after the other, as on a machine whose GPU can do bf16."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)
    registries = (ACCEPTANCE_RULES, DIVERGENCES, GATES)
    before = [dict(registry) for registry in registries]
    names: dict = {"__name__": "docs"}
    try:
        for code in codes:
            tree = ast.parse(code)
            if NEEDS_HUB.search(code):
                tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
                assert tree.body
            exec(compile(tree, "<docs>", "exec"), names)
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """What a command starts, without launchers and environment variables, and what it is given."""
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    if words[:2] == ["accelerate", "launch"]:
        words = words[2:]
        while words[0].startswith("--"):
            if words[0] == "--config_file":
                assert (ROOT / words[1]).is_file(), words[1]
            words = words[2:]
        return words[0], words[1:]
    if words[0] == "python" and words[1] == "-m":
        return f"-m {words[2]}", words[3:]
    if words[0] == "python":
        return words[1], words[2:]
    return words[0], words[1:]


@pytest.mark.parametrize("line", commands())
def test_commands_name_what_exists(line):
    """Scripts, files and options of each command exist. The commands of the examples are run by `test_examples.py`."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for part in re.split(r"&&|\|", line):
        words = shlex.split(part, comments=True)
        if not words:
            continue
        program, given = program_of(words)
        if program == "make":
            assert {word for word in given if "=" not in word} <= targets, part
        elif program.endswith(".py"):
            assert (ROOT / program).is_file(), program
            assert_options_exist((ROOT / program).read_text(), given)
        elif program in ("-m skd_trl", "skd"):
            assert_options_exist("\n".join(p.read_text() for p in (ROOT / "skd_trl").rglob("*.py")), given)
        else:
            assert program in {
                "pip",
                "source",
                "git",
                "xdg-open",
                "-m build",
                "-m pytest",
                "-m sphinx",
                "-m venv",
                "vllm",
                "pre-commit",
            }, part
        for word in given:
            if word.startswith(("examples/configs/", "examples/accelerate/", "tests/", "benchmarks/")):
                assert (ROOT / word.partition("::")[0]).exists(), word


def assert_options_exist(source: str, given: list[str]) -> None:
    """Each option is added by the program, or is a field of a configuration that it parses."""
    import dataclasses

    from trl import ModelConfig

    from skd_trl import SpecKDConfig

    fields = {field.name for config in (SpecKDConfig, ModelConfig) for field in dataclasses.fields(config)}
    for word in given:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            assert word in source or f"{name}:" in source or name in fields or name in ("config", "help"), word


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


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert pages | {"options"} == listed & (pages | {"options"})


def test_the_options_page_explains_every_field(tmp_path):
    pytest.importorskip("sphinx")
    sys.path.insert(0, str(DOCS))
    try:
        import conf
    finally:
        sys.path.remove(str(DOCS))
    conf.write_options(type("App", (), {"srcdir": tmp_path}))
    text = (tmp_path / "options.md").read_text()
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
        timeout=280,
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
