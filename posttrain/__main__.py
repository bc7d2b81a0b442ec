"""`python -m posttrain` is the same as `posttrain`."""

from posttrain.cli import main

main()
