from __future__ import annotations

import subprocess
from pathlib import Path

from mea_ray.core import versions


def test_results_name_the_commit_of_a_checkout_and_none_of_a_stranger(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True
        )

    source = tmp_path / "pipeline.py"
    source.write_text("one")
    git("init", "-q")
    versions._commit.cache_clear()
    assert versions._commit(source) is None, "the file is in a repository that does not track it"
    git("add", "pipeline.py")
    git("commit", "-qm", "x")
    versions._commit.cache_clear()
    clean = versions._commit(source)
    assert clean is not None and len(clean) == 12
    source.write_text("two")
    versions._commit.cache_clear()
    assert versions._commit(source) == f"{clean}+changes"
    versions._commit.cache_clear()
