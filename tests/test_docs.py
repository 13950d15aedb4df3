"""What the documentation shows runs, and says what is true."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import regfused

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))

# Names that a page has from its first words on; what a page prints or draws.
GIVEN = {"zeros.md": {"model": nn.Sequential(nn.Linear(20, 3))}}
PRINTED = {"zeros.md": "multiply-adds", "index.md": "zero_fraction", "path.md": "non-zeros"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_a_page_runs(page, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    scope = {"torch": torch, "regfused": regfused, **GIVEN.get(page.name, {})}
    try:
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), scope)
    finally:
        torch.set_num_threads(threads)
    assert PRINTED.get(page.name, "") in capsys.readouterr().out
    if page.name == "schedules.md":
        (group,) = scope["optimizer"].param_groups
        assert group["l1"] == 1e-3 and group["max_norm"] == 0.1
    if page.name == "zeros.md":
        assert scope["result"].report.parameters_after < scope["result"].report.parameters_before / 2


def test_the_change_in_the_readme_changes_nothing():
    """Both sides of the diff, on the same data."""
    (diff,) = blocks(ROOT / "README.md", "diff")
    weights = []
    for side in "-+":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
        loader = [(torch.randn(16, 5), torch.randn(16, 1)) for _ in range(10)]
        scope = {"torch": torch, "regfused": regfused, "model": model, "loader": loader, "criterion": nn.MSELoss()}
        exec("\n".join(line[1:] for line in diff.splitlines() if line[:1] in (side, " ", "")), scope)
        weights.append([p.detach() for p in model.parameters()])
    for theirs, ours in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(diff.splitlines()) < 15


def test_the_readme_is_short_and_its_options_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    (table,) = re.findall(r"## What tutorials teach.*?\n(\|.*?)\n\n", text, re.DOTALL)
    model = nn.Linear(3, 2)
    for row in table.splitlines()[2:]:
        for snippet in re.findall(r"`([^`]+)`", row.split("|")[2]):
            if re.match(r"(\w+=|\*\*)", snippet):
                eval(f"regfused.AdamW(model.parameters(), {snippet})", {"regfused": regfused, "model": model})
            elif "(" in snippet:
                eval(snippet, {"regfused": regfused, "model": model, "lr": 0.1})


def test_links_lead_somewhere():
    for page in (*PAGES, ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f": {page.name}\n" in navigation, page.name


def test_versions_that_stand_in_two_places_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {regfused.__version__}\n" in citation
    (linters,) = re.findall(r"^LINTERS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    hooks = re.findall(r"additional_dependencies: \[(.+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {hook.partition("==")[0] for hook in hooks} == {"ruff", "clang-format"}
    assert set(hooks) <= set(linters.split())
