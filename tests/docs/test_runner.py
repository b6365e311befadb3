"""The runner of the documentation's blocks detects broken blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from doc_blocks import Runner, blocks

PAGE = """Text.

```yaml title="small.yaml"
data: digits
thief: {budgets: [50]}
```

<!-- run: check -->
```console
$ mea-ray run small.yaml \\
      thief.budgets=[60]
one line of output
```

- A list:

  ```python
  x = 1
  ```

```python
assert x == 1
```

<!-- run: no, it costs money -->
```console
$ aws s3 ls
```
"""


def run(page: str, folder: Path, *, slow: bool = False) -> None:
    (folder / "page.md").write_text(page, encoding="utf-8")
    inside = folder / "run"
    inside.mkdir()
    runner = Runner(inside, slow=slow)
    for block in blocks(folder / "page.md"):
        runner.run(block)


def test_blocks_of_a_page_share_files_and_names(tmp_path: Path) -> None:
    run(PAGE, tmp_path)
    assert (tmp_path / "run" / "small.yaml").exists() and not (tmp_path / "run" / "mea_ray_results").exists()
    result = blocks(tmp_path / "page.md")
    assert [block.how for block in result] == ["run", "check", "run", "run", "no"]
    assert result[1].commands() == ["mea-ray run small.yaml thief.budgets=[60]"]


@pytest.mark.parametrize(
    "broken",
    [
        "```python\nraise ValueError\n```",
        "```python\nx = (\n```",
        "```yaml\na: [\n```",
        "```console\n$ mea-ray lsit\n```",
        "```console\n$ mea-ray plan quickstart thief.budgest=5\n```",
        "<!-- run: check -->\n```console\n$ mea-ray sweep quickstart thief.budgest=5\n```",
        "<!-- run: slow -->\n```console\n$ mea-ray sweep quickstart --no-such-option\n```",
        "<!-- run: check -->\n```console\n$ mea-ray report x --no-such-option\n```",
        "```console\n$ false\n```",
        "<!-- run: check -->\n```console\n$ echo 'x\n```",
        "```python\n",
    ],
)
def test_a_broken_block_fails(broken: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ValueError, SyntaxError, yaml.YAMLError)):
        run(broken, tmp_path)


def test_slow_blocks_run_only_on_request(tmp_path: Path) -> None:
    page = "<!-- run: slow -->\n```python\nraise ValueError\n```"
    run(page, tmp_path)
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError):
        run(page, tmp_path / "again", slow=True)
