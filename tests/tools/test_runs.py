"""tools/runs.py: which runs are trained, and with which flags."""
import sys

import pytest
import torch

import dq
from runs import flags_to_end, refuse, split_flags


def test_a_run_starts_resumes_or_is_finished(tmp_path):
    path = tmp_path / "transformer.pt"
    assert flags_to_end(path, 30) == []
    for step, flags in ((10, ["--resume"]), (30, None)):
        torch.save(dict(kind="dq-transformer", layout=dq.Layout.name, step=step, settings=dict(steps=30)), path)
        assert flags_to_end(path, 30) == flags
    with pytest.raises(dq.UserError, match="is of a run of 30 steps, not 20; name another folder"):
        flags_to_end(path, 20)


def test_what_stands_behind_two_dashes_is_for_the_trainer(monkeypatch):
    assert split_flags(["out", 7, "--", "--lr", "--"]) == (["out", "7"], ["--lr", "--"])
    assert split_flags(["out"]) == (["out"], [])
    monkeypatch.setattr(sys, "argv", ["figures.py", "rd", "--", "--lr", "1"])
    assert split_flags(None) == (["rd"], ["--lr", "1"])


def test_flags_that_are_set_for_each_run_are_refused():
    refuse(["--lr", "--seed-of-another-kind", "-s", "--"], "--seed", "--out")
    for flag in ("--seed", "--see", "--seed=3"):
        with pytest.raises(dq.UserError, match="can't stand behind --: --seed is set for each run"):
            refuse(["--lr", flag], "--seed", "--out")
