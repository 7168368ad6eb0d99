"""The one exception that every room raises for input it cannot honour."""


class GETAError(ValueError):
    """Invalid input: the message names the module, the value and the remedy.

    Example:
        >>> import geta_hf
        >>> try:
        ...     geta_hf.GETAConfig(target_sparsity=1.5)
        ... except geta_hf.GETAError as error:
        ...     print(error)
        GETAConfig.target_sparsity = 1.5 must be a number in [0, 1)
    """


class MemoryUnknown(GETAError):
    """The memory of a run can't be foreseen, which says nothing of whether it fits.

    Attributes:
        plan: the `Plan` of a dry run that came so far; None without one.
    """

    plan: object = None
