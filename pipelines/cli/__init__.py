"""The command line: settings, help, one-line errors, signals."""
