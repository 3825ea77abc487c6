"""Checks that README.md and docs/ tell the truth: links lead somewhere, commands exist, requests are answered as shown.

    python -m scripts.check_readme                 everything; starts `exeunt serve` when a page shows a curl request
    python -m scripts.check_readme --no-server     without the requests
    python -m scripts.check_readme --url URL       the requests go to a server that already runs
    python -m scripts.check_readme FILE...         other pages than README.md and docs/*.md

Looked at are fences marked bash, sh, shell or console, and code in the running text that begins with `make` or
`exeunt`. A curl command is sent to a real server; a json fence right after it must have the shape of the real answer
(the same keys and types, whatever the values), and a fence of `data:` lines the shape of the real events. In a shown
answer a line of dots stands for what was left out.

It does not run other commands: it checks that what they name exists.
"""
