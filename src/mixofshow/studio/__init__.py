"""The studio: the whole job in a browser, on one workspace folder. No logic that the command line lacks.

`server` starts it; `page` puts the tabs together; `workspace` is the folder, in the formats of the command line; `jobs`
are what takes a while, which goes on when the page is closed.
"""
