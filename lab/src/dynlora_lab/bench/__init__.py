"""Suites of tasks x methods x learning rates x seeds: run once, on any number of workers, then tables.

``suite`` reads the YAML, ``plan`` says which cells are due, ``claims`` shares them between workers,
``worker`` runs each in a process of its own (``cell``), ``results`` keeps one JSON file a cell. From
these files alone ``summary`` (with ``statistics``) makes numbers, and ``text_tables`` and ``page`` what
people read.
"""
