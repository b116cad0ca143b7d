"""Data files shipped with the package: a labelled sample of WordNet glosses and its licence."""
