"""Tests that pages say what the code and the results say."""

import fake_runs
import pytest
from absl.testing import flagsaver

from aps_jax import agents
from aps_jax import config as config_lib
from aps_jax.envs import atari
from aps_jax.runs import metrics
from experiments import pages


@pytest.mark.parametrize("page", pages.PARTS)
def test_made_parts_are_up_to_date(page):
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    assert pages.updated(page) == text, "run python -m experiments.pages"


def declared_metrics():
    """Every metric that a phase of an agent declares, and those of the loop."""
    found = [*metrics.COUNTERS, *metrics.EVALUATION]
    for name in agents.AGENTS:
        agent = config_lib.preset_config("smoke", name).make_agent(2, atari.OBSERVATION)
        for phase in (agent.pretrain, agent.finetune):
            found += phase.learner.metrics if phase else ()
    return found


def test_every_metric_is_explained():
    text = (pages.ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for metric in declared_metrics():
        assert f"| `{metric.name}` | {metric.unit} | {metric.meaning} |" in text


def test_a_metrics_name_has_one_meaning():
    meanings = {metric.name: metric for metric in declared_metrics()}
    assert all(meanings[metric.name] == metric for metric in declared_metrics())


def test_known_agents_stand_beside_their_published_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert "make atari100k" in pages.atari100k_table()
    # A sweep that has begun, and a run that nobody has published.
    (tmp_path / "results" / "atari100k").mkdir(parents=True)
    assert "make atari100k" in pages.atari100k_table()
    fake_runs.write(
        tmp_path / "results" / "atari100k" / "other", fake_runs.result([9.0] * 100)
    )
    assert "make atari100k" in pages.atari100k_table()
    run = {"agent": "curl", "game": "Breakout", "init": None}
    result = fake_runs.result([9.0] * 100, finetune_agent_steps=100_000, **run)
    fake_runs.write(tmp_path / "results" / "atari100k" / "run", result)
    table = pages.atari100k_table()
    assert "| curl scratch | Breakout | 1 | 9.0 |" in table
    assert "| outside |" in table and "Scores per game" not in table


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
