"""The command `vlv`: `vlv ingest …` is `python jobs/ingest.py …`."""

from pathlib import Path

from pipelines.cli.commands import run_command


def main() -> None:
    run_command(Path(__file__).parent)


if __name__ == "__main__":
    main()
