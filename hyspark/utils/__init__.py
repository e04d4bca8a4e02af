"""Small tools without knowledge of the project: files, digests, text, tables, processes."""
