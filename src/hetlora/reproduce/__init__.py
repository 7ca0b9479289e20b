"""`hetlora reproduce`: studies that come with the package, each a comparison with the tables and figures drawn from it.

`hetlora.reproduce.study` reads a study, `hetlora.reproduce.outcome` keeps what its runs gave as small records,
`hetlora.reproduce.tables` and `hetlora.reproduce.figures` show them, and `hetlora.reproduce.reproduction` does it all.
"""
