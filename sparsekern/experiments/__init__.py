"""Experiments as files: ``sparsekern experiment NAME`` runs one and writes a table, a plot and JSON.

``cell`` is one training run, ``grid`` runs many and keeps what each gives, ``study`` makes a table of them, ``studies``
lists those there are; what is no table of training runs has a module of its own.
"""

from .studies import EXPERIMENTS

__all__ = ["EXPERIMENTS"]
