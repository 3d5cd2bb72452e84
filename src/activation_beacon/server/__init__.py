"""`beacon serve`: compress once, ask many, over HTTP.

```
reading  sampling                    one text read piece by piece; a token chosen
writing  listing                     ids turned into text; which tokens of it are listed with their probabilities
batch  engine                        answers on different contexts decoded together by one thread
prefixes  memory  folder  library    caches cut and kept by bytes; contexts on disk; contexts by handle
schema  lengths  prompting  answers  requests, their token ids, and what is sent back
addresses  gate                      who may call, and under which name
routes_*  app                        HTTP
```
"""
