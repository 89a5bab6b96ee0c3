"""Run folders appear whole, over the run before, or not at all."""

import json

from sdkit.run_folder import begin_run, finish_run, save_verdicts


def test_a_finished_run_appears_and_replaces_the_one_before(tmp_path):
    for text in ("first", "second"):
        partial = begin_run(tmp_path / "run")
        (partial / f"{text}.txt").write_text(text)
        assert finish_run(partial) == tmp_path / "run"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["second.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unfinished_run_does_not_touch_the_one_before(tmp_path):
    finish_run(begin_run(tmp_path / "run"))
    partial = begin_run(tmp_path / "run")
    (partial / "half.png").write_text("half")
    assert list((tmp_path / "run").iterdir()) == []
    assert list(begin_run(tmp_path / "run").iterdir()) == []  # what the failure left is gone


def test_verdicts_are_json(tmp_path):
    verdicts = [
        {"question": "Ist es schwarz?", "answer": "ja", "evidence": "0", "as_expected": True}
    ]
    assert json.loads(save_verdicts(verdicts, tmp_path).read_text("utf-8")) == verdicts
