"""The page that an experiment leaves for people: what it is, its table, its picture, and the command that makes it."""

from __future__ import annotations

from collections.abc import Sequence


def page(title: str, text: str, table: Sequence[str], name: str, seeds: int, quick: bool, picture: bool = True) -> str:
    """Markdown; ``name`` is the experiment's, and that of the picture beside the page."""
    stem = f"{name}-quick" if quick else name
    warning = ["**Quick: a little training on synthetic data. These figures mean nothing.**", ""] if quick else []
    shown = [f"![{title}]({stem}.png)", ""] if picture else []
    command = f"`sparsekern experiment {name} --seeds {seeds}{' --quick' * quick}` makes this again."
    return "\n".join([f"# {title}", "", text.strip(), "", *warning, *table, "", *shown, command, ""])
