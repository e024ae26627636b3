"""Decides which records stay: integers and arrays only, no model, no file format, no torch."""

if __name__ != "offmoe.cache":
    raise ImportError("import offmoe.cache: a second copy under another name would have its own classes")
