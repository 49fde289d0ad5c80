"""The page in a browser: compare answers, examine data, train, look at adapters."""
