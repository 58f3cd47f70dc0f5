"""The quick start's complete demo; the code is cute_infer/demo.py."""

from cute_infer.demo import main

if __name__ == "__main__":
    main()
