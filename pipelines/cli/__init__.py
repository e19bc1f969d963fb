"""The command line: settings, help, the frame that turns an error into one line, signals."""
