"""The short spelling: ``k=`` and ``p=`` instead of ``top_k=`` and ``top_p=`` return ``(ids, valid)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

SHORT = {"k": "top_k", "p": "top_p"}


def short_spelling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Accept the keywords ``k`` and ``p``. FlashInfer has never had parameters of these names, so no call has two readings.

    Raises:
        TypeError: a parameter in both spellings, or one the function does not have.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "k" in kwargs or "p" in kwargs:
            for short, full in SHORT.items():
                if short in kwargs:
                    if full in kwargs or full in names[: len(args)]:
                        raise TypeError(f"{function.__name__}() got {short}= and {full}=: use one spelling")
                    if full not in names:
                        raise TypeError(f"{function.__name__}() got an unexpected keyword argument {short!r}")
                    kwargs[full] = kwargs.pop(short)
            kwargs.setdefault("return_valid", True)
        return function(*args, **kwargs)

    return wrapper
