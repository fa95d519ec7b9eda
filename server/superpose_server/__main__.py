"""`superpose-server`: the process of the command, which a signal ends from its first moment on."""

from __future__ import annotations

from superpose_server.ending import end_at_once


def main() -> None:
    """Run as a command."""
    end_at_once()
    # Imported here: what it needs takes a moment to import, and torch some seconds.
    from superpose_server.command import run

    run()


if __name__ == "__main__":
    main()
