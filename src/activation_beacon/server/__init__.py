"""`beacon serve`: compress once, ask many, over HTTP.

```
reading  sampling                    one text read piece by piece; a token chosen
writing  listing                     ids turned into text; which tokens of it are listed with their probabilities
jobs  work  engine                   answers on different contexts decoded together by one thread; how requests wait for it
prefixes  memory  folder  library    caches cut and kept by bytes; contexts on disk; contexts by handle
schema  lengths  prompting           requests, and their token ids
answering  answers  responses        one request answered, and what is sent back
shapes  failures                     replies and errors in OpenAI's shape
settings  state  metrics  logs       what one server is made of, and what it tells of itself
addresses  gate                      who may call, and under which name
routes_*  app  http                  HTTP
ray_serve  ray_corpus                replicas, and whole corpora, on Ray
```
"""
