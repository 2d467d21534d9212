"""What the pages of docs/ say of the code is there."""

import re
from pathlib import Path

import pytest

from lit_rlhf import __all__ as names

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lit_rlhf").rglob("*.py"))


def test_quoted_lines_of_code_exist():
    prose = re.sub(r"\s+", " ", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    quoted = [code for code in re.findall(r"`([^`]+)`", prose) if re.search(r" [=+*] |\(.*\)", code)]
    assert len(quoted) > 20
    flat = re.sub(r"\s+", " ", SOURCES)
    assert [code for code in quoted if code not in flat] == []


def test_named_classes_exist():
    found = set(re.findall(r"`([A-Z][A-Za-z0-9]+)`", PAGE))
    assert {"GAE", "TD0", "KLPenalty", "GroupNormalized", "AdaptiveKL"} <= found
    assert found <= set(names)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    assert [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()] == []


def test_the_recipes_are_the_ones_in_configs():
    named = re.findall(r"\]\(\.\./configs/(\w+)\.yaml\)", PAGE)
    for name in named:
        text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| [`{name}`]"))
        estimator = re.search(r"`(\w+)`", row.split("|")[2]).group(1)
        assert re.search(rf"advantages: .*{estimator}", text)
    assert len(named) == 7
