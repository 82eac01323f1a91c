"""The command line's commands, a module for each family; `app.cli` loads only the one that is asked for."""
