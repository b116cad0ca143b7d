"""Which code a run says that it ran."""

from dynlora_lab.tasks import provenance


def test_a_checkout_knows_its_commit_and_the_environment_does_not_overrule_it(monkeypatch):
    monkeypatch.setenv("DYNLORA_COMMIT", "0123abc")
    commit = provenance.source_commit()
    assert commit is not None
    assert len(commit.rstrip("+")) == 40


def test_outside_a_checkout_the_environment_says_which_commit_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.delenv("DYNLORA_COMMIT", raising=False)
    assert provenance.source_commit() is None
    monkeypatch.setenv("DYNLORA_COMMIT", "0123abc")
    assert provenance.source_commit() == "0123abc"
