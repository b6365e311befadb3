"""How ``mea-ray list`` shows components and settings: a table in a wide terminal, indented lines in a narrow one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from mea_ray.core.errors import ConfigError
from mea_ray.results.points import setting

if TYPE_CHECKING:
    from mea_ray.core.registry import Table
    from mea_ray.core.settings import Parameter, Settings

NARROW = 110
"""Below this number of columns settings are shown as indented lines."""
SettingRow = tuple[str, str, str, str]
"""Name, type with range, default and meaning of a setting, as texts."""


def summary_of(component: Any) -> str:
    """Return the first paragraph of a docstring: what the component does."""
    return _paragraphs(component)[0]


def choice_of(component: Any) -> str:
    """Return the sentence of a docstring that begins with "Choose it"; what the component does if there is none."""
    for paragraph in _paragraphs(component):
        match = re.search(r"Choose it .*?[.](?=\s|$)", paragraph)
        if match:
            return match[0]
    return summary_of(component)


def _paragraphs(component: Any) -> list[str]:
    text = (component.__doc__ or "").strip()
    return [plain(" ".join(paragraph.split())) for paragraph in text.split("\n\n")]


def plain(text: str) -> str:
    """Return a text without the double backquotes of docstrings."""
    return text.replace("``", "`")


def names_table(table: Table) -> RichTable:
    """Return the names of a table of components, each with the line that says when to choose it."""
    grid = RichTable(box=None, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name in table.names():
        grid.add_row(Text(name), Text(_about(name, table)))
    for name, other in table.hidden().items():
        grid.add_row("", Text(f"{name} hides {other}; write module:attribute for that"))
    return grid


def _about(name: str, table: Table) -> str:
    """Return when to choose a component and where it comes from, or why it cannot be used."""
    try:
        text = choice_of(table.resolve(name))
    except ConfigError as error:
        return f"cannot be used: {error}"
    return f"{text} [{table.origin(name)}]" if table.origin(name) else text


class Listing:
    """Settings with a heading: a table in a wide terminal, indented lines in a narrow one.

    Args:
        name: Name of the component or config section.
        about: What it is, in a few sentences.
        rows: The settings.
    """

    def __init__(self, name: str, about: str, rows: Sequence[SettingRow]) -> None:
        self.name, self.about, self.rows = name, about, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self.name, "bold"), "  ", self.about)
        if not self.rows:
            yield Text("  no settings", style="dim")
        elif options.max_width < NARROW:
            yield from self._lines()
        else:
            yield self._table()
        yield ""

    def _table(self) -> RichTable:
        grid = RichTable(box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("Setting", "Type", "Default", "Meaning"):
            grid.add_column(heading, overflow="fold", style="bold" if heading == "Setting" else None)
        for row in self.rows:
            grid.add_row(*map(Text, row))
        return grid

    def _lines(self) -> RenderResult:
        for name, kind, default, meaning in self.rows:
            yield Padding(Text.assemble((name, "bold"), f" = {default}  ", (kind, "dim")), (0, 0, 0, 2))
            if meaning:
                yield Padding(Text(meaning), (0, 0, 0, 6))


def component_listing(name: str, table: Table) -> Listing:
    """Return what a component is, when to choose it, and its settings."""
    component = table.resolve(name)
    about = summary_of(component)
    if choice_of(component) not in about:
        about = f"{about} {choice_of(component)}"
    if table.origin(name):
        about = f"{about} [{table.origin(name)}]"
    return Listing(name, about, component_rows(name, table))


def component_rows(name: str, table: Table) -> list[SettingRow]:
    """Return the settings of a component; callbacks, which are not for configs, are left out."""
    return [setting_row(each) for each in table.parameters(name) if not each.name.startswith("on_")]


def config_listing(name: str, about: str, model: type[Settings], skip: Sequence[str] = ()) -> Listing:
    """Return every config path of a model, without those below the fields ``skip``."""
    return Listing(name, about, [row for row in config_rows(model) if row[0].split(".")[0] not in skip])


def config_rows(model: type[Settings]) -> list[SettingRow]:
    """Return every setting below a config model."""
    return [setting_row(parameter) for parameter in model.parameters()]


def setting_row(parameter: Parameter) -> SettingRow:
    """Return name, type with range, default and meaning of a setting, as texts."""
    default = "required" if parameter.default is PydanticUndefined else setting(parameter.default)
    return parameter.name, f"{parameter.type} {parameter.range}".strip(), default or '""', plain(parameter.doc)
