"""Reads a CSV file of numbers, its last column the target, and says exactly where a malformed one is wrong."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch

MIN_ROWS = 10
_LARGEST = torch.finfo(torch.float32).max


class MalformedTable(ValueError):
    """The file is no table of numbers; the message names file, line and column, both counted from 1."""


@dataclass
class Table:
    names: list[str]  # of the features, then of the target
    features: torch.Tensor  # float32 [rows, columns]
    target: torch.Tensor  # float32 [rows]


def read_csv(path: Path) -> Table:
    """Comma-separated numbers; a first row with text in it is the header; empty lines are skipped."""
    lines = _read_lines(path)
    if not lines:
        raise MalformedTable(f"{path}: the file is empty")
    first_line, first = lines[0]
    has_header = any(_is_text(cell) for cell in first)
    names = [cell.strip() for cell in first] if has_header else []
    if len(first) < 2:
        raise MalformedTable(
            f"{path}, line {first_line}: 1 column; needs 2 or more separated by commas, the last one the target"
        )
    for column, cell in enumerate(first, start=1):
        _check_utf8(cell, f"{path}, line {first_line}, column {column}")

    rows = []
    for line, cells in lines[has_header:]:
        if len(cells) != len(first):
            column = min(len(cells), len(first)) + 1
            wrong = "is missing" if len(cells) < len(first) else "is one too many"
            raise MalformedTable(
                f"{_place(path, line, column, names)}: {wrong}; "
                f"columns in this line: {len(cells)}, in line {first_line}: {len(first)}"
            )
        rows.append([_number(cell, _place(path, line, i, names)) for i, cell in enumerate(cells, start=1)])

    if len(rows) < MIN_ROWS:
        end = f"line {lines[-1][0]}"
        raise MalformedTable(
            f"{path}, {end}: the file ends after {len(rows)} rows of numbers; needs {MIN_ROWS} or more"
        )
    values = torch.tensor(rows, dtype=torch.float32)
    if (values[:, -1] == values[0, -1]).all():
        place = _place(path, lines[has_header][0], len(first), names)
        raise MalformedTable(f"{place}: the target is {rows[0][-1]:g} here and in every line below; nothing to learn")
    return Table(names or [f"column {i}" for i in range(1, len(first) + 1)], values[:, :-1], values[:, -1])


def _read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, with the line in which each ends."""
    try:
        # Bytes that are no UTF-8 survive as surrogates until their cell is looked at, whose place is then known.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                return [(reader.line_num, cells) for cells in reader if "".join(cells).strip() or len(cells) > 1]
            except csv.Error as error:
                raise MalformedTable(f"{path}, line {reader.line_num}: {error}") from None
    except OSError as error:
        raise MalformedTable(f"{path}: cannot be read: {error.strerror}") from None


def _place(path: Path, line: int, column: int, names: list[str]) -> str:
    name = f" ({names[column - 1]!a})" if column <= len(names) else ""
    return f"{path}, line {line}, column {column}{name}"


def _is_text(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return bool(cell.strip())
    return False


def _check_utf8(cell: str, place: str) -> None:
    try:
        cell.encode()
    except UnicodeEncodeError:
        raw = cell.encode(errors="surrogateescape")[:40]
        raise MalformedTable(f"{place}: holds bytes that are not UTF-8: {raw!r}") from None


def _number(cell: str, place: str) -> float:
    _check_utf8(cell, place)
    try:
        value = float(cell)
    except ValueError:
        found = f"{cell[:40]!a} is not a number" if cell.strip() else "the cell is empty"
        raise MalformedTable(f"{place}: {found}") from None
    if not abs(value) <= _LARGEST:
        raise MalformedTable(f"{place}: {cell.strip()[:40]} is not a finite number in float32")
    return value
