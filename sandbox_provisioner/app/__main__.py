"""app/__main__.py - a command of its own: `python -m sandbox_provisioner.app`."""

from sandbox_provisioner.app import main

main()
