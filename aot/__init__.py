"""Build time only: the kernel family, its configs, and what turns them into C++ sources. Never in the wheel."""


class BuildError(Exception):
    """A build that must stop; its text is the one line that the user is shown."""
