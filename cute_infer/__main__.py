"""``python -m cute_infer``: the same as the ``cute-infer`` command."""

from .cli import main

if __name__ == "__main__":
    main()
