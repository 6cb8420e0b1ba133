"""The errors that the command line prints as one line, without a traceback."""


class UserError(Exception):
    """Bad input. The line names the file, row, key or module, and what would have been right.

    The exit code is 2.
    """


class MachineError(Exception):
    """A failure of the machine, for example one that is overloaded. The exit code is 1."""
