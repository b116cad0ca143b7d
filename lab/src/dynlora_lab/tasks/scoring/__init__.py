"""Scores of predictions against references: plain texts, numbers and labels in, figures out."""
