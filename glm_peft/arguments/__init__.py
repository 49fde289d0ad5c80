"""The flags of every command, how they are read, and which go together."""
