"""Tests that pages say what the code and the results say."""

import pytest
from absl.testing import flagsaver

from aps_jax.runs import metrics
from experiments import pages


@pytest.mark.parametrize("page", pages.PARTS)
def test_made_parts_are_up_to_date(page):
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    assert pages.updated(page) == text, "run python -m experiments.pages"


def test_each_metric_is_explained_once_under_its_heading():
    text = (pages.ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for heading, group in metrics.GROUPS.items():
        section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
        for metric in group:
            assert text.count(f"| `{metric.name}` |") == 1
            assert f"| `{metric.name}` | {metric.unit} | {metric.meaning} |" in section
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)


def test_all_stages_use_the_same_names():
    declared = {metric.name for metric in metrics.ALL}
    both = set(metrics.PRETRAIN_COLUMNS) & set(metrics.FINETUNE_COLUMNS)
    assert set(metrics.PRETRAIN_COLUMNS) | set(metrics.FINETUNE_COLUMNS) == declared
    assert both == {m.name for m in metrics.COUNTERS + metrics.LEARNING}


@pytest.fixture
def parsed_flags():
    with flagsaver.flagsaver():
        pages.flags.FLAGS(["test"])
        yield


@pytest.mark.usefixtures("parsed_flags")
def test_stale_pages_are_named_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PARTS", {"a.md": {"n": lambda: "made \\1\n"}})
    page = tmp_path / "a.md"
    page.write_text("before <!-- made: n -->old<!-- end: n --> after\n")
    with flagsaver.flagsaver(check=True), pytest.raises(SystemExit):
        pages.main(["pages"])
    assert "stale: a.md" in capsys.readouterr().out
    pages.main(["pages"])
    expected = "before <!-- made: n -->\n\nmade \\1\n\n<!-- end: n --> after\n"
    assert page.read_text() == expected
    page.write_text("nothing to replace\n")
    with pytest.raises(ValueError, match=r"a\.md has no part between"):
        pages.main(["pages"])
