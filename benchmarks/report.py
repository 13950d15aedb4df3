"""Results in print: the environment, tables for a terminal and for Markdown, and one JSON file."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

import regfused

LONG_CELL = 100  # characters; names and numbers have less


@dataclass
class Table:
    """A title, a header and rows of text; the first `names` columns are names, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    note: str = ""
    names: int = 1

    def print(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left", box=box.ASCII2, caption=self.note or None)
        table.caption_justify = "left"
        for i, column in enumerate(self.columns):
            # Only what is long is broken where the terminal is narrow, or rich makes other columns disappear for it.
            long = any(len(row[i]) > LONG_CELL for row in self.rows)
            table.add_column(column, justify="left" if i < self.names else "right", no_wrap=not long)
        for row, after in zip(self.rows, [*self.rows[1:], None], strict=True):
            new_block = 1 < self.names < len(self.columns) and after is not None and after[0] != row[0]
            table.add_row(*row, end_section=new_block)
        console.print(table)

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        rule = line(["---"] * self.names + ["---:"] * (len(self.columns) - self.names))
        text = "\n".join([f"### {self.title}", "", line(self.columns), rule, *map(line, self.rows)])
        return f"{text}\n\n{self.note}\n" if self.note else text + "\n"


@dataclass
class Text:
    """A paragraph between tables; only in Markdown."""

    text: str

    def markdown(self) -> str:
        return f"{self.text}\n"


def cell(text: str, width: int = 160) -> str:
    """Any text as one that can stand in a cell of a table."""
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= width else line[: width - 3] + "..."


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "regfused": regfused.__version__,
    }
    return facts | {key: str(value) for key, value in regfused.build_info().items() if key not in facts}


def environment_table(facts: Mapping[str, Any]) -> Table:
    return Table("Environment", ["fact", "value"], [[key, str(value)] for key, value in facts.items()], names=2)


def write(folder: Path, stem: str, results: Mapping[str, Any], tables: Sequence[Table | Text]) -> None:
    """Write ``stem.json`` and ``stem.md`` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{stem}.json", json.dumps(results, indent=1) + "\n")
    write_whole(folder / f"{stem}.md", "\n".join(table.markdown() for table in tables))


def write_whole(file: Path, text: str) -> None:
    """A file that is written again and again is whole at any time, also when its writer is killed."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
