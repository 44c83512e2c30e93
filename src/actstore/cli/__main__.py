"""`python -m actstore.cli`."""

from actstore.cli import main

main()
