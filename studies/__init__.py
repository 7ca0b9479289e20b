"""`hetlora reproduce`: the studies of the repository, each a comparison with the tables and figures drawn from it.

`studies.study` reads a study, `studies.outcome` keeps what its runs gave as small records,
`studies.tables` and `studies.figures` show them, and `studies.reproduction` does it all.
"""
