"""The commands of ``dynamicvis-geo``: one module each, with a function ``run``."""
