"""dynlora-lab: fine-tuning runs from recipes, and suites of them, to see what dynlora does.

It brings the verbs train, bench, demo and assets to the command ``dynlora``. The library never imports it.
"""

__version__ = "0.1.0"
