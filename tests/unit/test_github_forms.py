"""What a contributor fills in: the forms are ones that GitHub shows, and ask for what an answer needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_github_shows_it(path: Path) -> None:
    form = read(path)
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in form["body"]} <= KINDS
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(isinstance(field["attributes"]["label"], str) for field in fields)
    # GitHub refuses a form whose options are not text: YAML reads yes and no as truth values.
    assert all(isinstance(each, str) for field in fields for each in field["attributes"].get("options", []))


def test_a_bug_report_says_what_ran_what_was_seen_the_status_and_the_versions() -> None:
    fields = {field.get("id"): field for field in read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml")["body"]}
    assert all(fields[name]["validations"]["required"] for name in ("ran", "saw", "status", "versions"))


def test_what_runs_before_a_commit_is_the_project_s_own_check() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local", "nothing is fetched"
    assert all(os.access(ROOT / hook["entry"], os.X_OK) for hook in repository["hooks"])
