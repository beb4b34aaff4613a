"""The commands of `pyfleece`, a file for each group. Each has `add(commands)`, which adds its parsers."""
