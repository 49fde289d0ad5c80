"""Speak to the Hub: connection, rights, errors, upload and download."""
