"""The backends, one module each; a module is itself the :class:`~actreg_dispatch.Backend`.

Nothing is imported here: the registry loads a backend the first time that it is chosen.
"""
