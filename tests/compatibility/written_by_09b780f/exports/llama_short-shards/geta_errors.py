"""The one exception that every room raises for input it cannot honour."""


class GETAError(ValueError):
    """Invalid input: the message names the module, the value and the remedy."""


class MemoryUnknown(GETAError):
    """The memory of a run can't be foreseen, which says nothing of whether it fits.

    Attributes:
        plan: the `Plan` of a dry run that came so far; None without one.
    """

    plan: object = None
