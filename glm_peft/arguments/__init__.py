"""Every flag of every command."""
