"""The lab's verbs of the command ``dynlora``: parse, call, print, exit code."""
