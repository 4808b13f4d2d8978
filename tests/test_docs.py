"""Pages, files, tests, settings and metrics named in README and infra/docs exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from method_catalogue import CATALOGUE

from pipelines.cli import verbs
from pipelines.config import RunConfig, known_keys
from serve.metrics import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "infra" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TOP = ("ptuning", "pipelines", "serve", "infra", "tests")  # folders of the repository

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)
PATH = re.compile(rf"(?:{'|'.join(TOP)})/[\w./-]*(?:::\w+)?")
SETTING = re.compile(
    rf"(?<![\w./-])(?:{'|'.join(RunConfig.model_fields)})\.[a-z_]\w*(?:\.[a-z_]\w*)*(?!\w*[(/])"
)
VARIABLE = re.compile(r"PTUNING_([A-Z]+)__([A-Z_]+)")
FILE_ENDINGS = (".md", ".py")  # `data.md` is a page, not a setting

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def paths_in(text: str) -> set[str]:
    """The repository's files, folders and tests (`file::name`) among the words in backticks."""
    return {code for code in CODE.findall(FENCE.sub("", text)) if PATH.fullmatch(code)}


def settings_in(text: str) -> set[str]:
    """Settings and their sections, in text and in examples."""
    found = {name for name in SETTING.findall(text) if not name.endswith(FILE_ENDINGS)}
    return found | {f"{a}.{b}".lower() for a, b in VARIABLE.findall(text) if a != "SECTION"}


@cache
def known_settings() -> frozenset[str]:
    """Every setting, and every section whose name has more than one part (`data.columns`)."""
    keys = {key for key, _ in known_keys()}
    return frozenset(keys | {key.rpartition(".")[0] for key in keys if key.count(".") > 1})


def test_the_page_parsers_find_what_they_should() -> None:
    text = (
        "`ptuning/gate.py`, `tests/x.py::test_y`, `runs/a`, `ptuning run`\n```\n`serve/no`\n```\n"
    )
    assert paths_in(text) == {"ptuning/gate.py", "tests/x.py::test_y"}
    text = "data.max_rows=4, `data.columns.user_id`, data.md, infra/data.py, PTUNING_TRAIN__EPOCHS"
    assert settings_in(text) == {"data.max_rows", "data.columns.user_id", "train.epochs"}
    assert settings_in("import ray.serve; mlflow.data.load; data.load()") == {"ray.serve"}


@each_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [
        link for link in links if not (page.parent / link.partition("#")[0]).resolve().exists()
    ]
    assert missing == []


@each_page
def test_every_path_in_backticks_exists(page: Path) -> None:
    assert sorted(_missing(paths_in(page.read_text()))) == []


def _missing(paths: set[str]) -> Iterator[str]:
    for path in paths:
        file, _, test = path.partition("::")
        place = ROOT / file
        if not place.exists() or (test and f"def {test}(" not in place.read_text()):
            yield path


@each_page
def test_every_setting_that_is_named_exists(page: Path) -> None:
    assert sorted(settings_in(page.read_text()) - known_settings()) == []


def test_the_page_names_every_metric_of_the_service() -> None:
    text = (DOCS / "http.md").read_text()
    assert [name for name in FAMILIES if f"| `{name}` | {FAMILIES[name][0]} |" not in text] == []


def test_the_pages_name_every_method_and_every_verb() -> None:
    methods = (DOCS / "methods.md").read_text()
    types = sorted({entry.method.type for entry in CATALOGUE.values()})
    assert [name for name in types if f"| `{name}` (" not in methods] == []
    operations = (DOCS / "operations.md").read_text()
    assert [verb for verb in verbs.commands if f"`ptuning {verb}" not in operations] == []


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="no mkdocs: the pages' builder of the dev extra")
    pytest.importorskip("material", reason="no mkdocs-material: the pages' theme, dev extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--config-file", "infra/mkdocs.yml", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-3000:]
    for page in PAGES[1:]:
        assert (tmp_path / "site" / f"{page.stem}.html").exists()
    settings = (tmp_path / "site" / "configuration.html").read_text()
    assert [key for key, _ in known_keys() if f"<code>{key}</code>" not in settings] == []
