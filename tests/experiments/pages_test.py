"""Tests that pages say what the code and the results say."""

import re

import pytest
from absl.testing import flagsaver

from aps_jax import agents
from aps_jax import config as config_lib
from experiments import pages


@pytest.mark.parametrize("page", pages.PARTS)
def test_made_parts_are_up_to_date(page):
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    assert pages.updated(page) == text, "run python -m experiments.pages"


@pytest.mark.parametrize("name", agents.AGENTS)
def test_each_metric_of_an_agent_is_explained_under_its_heading(name):
    text = (pages.ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    agent = config_lib.preset_config("smoke", name).make_agent(num_actions=2)
    for stage, phase in (
        ("pretraining", agent.pretrain),
        ("learning from reward", agent.finetune),
    ):
        headings = [h for h in sections if f"{name}, {stage}" in h.split("; ")]
        assert len(headings) == (phase is not None)
        for heading in headings:
            explained = re.findall(r"^\| `(\w+)` \|", sections[heading], re.MULTILINE)
            assert explained == [metric.name for metric in phase.learner.metrics]


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
